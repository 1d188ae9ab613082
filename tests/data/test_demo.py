"""The demo set: deterministic, truthful, held out, and safe to write."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import re
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image

from training.commands.make_demo_data import main
from training.data import demo
from training.data import demo_captions as words
from training.data.demo import TEMPLATES, make_demo_data
from training.data.demo_samples import CLASS_NAMES, DemoSpec, draw_sample, plan_sample
from training.data.demo_scenes import BACKGROUND_COLOURS, COLOURS, SHAPES, Scene, render

TINY = DemoSpec(samples=40, shards=8, seed=3)
SAMPLES_TO_LOOK_AT = 1500


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "tiny 100%"
    assert make_demo_data(directory, TINY)
    return directory


@pytest.fixture(scope="module")
def scenes_and_captions() -> list[tuple[Scene, str]]:
    spec = DemoSpec()
    return [
        (scene, text)
        for split in ("train", "retrieval")
        for scene, texts in (plan_sample(spec, split, i) for i in range(SAMPLES_TO_LOOK_AT // 3))
        for text in texts
    ]


def scene_of(spec: DemoSpec, split: str, index: int) -> Scene:
    return plan_sample(spec, split, index)[0]


def digests(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_tars(paths: list[Path]) -> dict[str, dict[str, bytes]]:
    """Samples by key, members by extension."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                stream = tar.extractfile(member)
                assert stream is not None
                samples.setdefault(key, {})[extension] = stream.read()
    return samples


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_processes(tiny: Path, tmp_path: Path) -> None:
    make_demo_data(tmp_path / "again", TINY, processes=2)
    assert digests(tiny) == digests(tmp_path / "again")


def test_another_seed_gives_other_pictures_and_other_captions() -> None:
    one, two = (draw_sample(DemoSpec(seed=seed), "train", 0) for seed in (0, 1))
    assert one.jpeg != two.jpeg
    assert one.texts != two.texts


def test_train_and_val_shards_hold_an_image_and_a_caption_per_key(tiny: Path) -> None:
    for split, shards, count in (("train", 8, 40), ("val", 2, 16)):
        sizes = json.loads((tiny / split / "sizes.json").read_text())
        tars = sorted((tiny / split).glob("*.tar"))
        assert [tar.name for tar in tars] == list(sizes) == [f"{i:03d}.tar" for i in range(shards)]
        assert [len(read_tars([tar])) for tar in tars] == list(sizes.values())
        samples = read_tars(tars)
        assert len(samples) == count
        assert {tuple(members) for members in samples.values()} == {("jpg", "txt")}
        image = Image.open(io.BytesIO(next(iter(samples.values()))["jpg"]))
        assert (image.size, image.mode, image.format) == ((64, 64), "RGB", "JPEG")


def test_zero_shot_set_has_the_layout_of_clip_benchmark(tiny: Path) -> None:
    root = tiny / "zeroshot"
    assert (root / "classnames.txt").read_text().splitlines() == list(CLASS_NAMES)
    templates = (root / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert templates == list(TEMPLATES)
    assert all(template.format(c="red star").count("red star") == 1 for template in templates)
    num_shards = int((root / "test" / "nshards.txt").read_text())
    samples = read_tars([root / "test" / f"{i}.tar" for i in range(num_shards)])
    assert len(samples) == 80
    assert all(set(members) == {"jpg", "cls"} for members in samples.values())
    assert (root / "dataset_type.txt").read_text() == "classification\n"


def test_zero_shot_classes_are_balanced_and_chance_is_below_five_percent(tiny: Path) -> None:
    labels = Counter(
        int(members["cls"]) for members in read_tars(list((tiny / "zeroshot/test").glob("*.tar"))).values()
    )
    assert set(labels) == set(range(len(CLASS_NAMES)))
    assert len(set(labels.values())) == 1
    assert 1 / len(CLASS_NAMES) < 0.05


def test_retrieval_set_has_five_different_captions_per_image(tiny: Path) -> None:
    root = tiny / "retrieval"
    assert (root / "test" / "nshards.txt").read_text() == "1\n"
    assert (root / "dataset_type.txt").read_text() == "retrieval\n"
    samples = read_tars([root / "test" / "0.tar"])
    assert len(samples) == 16
    assert all(len(set(members["txt"].decode().splitlines())) == 5 for members in samples.values())


def test_csv_rows_are_the_samples_of_the_shards(tiny: Path) -> None:
    for split, count in (("train", 40), ("val", 16)):
        samples = read_tars(sorted((tiny / split).glob("*.tar")))
        with (tiny / "csv" / f"{split}.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t"))
        assert len(rows) == count
        for row in rows:
            path = tiny / "csv" / row["filepath"]
            assert path.read_bytes() == samples[path.stem]["jpg"]
            assert row["title"] == samples[path.stem]["txt"].decode()


def test_no_scene_of_the_evaluation_sets_is_trained_on() -> None:
    spec = DemoSpec()
    train = {scene_of(spec, "train", i).description for i in range(SAMPLES_TO_LOOK_AT)}
    evaluation = {
        scene_of(spec, split, i).description for split in ("val", "zeroshot", "retrieval") for i in range(300)
    }
    assert len(train) > 0.9 * SAMPLES_TO_LOOK_AT
    assert not train & evaluation
    assert not train & {scene_of(DemoSpec(seed=1), "val", i).description for i in range(300)}


def test_colours_and_shapes_are_balanced_in_training() -> None:
    scenes = [scene_of(DemoSpec(), "train", i) for i in range(SAMPLES_TO_LOOK_AT)]
    things = [thing for scene in scenes for thing in scene.things]
    for names, counts in (
        (COLOURS, Counter(thing.colour for thing in things)),
        (SHAPES, Counter(thing.shape for thing in things)),
    ):
        mean = len(things) / len(names)
        assert all(0.75 * mean < counts[name] < 1.25 * mean for name in names)
    assert {len(scene.things) for scene in scenes} == {1, 2, 3}


def test_captions_have_5_to_60_tokens_and_spread_over_them(scenes_and_captions: list[tuple[Scene, str]]) -> None:
    tokenizer = SimpleTokenizer()
    lengths = [len(tokenizer.encode(text)) + 2 for _, text in scenes_and_captions]  # with start and end
    assert min(lengths) >= 5
    assert max(lengths) <= 60
    # The fewest distinct lengths, and the shares of short, middle and long ones, that still look like alt-texts.
    assert len(set(lengths)) >= 35
    for low, high, share in ((5, 9, 0.1), (10, 20, 0.3), (30, 60, 0.05)):
        assert sum(low <= length <= high for length in lengths) > share * len(lengths), (low, high)


def spoken(text: str, table: dict[str, tuple[str, ...]]) -> set[str]:
    """The values of an attribute whose words are in the text."""
    found = set(re.findall(r"[a-z]+(?:-[a-z]+)?", text.lower()))
    return {value for value, synonyms in table.items() if found & set(synonyms)}


def test_captions_name_only_what_is_in_the_scene(scenes_and_captions: list[tuple[Scene, str]]) -> None:
    said: Counter[str] = Counter()
    background_colours: dict[str, tuple[str, ...]] = {name: (name,) for name in BACKGROUND_COLOURS}
    for scene, text in scenes_and_captions:
        checks: dict[str, tuple[dict[str, tuple[str, ...]], set[str]]] = {
            "colour": (words.COLOUR_WORDS, {thing.colour for thing in scene.things}),
            "shape": (words.SHAPE_WORDS, {thing.shape for thing in scene.things}),
            "size": (words.SIZE_WORDS, {thing.size for thing in scene.things}),
            "texture": (words.TEXTURE_WORDS, {thing.texture for thing in scene.things}),
            "background": (words.BACKGROUND_WORDS, {scene.background.kind}),
            "background colour": (background_colours, {scene.background.colour}),
        }
        for name, (table, truth) in checks.items():
            named = spoken(text, table)
            assert named <= truth, (name, text, scene.description)
            said[name] += bool(named)
    # None of the checks may pass because nothing is ever said, and no attribute is always said.
    assert min(said.values()) > 0.05 * len(scenes_and_captions)
    assert said["texture"] < 0.8 * len(scenes_and_captions)


RELATIONS = {
    "left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "on top of": ("y", -1), "over": ("y", -1),
    "below": ("y", 1), "under": ("y", 1), "underneath": ("y", 1),
}  # fmt: skip


def test_relations_in_captions_hold_in_the_scene(scenes_and_captions: list[tuple[Scene, str]]) -> None:
    checked = 0
    shape_of = {word: shape for shape, synonyms in words.SHAPE_WORDS.items() for word in synonyms}
    for scene, text in scenes_and_captions:
        match = re.search(rf"(.+) (?:to the )?({'|'.join(RELATIONS)}) (.+)", text.lower())
        if match is None or len({thing.shape for thing in scene.things}) < len(scene.things):
            continue
        place = {thing.shape: thing for thing in scene.things}
        before, after = (
            [shape_of[w] for w in re.findall(r"[a-z]+", part) if w in shape_of] for part in match.group(1, 3)
        )
        axis, sign = RELATIONS[match.group(2)]
        distance = getattr(place[before[-1]], axis) - getattr(place[after[0]], axis)
        assert distance * sign > 0.1, (text, scene.description)
        checked += 1
    assert checked > 100


def test_lists_from_left_to_right_and_top_to_bottom_are_in_that_order(
    scenes_and_captions: list[tuple[Scene, str]],
) -> None:
    checked = 0
    for scene, text in scenes_and_captions:
        axis = "x" if "from left to right" in text else "y" if "from top to bottom" in text else None
        if axis is None:
            continue
        assert scene.layout == {"x": "row", "y": "column"}[axis]
        places = [getattr(thing, axis) for thing in scene.things]
        assert places == sorted(places)
        checked += 1
    assert checked > 10


def test_a_scene_is_painted_in_its_colour_where_it_says() -> None:
    for i in range(40):
        scene = scene_of(DemoSpec(), "train", i)
        picture = render(scene, image_size=128).load()
        assert picture is not None
        for thing in scene.things:
            if thing.texture == "solid" and thing.shape in ("circle", "square", "heart"):
                pixel = picture[int(thing.x * 128), int(thing.y * 128)]
                assert isinstance(pixel, tuple)
                assert all(abs(a - b) < 16 for a, b in zip(pixel, thing.tint, strict=True))


def test_things_stay_inside_the_picture_and_apart() -> None:
    for i in range(500):
        scene = scene_of(DemoSpec(), "train", i)
        for one, two in itertools.combinations(scene.things, 2):
            assert max(abs(one.x - two.x), abs(one.y - two.y)) > 0.25
        for thing in scene.things:
            assert all(c - thing.radius > -0.05 and c + thing.radius < 1.05 for c in (thing.x, thing.y))


def test_making_the_same_set_again_changes_nothing(tiny: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny.rglob("*")}
    assert not make_demo_data(tiny, TINY)
    assert before == {path: path.stat().st_mtime_ns for path in tiny.rglob("*")}


def test_a_directory_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and not a demo data set: pass a new directory"):
        make_demo_data(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_set_made_with_other_arguments_is_refused_with_both(tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"made with --samples 40 .* --seed 3 .*, not with --samples 40 .* --seed 4 "):
        make_demo_data(tiny, DemoSpec(samples=40, shards=8, seed=4))


def test_a_damaged_set_is_refused(tmp_path: Path) -> None:
    make_demo_data(tmp_path / "set", TINY)
    (tmp_path / "set/train/002.tar").unlink()
    with pytest.raises(ValueError, match=r"is damaged \(train/002.tar is missing or cut\)"):
        make_demo_data(tmp_path / "set", TINY)


def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.data.demo._write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_demo_data(tmp_path / "set", TINY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("faster_seed", "message"), [(3, None), (4, "not with --samples 40")])
def test_of_two_runs_into_one_directory_the_first_to_finish_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster_seed: int, message: str | None
) -> None:
    write_manifest = demo._write_manifest

    def finish_second(staging: Path, spec: DemoSpec) -> None:
        monkeypatch.undo()
        assert make_demo_data(tmp_path / "set", replace(TINY, seed=faster_seed))
        write_manifest(staging, spec)

    monkeypatch.setattr(demo, "_write_manifest", finish_second)
    if message is None:
        assert not make_demo_data(tmp_path / "set", TINY)
    else:
        with pytest.raises(ValueError, match=message):
            make_demo_data(tmp_path / "set", TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shards": 7}, "7 shards for 16384 samples: pass --shards from 8"),
        ({"samples": 9, "shards": 10}, "10 shards for 9 samples"),
        ({"image_size": 16}, "images of 16 px: pass --image-size from 32"),
    ],
)
def test_impossible_sizes_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DemoSpec(**values)


def test_the_command_writes_the_set_and_a_contact_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [str(tmp_path / "set"), "--samples", "32", "--shards", "8", "--image-size", "48"]
    assert main([*line, "--contact-sheet", str(tmp_path / "sheet.png")]) == 0
    assert capsys.readouterr().out.startswith("wrote ")
    assert Image.open(tmp_path / "sheet.png").width > 500
    assert main(line) == 0
    assert capsys.readouterr().out.startswith("already there: ")


def test_the_command_ends_with_a_message_and_a_code_when_it_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main([str(tmp_path)]) == 1
    assert "is not empty" in capsys.readouterr().err
