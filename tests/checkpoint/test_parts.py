from __future__ import annotations

from training.checkpoint.parts import choose_writers, part_name, parts_of, spread


def test_writers_are_as_many_as_the_size_needs_and_ranks_there_are() -> None:
    assert choose_writers(0, world_size=8) == [0]
    assert choose_writers(512 * 2**20, world_size=8) == [0]
    assert choose_writers(512 * 2**20 + 1, world_size=8) == [0, 4]
    assert choose_writers(30 * 2**30, world_size=3) == [0, 1, 2]
    assert choose_writers(2 * 2**30, world_size=1024) == [0, 256, 512, 768]


def test_every_tensor_is_in_one_part_and_the_parts_are_of_about_equal_size() -> None:
    sizes = {f"t{index}": index * 10 for index in range(50)}
    parts = spread(sizes, 4)
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    totals = [sum(sizes[name] for name in part) for part in parts]
    assert max(totals) - min(totals) <= max(sizes.values())
    assert spread(dict(reversed(sizes.items())), 4) == parts


def test_parts_are_found_by_name_and_other_files_are_not() -> None:
    names = [part_name("model", place, 2) for place in range(2)]
    assert names == ["model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"]
    assert parts_of("model", [*names, "modelling.safetensors", "optimizer.safetensors", "model-x.json"]) == names
    assert parts_of("model", [part_name("model", 0, 1)]) == ["model.safetensors"]
