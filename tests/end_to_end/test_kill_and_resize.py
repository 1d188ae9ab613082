"""The show of ``kill_and_resize``, in short: the long one is a command of its own."""

from __future__ import annotations

from tests.end_to_end.kill_and_resize import main


def test_a_run_that_reads_from_s3_and_is_killed_twice_has_the_samples_and_weights_of_an_undisturbed_one(capfd):
    assert main(["--kills", "2", "--seed", "3", "--skip-resize"]) == 0
    assert "samples on each rank: equal" in capfd.readouterr().out
