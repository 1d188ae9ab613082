"""From what the ranks were doing follows which of them the others wait for."""

from __future__ import annotations

import json

from training.resilience.hang import Note, blame, blamed_ranks, host_silent


def note(rank: int, *, step: int = 7, number: int = 123, started: int = -1, waiting: bool = True, **more) -> Note:
    where = f"training/train.py:{rank} in train"
    facts = {"collective": "all_reduce", "host": "n", "pid": 40 + rank} | more
    return Note(rank, step, "step", 600.4, where, number=number, started=started, waiting=waiting, **facts)


def test_a_rank_that_does_not_answer_is_to_blame():
    verdict = blame([note(0), note(2)], world_size=3)
    assert (verdict.rank, verdict.silent) == (1, (1,))
    assert verdict.text == (
        "rank 1 is silent since step 7: stopped, dead, or stuck in native code; "
        "ranks 0, 2 wait for it in all_reduce #123"
    )


def test_several_that_do_not_answer_are_all_named():
    verdict = blame([note(3)], world_size=4)
    assert verdict.silent == (0, 1, 2)
    assert verdict.text.startswith("ranks 0, 1, 2 are silent since step 7")
    assert verdict.text.endswith("rank 3 waits for it in all_reduce #123")


def test_a_rank_that_has_left_is_not_missed():
    assert blame([note(0, waiting=False)], world_size=2, left={1}).rank == 0


def test_the_rank_with_fewer_steps_is_behind():
    verdict = blame([note(0), note(1, step=6, waiting=False)], world_size=2)
    assert verdict.rank == 1
    assert verdict.text == (
        "rank 1 (process 41 on n) has made no progress for 600 s after step 6, in step, at training/train.py:1 in "
        "train; rank 0 waits for it in all_reduce #123"
    )


def test_in_the_same_step_the_rank_with_fewer_collectives_is_behind():
    assert blame([note(0), note(1, number=122)], world_size=2).rank == 1


def test_with_as_many_asked_for_the_device_that_has_started_fewer_is_behind():
    assert blame([note(0, started=123), note(1, started=123), note(2, started=121)], world_size=3).rank == 2


def test_a_rank_that_is_in_no_collective_holds_up_those_that_are():
    assert blame([note(0), note(1, waiting=False), note(2)], world_size=3).rank == 1


def test_where_all_wait_for_the_same_the_network_is_to_blame():
    verdict = blame([note(0), note(1)], world_size=2)
    assert "all ranks wait in all_reduce #123, asked for at training/train.py:0" in verdict.text
    assert verdict.text.endswith("the network")


def test_without_a_recorder_steps_and_places_decide():
    plain = [Note(0, 7, "step", 9.0, "a"), Note(1, 6, "step", 9.0, "b")]
    assert blame(plain, world_size=2).rank == 1
    assert blame(plain, world_size=2).text.endswith("rank 0 waits for it at a")
    assert "a collective" in blame([Note(0, 7, "step", 9.0, "a", waiting=True)], world_size=2).text


def test_a_thousand_ranks_fit_into_a_line():
    text = blame([note(rank) for rank in range(1, 1024)], world_size=1024).text
    assert "ranks 1, 2, 3, 4, 5, 6, 7, 8, ... wait for it" in text
    assert len(text) < 300


def test_a_store_that_does_not_answer_points_to_its_host():
    verdict = host_silent(note(3), error="no answer within 3 s")
    assert (verdict.rank, verdict.silent) == (0, (0,))
    assert "rank 0, or the launcher on its node, is silent since step 7" in verdict.text


def test_a_note_survives_the_store():
    assert Note(*json.loads(json.dumps(note(1)))) == note(1)


def test_the_text_of_a_verdict_says_which_ranks_are_to_blame():
    behind = blame([note(0), note(12, step=6, waiting=False)], world_size=13, left=range(1, 12))
    silent = blame([note(3)], world_size=12)
    network = blame([note(0), note(1)], world_size=2)
    killed = "rank 5 (process 7 on n) gave no sign of life for 120 s (stopped) and was killed"
    texts = [behind.text, silent.text, host_silent(note(1), error="timed out").text, network.text, killed]
    expected = [(12,), (0, 1, 2, 4, 5, 6, 7, 8), (0,), (), (5,)]
    assert [blamed_ranks(f"hang: {text}; stacks of all threads: run/hangs") for text in texts] == expected
    assert blamed_ranks("exit with code 95") == ()
