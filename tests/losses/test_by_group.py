"""The loss by source of data."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from training.losses.by_group import losses_by_group


def test_sums_over_groups_are_those_of_the_plain_loss():
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(6, 4, generator=generator), dim=1) for _ in range(2))
    scale = torch.tensor(10.0, requires_grad=True)
    groups = torch.tensor([2, 0, 0, 2, 2, 0])
    found = losses_by_group(images, texts, scale, groups, num_groups=4)
    logits = 10.0 * images.double() @ texts.double().T
    rows = (-logits.log_softmax(1).diagonal() - logits.log_softmax(0).diagonal()) / 2
    expected = torch.tensor([rows[groups == group].sum() for group in range(4)])
    torch.testing.assert_close(found[:, 0].double(), expected.double())
    assert found[:, 1].tolist() == [3, 0, 3, 0]
    assert not found.requires_grad


def test_a_source_whose_captions_fit_nothing_stands_out():
    images = F.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    texts = images.clone()
    texts[4:] = images[4:].flip(0)
    sums = losses_by_group(images, texts, torch.tensor(20.0), torch.arange(8) // 4, num_groups=2)
    assert sums[1, 0] > 10 * sums[0, 0]
