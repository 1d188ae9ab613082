from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from training.commands.report import main, read_run
from training.observability.history import append_start, describe_start, read_starts
from training.observability.report import RunRecord, SavedStep, given_up, render_report
from training.observability.svg_chart import HEIGHT, WIDTH, Mark, line_chart, nice_ticks, thin_out

METRICS = [
    {"step": step, "train/loss": 8.0 / (step + 1), "train/grad_norm": 10.0 ** (3 - step), "train/lr": 1e-3}
    for step in range(5)
] + [{"step": 5, "epoch": 1, "val/clip_val_loss": 2.5}]
FACTS = {"world_size": 2, "batch_size": 4, "accum_freq": 3, "new_data": None}


class _Elements(HTMLParser):
    """Opened and closed tags, and the addresses a page refers to."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_is_whole_and_needs_no_other_file() -> None:
    start = describe_start(step=0, facts=FACTS)
    event = {"step": 3, "event": "skipped", "reason": "<script>alert(1)</script>"}
    page = render_report(RunRecord("a & b", METRICS, [event], [start], [SavedStep(5, 2_000_000, ("good",))], "lr: 1"))
    elements = _Elements(page)
    assert elements.open == []
    assert elements.references == []
    assert elements.tags.isdisjoint({"script", "link", "img", "iframe"})
    assert "url(" not in page
    assert "<title>a &amp; b</title>" in page


def test_curves_tables_and_tags_are_on_the_page() -> None:
    changed = describe_start(step=3, facts=FACTS, resumed_from="/r/checkpoints/step_00000003", changes={"lr": [1, 2]})
    starts = [describe_start(step=0, facts=FACTS), changed]
    page = render_report(RunRecord("r", METRICS, [], starts, [SavedStep(5, 2_000_000, ("good", "best x = 1"))]))
    for expected in (
        ">Loss<",
        ">Gradient norm<",
        ">Learning rate<",
        ">clip_val_loss<",
        "24 = 2 x 4 x 3",
        "lr: 1 -&gt; 2",
    ):
        assert expected in page
    assert "good, best x = 1" in page
    assert "step_00000003" in page
    assert 'class="mark change"' in page
    assert ">Logit scale<" not in page  # was not measured


def test_the_ranks_that_the_others_waited_for_are_counted() -> None:
    slow = {"score": 0.5, "compute_seconds": 0.2, "data_wait_seconds": 0.01, "others_seconds": 0.1}
    ranks = [3.0, 3.0, 3.0, 1.0]
    metrics = [
        {"step": step, "train/loss": 1.0, "train/straggler/rank": rank}
        | {f"train/straggler/{name}": value for name, value in slow.items()}
        for step, rank in enumerate(ranks)
    ]
    page = render_report(RunRecord("r", metrics, [{"step": 3, "event": "straggler", "rank": 3, "host": "jwb0042"}]))
    assert "<td>3</td><td>jwb0042</td><td>3 (75%)</td><td>3</td><td>0.2</td><td>0.01</td><td>0.1</td>" in page
    assert "Ranks that the others waited for" not in render_report(RunRecord("r", METRICS))


def test_an_empty_run_has_a_page() -> None:
    page = render_report(RunRecord("nothing yet"))
    assert "no values" in page
    assert _Elements(page).open == []


def test_a_branch_and_new_data_are_told_in_the_table() -> None:
    parent = {"run": "/logs/old", "step": 7, "manifest_sha256": "ab"}
    facts = FACTS | {"new_data": {"first_epoch": 2.0, "unread_samples": 640}}
    page = render_report(RunRecord("r", METRICS, [], [describe_start(step=7, facts=facts, parent=parent)]))
    assert "/logs/old at step 7" in page
    assert "new data from epoch 2.0; about 640 samples unread" in page


def test_only_the_last_of_many_events_are_listed_and_few_are_drawn() -> None:
    events = [{"step": step, "event": "overflow"} for step in range(5000)]
    page = render_report(RunRecord("r", METRICS, events))
    assert "The last 200; 4800 earlier ones are in events.jsonl." in page
    assert "5000 overflow" in page
    assert len(page) < 500_000


def test_events_of_a_past_that_was_given_up_are_told_from_the_others() -> None:
    events = [
        {"step": 4, "event": "skipped"},
        {"step": 9, "event": "skipped"},
        {"step": 6, "event": "resumed"},
        {"step": 8, "event": "skipped"},
    ]
    assert given_up(events) == [False, True, False, False]
    page = render_report(RunRecord("r", METRICS, events))
    assert page.count("a past that was given up") == 1
    assert 'class="mark skip gone"' in page


def test_a_chart_is_xml_whose_line_stays_inside() -> None:
    svg = line_chart([(0, 1.0), (10, 3.0), (20, 2.0)], title="a < b", marks=[Mark(5, "skip", "5: <x>")])
    root = ElementTree.fromstring(svg)
    path = next(element.attrib["d"] for element in root.iter("path") if element.get("class") == "line")
    places = [tuple(map(float, place.split())) for place in path.lstrip("M").split("L")]
    assert len(places) == 3
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in places)
    assert places[1][1] < places[2][1] < places[0][1]  # greater values are higher up


def test_values_that_are_not_finite_interrupt_the_line_and_are_shown() -> None:
    svg = line_chart([(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0), (4, 2.0), (5, math.inf)], title="loss")
    root = ElementTree.fromstring(svg)
    (line,) = [element.attrib["d"] for element in root.iter("path") if element.get("class") == "line"]
    assert line.count("M") == 2
    assert sum(element.get("class") == "bad" for element in root.iter("path")) == 2


def test_one_point_and_equal_values_can_be_drawn() -> None:
    assert "circle" in line_chart([(3, 2.0)], title="x")
    assert "line" in line_chart([(1, 0.0), (2, 0.0)], title="x", log=True)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.95, 4.3, [1, 2, 3, 4]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (0, 1e-3, [0, 2e-4, 4e-4]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    ticks = nice_ticks(low, high, most=5)
    assert ticks[: len(expected)] == pytest.approx(expected)
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_a_logarithmic_axis_has_powers_of_ten() -> None:
    svg = line_chart([(0, 1.0), (1, 1e4)], title="x", log=True)
    assert ">100<" in svg
    assert ">1e+04<" in svg


def test_thinning_keeps_every_spike() -> None:
    points = [(float(step), 0.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    kept = thin_out(points, most=100)
    assert len(kept) <= 200
    assert (54_321.0, 9.0) in kept
    assert kept == sorted(kept)


def test_a_start_tells_where_and_with_what_it_ran(tmp_path: Path) -> None:
    environment = {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "2"}
    start = describe_start(step=8, facts=FACTS, changes={"lr": [1, 2]}, environment=environment)
    assert (start["job"], start["restart"], start["world_size"]) == ("4711", 2, 2)
    assert start["versions"]["torch"]
    path = tmp_path / "starts.jsonl"
    assert read_starts(path) == []
    path.write_text('{"step": 0}\n{"step": 1, "cu')  # a crash
    append_start(path, start)
    assert read_starts(path) == [{"step": 0}, json.loads(json.dumps(start))]


def test_the_command_reads_what_a_run_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (run / "checkpoints/step_00000004").mkdir(parents=True)
    (run / "checkpoints/step_00000004/model.safetensors").write_bytes(b"0" * 500)
    (run / "checkpoints/TAGS.json").write_text('{"good": [4], "suspect": [], "best": null}')
    lines = "".join(json.dumps(line) + "\n" for line in METRICS)
    (run / "metrics.jsonl").write_text(f'{lines}{{"step": 6, "train/loss": NaN}}\n{{"step": 7, "tr')
    (run / "config.yaml").write_text("lr: 0.001\n")
    record = read_run(run)
    assert [line["step"] for line in record.metrics] == [0, 1, 2, 3, 4, 5, 6]
    assert record.checkpoints == [SavedStep(4, 500, ("good",))]
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n"
    assert "lr: 0.001" in (run / "report.html").read_text()


def test_what_is_no_run_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "is no run: it has no metrics.jsonl" in capsys.readouterr().err
