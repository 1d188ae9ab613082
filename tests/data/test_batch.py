"""A batch becomes normalised floats on the device, with the bits of torchvision's transforms."""

from __future__ import annotations

import pickle
from collections import Counter
from functools import partial

import torch
from torchvision import transforms

from models.packing import PackedTexts, pack_texts
from training.data.batch import Batch, BatchRecord, normalize, to_device
from training.data.lanes import LanePosition
from training.data.prefetch import tensors_of

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def every_byte() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).repeat(2, 3, 1).view(2, 3, 16, 16)


def record() -> BatchRecord:
    samples = torch.tensor([[5, 1, 0], [6, 0, 3]])
    return BatchRecord({0: LanePosition(1, 2, 3, 512)}, samples, Counter(read=2), Counter())


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
    batch = Batch(every_byte(), torch.ones(2, 7, dtype=torch.int64), record())
    found = to_device(batch, mean=MEAN, std=STD, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert found.images.dtype == torch.bfloat16
    assert torch.equal(found.images, normalize(every_byte(), mean=MEAN, std=STD).bfloat16())
    assert torch.equal(found.texts, batch.texts)


def test_what_is_on_the_device_shares_no_memory_with_the_loader():
    batch = Batch(every_byte(), torch.ones(2, 7, dtype=torch.int64), record())
    found = to_device(batch, mean=MEAN, std=STD, device=torch.device("cpu"), dtype=torch.float32)
    batch.images.zero_()
    batch.texts.zero_()
    assert torch.equal(found.images, normalize(every_byte(), mean=MEAN, std=STD))
    assert torch.equal(found.texts, torch.ones(2, 7, dtype=torch.int64))
    assert found.sources is not None
    assert found.sources.tolist() == [0, 3]


def test_texts_are_packed_on_their_way_to_the_device():
    texts = torch.tensor([[5, 9, 0, 0], [5, 3, 9, 0]])
    batch = Batch(every_byte(), texts, record())
    form = partial(to_device, mean=MEAN, std=STD, device=torch.device("meta"), dtype=torch.float32)
    found = form(batch, pack=pack_texts)
    assert isinstance(found.texts, PackedTexts)
    assert found.texts.lengths.tolist() == [2, 3]
    assert {tensor.device.type for tensor in tensors_of(found)} == {"meta"}
    # Images, texts, sources: what the prefetching thread must keep alive for the other stream.
    assert len(list(tensors_of(found))) == 1 + 2 + 6 + len(found.texts.packing.groups) + 1


def test_the_record_of_a_batch_travels_between_processes():
    twin = pickle.loads(pickle.dumps(record()))
    assert (twin.positions, twin.counts) == (record().positions, record().counts)
    assert torch.equal(twin.samples, record().samples)
