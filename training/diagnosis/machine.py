"""Looks at a node without its GPUs: memory, shared memory, disks, load, network ports, the kernel's log, its clock."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from training.diagnosis.findings import Finding, bad, ok, unknown, warning

GIB = 1 << 30
PORTS = "network ports"
_SHARED_MEMORY_GIB = 1.0
"""NCCL exchanges between the GPUs of a node through /dev/shm, some 10 MB for each pair of them; a container's usual
limit of 64 MiB ends it in its first collective."""
_TEMPORARY_GIB = 1.0
_MEMORY_GIB_PER_RANK = 4.0
"""What a rank with its loader workers takes at least."""
_BUSY_LOAD = 0.5
"""Load per CPU, before training has begun, from which something else must be running."""
_RECENT_S = 24 * 3600.0
_TIME_LIMIT_S = 10.0
_CLOCK_UNSYNCHRONISED = 0x0040

_BROKEN_XIDS = {
    48: "double-bit memory error",
    64: "a memory row could not be remapped",
    74: "NVLink error",
    79: "fell off the bus",
    95: "uncontained memory error",
    119: "the GPU's system processor does not answer",
    120: "error of the GPU's system processor",
    140: "uncorrected memory error",
}
"""Of the hardware. Source: NVIDIA's XID catalogue. Those of programs (13, 31, 43, 45) say nothing about a node."""
_ODD_XIDS = {
    62: "halt of the GPU's micro-controller",
    63: "a memory row was remapped",
    92: "many single-bit memory errors",
    94: "contained memory error",
}
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([^)]*)\): (\d+)")
_KERNEL_TIME = re.compile(r"^\[\s*(\d+\.\d+)\]")
_HARDWARE_ERROR = re.compile(r"\[Hardware Error\]|EDAC .*\bUE\b|I/O error, dev|blk_update_request: I/O error")


def look_at_machine(*, ranks: int, cache_directory: str | None, cache_gib: float) -> list[Finding]:
    """All of it. ``ranks`` are those of the node."""
    findings = [
        look_at_space(Path("/dev/shm"), "shared memory", needed_gib=_SHARED_MEMORY_GIB),
        look_at_space(Path(tempfile.gettempdir()), "temporary files", needed_gib=_TEMPORARY_GIB),
        look_at_memory(Path("/proc/meminfo"), ranks=ranks),
        look_at_load(),
        look_at_ports(Path("/sys/class/infiniband")),
        look_at_kernel_log(),
    ]
    if cache_directory is not None:
        findings.append(look_at_cache(Path(cache_directory), gib=cache_gib))
    return findings


def look_at_space(directory: Path, name: str, *, needed_gib: float) -> Finding:
    """Free bytes and free files of a file system."""
    if not directory.is_dir():
        return unknown(name, f"there is no {directory} here")
    try:
        space = os.statvfs(directory)
    except OSError as error:
        return bad(name, f"{directory} cannot be looked at ({error.strerror})")
    free_gib = space.f_bavail * space.f_frsize / GIB
    text = f"{directory} has {free_gib:.1f} GiB free of {space.f_blocks * space.f_frsize / GIB:.1f}"
    if free_gib < needed_gib:
        return bad(
            name, f"{text}, {needed_gib:g} GiB are needed: remove what others left there, or enlarge it", shared=True
        )
    if space.f_files and not space.f_favail:
        return bad(name, f"{text}, but it can hold no more files: remove some", shared=True)
    return ok(name, text)


def look_at_cache(directory: Path, *, gib: float) -> Finding:
    """Whether the shards that the run keeps on the node's disk (--cache-shards) fit, with those there already."""
    parent = next(path for path in (directory, *directory.parents) if path.exists())
    try:
        space = os.statvfs(parent)
        held = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) if directory.exists() else 0
    except OSError as error:
        return bad(
            "shard cache", f"{directory} cannot be looked at ({error.strerror}): correct --cache-shards", shared=True
        )
    room_gib = (space.f_bavail * space.f_frsize + held) / GIB
    text = f"{directory} has room for {room_gib:.1f} GiB of shards, --cache-gib is {gib:g}"
    if room_gib < gib:
        return bad("shard cache", f"{text}: lower it, or free the disk", shared=True)
    return ok("shard cache", text)


def look_at_memory(meminfo: Path, *, ranks: int) -> Finding:
    """What is free for new processes."""
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        total, free = (int(fields[name].split()[0]) / (1 << 20) for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return unknown("memory", f"{meminfo} does not tell")
    text = f"{free:.1f} GiB free of {total:.1f}"
    if free < _MEMORY_GIB_PER_RANK * ranks:
        needed = f"{_MEMORY_GIB_PER_RANK:g} GiB for each of {ranks} rank(s)"
        return warning("memory", f"{text}, less than {needed}: processes of another job may be left on the node")
    return ok("memory", text)


def look_at_load() -> Finding:
    """Whether something else computes here. Minutes late by its nature, so never a reason to exclude."""
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    text = f"{load:.1f} on {cpus} CPUs in the last minute"
    if load > _BUSY_LOAD * cpus:
        return warning("load", f"{text}: something else is running on the node")
    return ok("load", text)


def look_at_cores(cores: int, *, workers: int) -> Finding:
    """Whether a rank's processes have a core each. Without --cpus-per-task SLURM gives each task a single one."""
    text = f"{cores} for a rank with {workers} loader worker(s)"
    if cores < workers + 1:
        remedy = f"--cpus-per-task {workers + 1}, or fewer --workers"
        return warning("CPU cores", f"{text}: they take turns, and the GPU waits for data; {remedy}")
    return ok("CPU cores", text)


def look_at_ports(directory: Path) -> Finding:
    """InfiniBand, RoCE and EFA ports. Some are down on every node, never cabled: only the comparison of nodes tells."""
    ports = sorted(directory.glob("*/ports/*"))
    if not ports:
        return unknown(PORTS, f"none in {directory}: the network is TCP, or its driver is not loaded")
    try:
        states = [((port / "state").read_text(), (port / "rate").read_text().strip()) for port in ports]
    except OSError as error:
        return unknown(PORTS, f"{error.filename} cannot be read ({error.strerror})")
    rates = Counter(rate for state, rate in states if "ACTIVE" in state)
    active = ", ".join(f"{count} with {rate}" for rate, count in sorted(rates.items())) or "none"
    return ok(PORTS, f"{len(states)} ports, active: {active}")


def look_at_kernel_log() -> Finding:
    """Errors of the hardware that the kernel wrote down in the last 24 hours."""
    try:
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
        done = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=_TIME_LIMIT_S, errors="replace")
    except FileNotFoundError:
        return unknown("kernel log", "dmesg is not installed")
    except (OSError, subprocess.TimeoutExpired) as error:
        return unknown("kernel log", f"cannot be read ({error})")
    if done.returncode != 0:
        said = done.stderr.strip().removeprefix("dmesg: ") or f"dmesg ended with {done.returncode}"
        return unknown("kernel log", f"{said}: XIDs are seen by root, or with kernel.dmesg_restrict=0")
    return judge_kernel_log(done.stdout, uptime_s=uptime_s)


def judge_kernel_log(text: str, *, uptime_s: float) -> Finding:
    """The lines of dmesg; those older than a day are left out, whoever replaced the part meanwhile."""
    broken, odd = [], []
    for line in text.splitlines():
        stamp = _KERNEL_TIME.match(line)
        if stamp is not None and uptime_s - float(stamp[1]) > _RECENT_S:
            continue
        if found := _XID.search(line):
            device, number = found[1], int(found[2])
            if number in _BROKEN_XIDS:
                broken.append(f"XID {number} of {device} ({_BROKEN_XIDS[number]})")
            elif number in _ODD_XIDS:
                odd.append(f"XID {number} of {device} ({_ODD_XIDS[number]})")
        elif _HARDWARE_ERROR.search(line):
            odd.append(line.partition("] ")[2][:120])
    if broken:
        return bad("kernel log", f"{_counted(broken)}: have the GPU reset or replaced")
    if odd:
        return warning("kernel log", _counted(odd))
    return ok("kernel log", "no hardware errors in the last 24 hours")


def clock_is_synchronised() -> bool | None:
    """What the kernel knows: a time service keeps its clock, or none does. None where it does not say."""
    # struct timex begins with an int, 0 here (only read), and four longs; then follows the status, an int.
    fields = (ctypes.c_long * 64)()
    try:
        state = ctypes.CDLL(None).adjtimex(fields)
    except (OSError, AttributeError):
        return None
    if state < 0:
        return None
    return not ctypes.c_int.from_buffer(fields, 5 * ctypes.sizeof(ctypes.c_long)).value & _CLOCK_UNSYNCHRONISED


def _counted(texts: Sequence[str]) -> str:
    """Each once, the first three, with how often."""
    shown = [f"{text} x{texts.count(text)}" if texts.count(text) > 1 else text for text in dict.fromkeys(texts)]
    return "; ".join(shown[:3]) + (f"; and {len(shown) - 3} more" if len(shown) > 3 else "")
