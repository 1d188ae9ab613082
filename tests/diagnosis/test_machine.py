"""What is looked at on a node without its GPUs."""

from __future__ import annotations

from pathlib import Path

from training.diagnosis.findings import Level
from training.diagnosis.machine import (
    clock_is_synchronised,
    judge_kernel_log,
    look_at_cache,
    look_at_cores,
    look_at_machine,
    look_at_memory,
    look_at_ports,
    look_at_space,
)

UPTIME_S = 100_000.0
FELL_OFF = "[99000.5] NVRM: Xid (PCI:0000:41:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."


def test_a_full_file_system_is_bad_and_a_missing_one_unknown(tmp_path: Path):
    assert look_at_space(tmp_path, "temporary files", needed_gib=0.001).level is Level.OK
    short = look_at_space(tmp_path, "temporary files", needed_gib=1e9)
    assert (short.level, "are needed: remove" in short.text) == (Level.BAD, True)
    assert look_at_space(tmp_path / "none", "shared memory", needed_gib=1).level is Level.UNKNOWN


def test_the_shard_cache_counts_what_it_holds_already(tmp_path: Path):
    (tmp_path / "shard.tar").write_bytes(bytes(1000))
    assert look_at_cache(tmp_path / "not" / "yet", gib=0.001).level is Level.OK
    short = look_at_cache(tmp_path, gib=1e9)
    assert (short.level, "--cache-gib is 1e+09: lower it" in short.text) == (Level.BAD, True)


def test_little_free_memory_is_worth_a_look(tmp_path: Path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  536870912 kB\nMemAvailable:  16777216 kB\n")
    assert look_at_memory(meminfo, ranks=4).level is Level.OK
    found = look_at_memory(meminfo, ranks=8)
    assert (found.level, "16.0 GiB free of 512.0, less than 4 GiB for each of 8" in found.text) == (Level.WARNING, True)
    assert look_at_memory(tmp_path / "none", ranks=1).level is Level.UNKNOWN


def test_a_rank_with_a_single_core_is_told_what_to_ask_for():
    assert look_at_cores(5, workers=4).level is Level.OK
    found = look_at_cores(1, workers=4)
    assert (found.level, "--cpus-per-task 5, or fewer --workers" in found.text) == (Level.WARNING, True)


def test_ports_are_counted_with_their_rates(tmp_path: Path):
    for number, state in enumerate(("4: ACTIVE", "4: ACTIVE", "1: DOWN")):
        port = tmp_path / f"mlx5_{number}" / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("200 Gb/sec (4X HDR)\n")
    assert look_at_ports(tmp_path).text == "3 ports, active: 2 with 200 Gb/sec (4X HDR)"
    (tmp_path / "mlx5_2" / "ports" / "1" / "rate").unlink()
    assert look_at_ports(tmp_path).level is Level.UNKNOWN
    assert look_at_ports(tmp_path / "none").level is Level.UNKNOWN


def test_a_gpu_that_fell_off_the_bus_is_bad_for_a_day():
    found = judge_kernel_log(f"[1.0] booting\n{FELL_OFF}\n{FELL_OFF}\n", uptime_s=UPTIME_S)
    assert found.level is Level.BAD
    assert "XID 79 of 0000:41:00 (fell off the bus) x2: have the GPU reset" in found.text
    assert judge_kernel_log(FELL_OFF, uptime_s=UPTIME_S + 90_000).level is Level.OK


def test_errors_of_programs_are_not_the_nodes_and_odd_ones_are_mentioned():
    assert judge_kernel_log(FELL_OFF.replace(": 79,", ": 31,"), uptime_s=UPTIME_S).level is Level.OK
    assert judge_kernel_log(FELL_OFF.replace(": 79,", ": 94,"), uptime_s=UPTIME_S).level is Level.WARNING
    disks = "\n".join(f"[99000.0] I/O error, dev sd{letter}, sector 1" for letter in "abcde")
    assert "and 2 more" in judge_kernel_log(disks, uptime_s=UPTIME_S).text


def test_this_machine_can_be_looked_at(tmp_path: Path):
    found = {
        finding.check: finding for finding in look_at_machine(ranks=1, cache_directory=str(tmp_path), cache_gib=0.001)
    }
    assert {"shared memory", "temporary files", "memory", "load", "network ports", "kernel log"} < found.keys()
    assert clock_is_synchronised() in (True, False)
