"""Row 51: a rank that all others wait for is named, with what it is slow at; even ranks are left in peace."""

from __future__ import annotations

import os
import random
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from tests.distributed.launch import current_runtime, run_ranks, start_ranks
from tests.faults.conftest import fault_data, lab, nursery  # noqa: F401 - the fixtures of the fault tests
from tests.faults.lab import Lab, events, json_lines
from tests.faults.plan import Fault
from tests.test_train_step import build_step
from tests.tiny_clip import split, tiny_batch, tiny_clip
from training.config import EngineConfig
from training.data.batch import Batch
from training.data.loader import TrainLoader
from training.distributed.collectives import gather_objects, rank, world_size
from training.distributed.parallelize import parallelize
from training.main import main
from training.observability.compute_clock import ComputeClock
from training.observability.stragglers import PATIENCE, SILENCE, SLOW_SCORE, RankTimes, Straggler, StragglerReport

HOSTS = ["a", "b", "c"]


def watch(times: Callable[[int], RankTimes], *, log_points: int, step_s: float = 0.5) -> dict[int, Straggler]:
    """Who is named at which log point."""
    report = StragglerReport(HOSTS[: len(times(0).compute_s)])
    named = {point: report.observe(times(point), step_s=step_s) for point in range(log_points)}
    return {point: straggler for point, straggler in named.items() if straggler is not None}


def test_a_rank_that_computes_slowly_is_named_with_its_host_and_section():
    named = watch(lambda _: RankTimes([0.1, 0.1, 0.4], [0.0, 0.01, 0.0]), log_points=PATIENCE)
    (straggler,) = named.values()
    assert (straggler.rank, straggler.host, straggler.section) == (2, "c", "compute")
    assert straggler.score == pytest.approx(0.11 / 0.4)
    assert "rank 2 on c is slow (compute): 0.400 s of computing" in str(straggler)


def test_a_rank_that_waits_for_its_data_is_named_for_that():
    (straggler,) = watch(lambda _: RankTimes([0.1, 0.12], [0.3, 0.0]), log_points=PATIENCE).values()
    assert (straggler.rank, straggler.section) == (0, "data")
    assert "(--workers)" in str(straggler)


def test_a_slow_rank_is_named_once_in_a_while():
    slow = RankTimes([0.1, 0.4], [0.0, 0.0])
    assert list(watch(lambda _: slow, log_points=PATIENCE + SILENCE)) == [PATIENCE - 1, PATIENCE - 1 + SILENCE]


def test_one_moment_is_not_enough_and_neither_are_several_of_different_ranks():
    slow, even = RankTimes([0.1, 0.4], [0.0, 0.0]), RankTimes([0.1, 0.1], [0.0, 0.0])
    assert not watch(lambda point: even if point % PATIENCE == 0 else slow, log_points=50)
    assert not watch(
        lambda point: RankTimes(*([times[point % 2], times[1 - point % 2]] for times in slow)), log_points=50
    )


def test_two_slow_ranks_of_three_or_a_trifle_are_nobody_s_fault():
    assert not watch(lambda _: RankTimes([0.1, 0.4, 0.4], [0.0] * 3), log_points=50)
    trifle = RankTimes([0.0, 0.0], [0.0001, 0.002])
    assert not watch(lambda _: trifle, log_points=50)
    assert watch(lambda _: trifle, log_points=50, step_s=0.004)


def test_data_and_computing_are_judged_together():
    """Whoever computes longer but has its batch sooner keeps nobody waiting."""
    assert not watch(lambda _: RankTimes([0.1, 0.5], [0.5, 0.1]), log_points=50)


def test_even_ranks_with_noise_are_not_named():
    chance = random.Random(0)

    def noisy(_: int) -> RankTimes:
        return RankTimes([0.1 * chance.lognormvariate(0, 0.3) for _ in HOSTS], [0.0] * 3)

    assert not watch(noisy, log_points=1000)


def test_the_metrics_tell_the_slowest_from_the_last():
    report = StragglerReport(HOSTS)
    metrics = report.metrics(RankTimes([0.1, 0.2, 0.3], [0.5, 0.1, 0.1]))
    assert metrics["compute/seconds_mean"] == pytest.approx(0.2)
    assert (metrics["compute/slowest_rank"], metrics["straggler/rank"]) == (2, 0)
    assert metrics["compute/straggler_score"] == pytest.approx(0.2 / 0.3)
    assert metrics["straggler/score"] == pytest.approx(0.4 / 0.6)
    whole = (metrics[f"straggler/{name}_seconds"] for name in ("compute", "data_wait", "others"))
    assert tuple(whole) == pytest.approx((0.1, 0.5, 0.4))
    assert metrics["compute/seconds_slowest"] == pytest.approx(0.3)


def test_each_of_few_ranks_has_its_own_numbers_and_of_many_the_slowest():
    few = StragglerReport(HOSTS).metrics(RankTimes([0.1, 0.2, 0.3], [0.5, 0.1, 0.1]))
    assert (few["ranks/02/compute_seconds"], few["ranks/00/data_wait_seconds"]) == (0.3, 0.5)
    many = StragglerReport(["h"] * 1024).metrics(RankTimes([0.1] * 1023 + [0.4], [0.0] * 1024))
    assert (many["straggler/rank"], many["straggler/compute_seconds"]) == (1023, 0.4)
    assert not any(name.startswith("ranks/") for name in many)


def test_a_single_rank_has_nobody_to_be_compared_with():
    report, times = StragglerReport(["a"]), RankTimes([0.1], [9.0])
    assert report.metrics(times) == {"compute/seconds_mean": pytest.approx(0.1)}
    assert all(report.observe(times, step_s=9.1) is None for _ in range(2 * PATIENCE))
    assert StragglerReport(["a", "b"]).metrics(RankTimes([0.0] * 2, [0.0] * 2))["straggler/score"] == 1.0


def test_nothing_is_counted_outside_of_a_step():
    clock = ComputeClock("cpu")
    module = torch.nn.Identity()
    clock.start()
    clock.stop()
    with clock.paused_until_called(module):
        module(torch.zeros(1))
    time.sleep(0.1)
    clock.stop()
    seconds, steps = clock.read()
    assert (seconds < 0.05, steps) == (True, 1)
    assert clock.read() == (0.0, 0)


SLEEP_S = 0.15
EXCHANGE_FIRST = "batch norm, whose buffers DDP exchanges first"
CASES = {
    "plain": (1, {}, {}),
    EXCHANGE_FIRST: (1, {"batch_norm": True}, {}),
    "accumulated": (2, {}, {}),
    "accumulated static graph": (2, {"batch_norm": True}, {"ddp_static_graph": True}),
}


def own_times(case: str, slow_rank: int | None, *, in_forward: bool = True) -> list[float]:
    """Each rank's own seconds per step, where one rank's forward pass, or what comes before it, takes longer."""
    accum_freq, options, engine = CASES[case]
    model = tiny_clip(**options)
    if rank() == slow_rank and in_forward:
        model.visual.register_forward_pre_hook(lambda *_: time.sleep(SLEEP_S / accum_freq))
    config = EngineConfig(device="cpu", **engine)
    step = build_step(model, trained=parallelize(model, config=config, runtime=current_runtime()))
    pieces = split(split(tiny_batch(24), world_size())[rank()], accum_freq)
    step(pieces, lr=0.1)  # DDP sets itself up
    for _ in range(2):
        step.compute_clock.start()
        time.sleep(SLEEP_S if rank() == slow_rank and not in_forward else 0.0)
        step(pieces, lr=0.1)
    seconds, steps = step.compute_clock.read()
    return gather_objects(seconds / steps)


def own_times_of_all_cases(slow_ranks: Sequence[int | None]) -> dict[tuple[str, int | None], list[float]]:
    return {(case, slow_rank): own_times(case, slow_rank) for case in CASES for slow_rank in slow_ranks}


def own_time_of_a_first_step() -> tuple[float, int]:
    model = tiny_clip()
    model.visual.register_forward_pre_hook(lambda *_: time.sleep(SLEEP_S))
    trained = parallelize(model, config=EngineConfig(device="cpu"), runtime=current_runtime())
    step = build_step(model, trained=trained)
    step.compute_clock.start()
    step([split(tiny_batch(8), 2)[rank()]], lr=0.1)
    return step.compute_clock.read()


def test_of_a_process_s_first_step_the_forward_pass_counts_and_not_what_ddp_sets_up():
    for seconds, steps in run_ranks(2, own_time_of_a_first_step):
        assert steps == 1
        assert SLEEP_S <= seconds < 2 * SLEEP_S


@pytest.mark.parametrize(("ranks", "slow_ranks"), [(2, (0, None)), (3, (1,))])
def test_only_the_rank_that_sleeps_in_its_forward_pass_has_a_long_time_of_its_own(ranks, slow_ranks):
    for (case, slow_rank), times in run_ranks(ranks, own_times_of_all_cases, slow_ranks)[0].items():
        for place, seconds in enumerate(times):
            assert (seconds >= SLEEP_S) == (place == slow_rank), (case, slow_rank, times)


def own_times_with_and_without_the_pause() -> tuple[list[float], list[float]]:
    paused = own_times(EXCHANGE_FIRST, 0, in_forward=False)
    ComputeClock.paused_until_called = lambda clock, module: nullcontext()  # type: ignore[method-assign, assignment]
    return paused, own_times(EXCHANGE_FIRST, 0, in_forward=False)


def test_the_wait_for_another_rank_s_buffers_is_not_computing():
    """Rank 0 keeps the others waiting for its BatchNorm statistics; without the pause all ranks seem slow."""
    (slow, waiting), without = run_ranks(2, own_times_with_and_without_the_pause)[0]
    assert slow > SLEEP_S > 2 * waiting
    assert 2 * min(without) > SLEEP_S


@pytest.mark.gpu
def test_on_a_gpu_the_device_s_time_is_counted_without_waiting_for_it():
    clock, device = ComputeClock("cuda"), torch.device("cuda")
    square = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        started = time.perf_counter()
        for _ in range(3):
            clock.start()
            for _ in range(20):
                square = square @ square * 1e-3
            clock.stop()
        queued_s = time.perf_counter() - started
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seconds, steps = clock.read()
    assert steps == 3
    assert seconds > queued_s / 2


def stragglers(lab: Lab) -> list[dict[str, Any]]:  # noqa: F811
    return events(lab.run_directory("r"), "straggler")


def scores(lab: Lab) -> list[float]:  # noqa: F811
    lines = json_lines(lab.run_directory("r") / "metrics.jsonl")
    assert all(line["train/compute/seconds_mean"] > 0 for line in lines)
    return [line["train/straggler/score"] for line in lines]


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_run_names_the_rank_that_computes_slowly(lab: Lab, ranks: int) -> None:  # noqa: F811
    """Row 51. The step of rank 1 takes 0.3 s longer than that of the others."""
    slow = Fault("step", "sleep", rank=1, step=1, until=8, with_={"seconds": 0.3})
    ended = lab.finish("r", plan=[slow], world_size=ranks)
    (event,) = stragglers(lab)
    assert (event["rank"], event["host"], event["section"]) == (1, socket.gethostname(), "compute")
    assert max(scores(lab)[1:8]) < SLOW_SCORE
    assert f"rank 1 on {socket.gethostname()} is slow (compute)" in ended.text
    assert " Slowest: rank 1 (compute 0.3" in ended.text


def train_with_slow_data(argv: list[str], slow_rank: int) -> None:
    """One rank of a run; ``slow_rank`` takes 0.3 s longer for a batch."""
    load = TrainLoader._load_here

    def load_slowly(loader: TrainLoader) -> Iterator[Batch]:
        for number, batch in enumerate(load(loader)):
            time.sleep(0.3 if 1 <= number < 8 else 0.0)
            yield batch

    if os.environ["RANK"] == str(slow_rank):
        TrainLoader._load_here = load_slowly  # type: ignore[method-assign]
    main(argv)


def test_a_run_names_the_rank_that_is_slow_at_getting_data(lab: Lab) -> None:  # noqa: F811
    """Row 51, the other section."""
    ranks = start_ranks(2, train_with_slow_data, lab.line("r"), 0)
    for process in ranks:
        process.join(timeout=60)
    assert [process.exitcode for process in ranks] == [0, 0]
    (event,) = stragglers(lab)
    assert (event["rank"], event["section"]) == (0, "data")
    assert event["data_wait_s"] > 0.3 > event["compute_s"]


def test_a_run_of_even_ranks_names_nobody(lab: Lab) -> None:  # noqa: F811
    """Negative control of row 51: all ranks are slow alike."""
    lab.finish("r", plan=[Fault("step", "sleep", step=1, until=8, with_={"seconds": 0.3})])
    assert stragglers(lab) == []
    assert statistics.median(scores(lab)[1:8]) > SLOW_SCORE
