"""A batch becomes normalised floats on the device, with the bits of torchvision's transforms."""

from __future__ import annotations

import pickle

import torch
from torchvision import transforms

from training.data.batch import Batch, normalize, to_device

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def every_byte() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).repeat(2, 3, 1).view(2, 3, 16, 16)


def test_normalized_images_have_the_bits_of_to_tensor_and_normalize():
    images = every_byte()
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    expected = torch.stack([reference(image.permute(1, 2, 0).numpy()) for image in images])
    assert torch.equal(normalize(images, mean=MEAN, std=STD), expected)


def test_the_images_given_are_not_changed():
    images = every_byte()
    normalize(images, mean=MEAN, std=STD)
    floats = every_byte().float()
    normalize(floats, mean=MEAN, std=STD)
    assert torch.equal(images, every_byte())
    assert torch.equal(floats, every_byte().float())


def test_a_batch_is_normalized_in_fp32_and_given_in_the_input_dtype():
    batch = Batch(every_byte(), torch.ones(2, 7, dtype=torch.int64), position=None, skipped={})
    found = to_device(batch, mean=MEAN, std=STD, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert found.images.dtype == torch.bfloat16
    assert torch.equal(found.images, normalize(every_byte(), mean=MEAN, std=STD).bfloat16())
    assert torch.equal(found.texts, batch.texts)


def test_a_batch_travels_between_processes_with_its_position():
    batch = Batch(every_byte(), torch.ones(2, 7, dtype=torch.int64), position=("lane", 3), skipped={"no caption": 2})
    twin = pickle.loads(pickle.dumps(batch))
    assert (twin.position, twin.skipped) == (("lane", 3), {"no caption": 2})
    assert torch.equal(twin.images, batch.images)
