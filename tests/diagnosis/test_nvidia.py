"""What nvidia-smi says, and what is made of it. The tool is a script that answers as the real one does."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.diagnosis import nvidia
from training.diagnosis.findings import Finding, Level
from training.diagnosis.nvidia import look_at_gpus

GOOD = "0, NVIDIA H100, 00000000:41:00.0, 550.54, Enabled, 0, 0, No, 0x0000000000000000, 1755, 1980, 61, 650.1, 16, 16"
REMAPPED = "00000000:41:00.0, 0, 0, 0, 0"


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes an nvidia-smi with these answers; the findings and facts that follow from them."""

    def make(gpus: str, remapped: str = REMAPPED, *, script: str = "") -> tuple[list[Finding], dict[str, str]]:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(
            f"#!/bin/bash\n{script}\ncase $1 in --query-gpu=*) echo '{gpus}';; *) echo '{remapped}';; esac\n"
        )
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return look_at_gpus()

    return make


def test_healthy_gpus_are_counted(answer):
    findings, facts = answer(f"{GOOD}\n1{GOOD[1:]}")
    assert facts == {"GPUs": "2 x NVIDIA H100", "GPU driver": "550.54"}
    (finding,) = findings
    assert (finding.level, finding.text) == (Level.OK, "2 x NVIDIA H100; ECC on, no errors, up to 61 degrees")


@pytest.mark.parametrize(
    ("gpus", "remapped", "level", "text"),
    [
        (GOOD.replace("Enabled, 0", "Enabled, 3"), REMAPPED, Level.BAD, "3 uncorrected since the last reset"),
        (GOOD.replace("0, No", "5000, No"), REMAPPED, Level.WARNING, "5000 corrected"),
        (GOOD.replace("No", "Yes"), REMAPPED, Level.BAD, "pages wait to be retired"),
        (GOOD, "00000000:41:00.0, 0, 1, 1, 0", Level.BAD, "rows wait to be remapped: have it reset"),
        (GOOD, "00000000:41:00.0, 0, 1, 0, 1", Level.BAD, "could not be remapped: have it replaced"),
        (GOOD, "00000000:41:00.0, 0, 2, 0, 0", Level.WARNING, "2 rows were remapped"),
        (GOOD.replace("0x0000000000000000", "0x48"), REMAPPED, Level.BAD, "thermal slowdown, 1755 of 1980 MHz at 61"),
        (GOOD.replace("0x0000000000000000", "0x24"), REMAPPED, Level.WARNING, "software thermal slowdown"),
        (GOOD.replace(" 16, 16", " 8, 16"), REMAPPED, Level.WARNING, "8 of 16 PCIe lanes"),
    ],
)
def test_what_is_wrong_with_a_gpu_is_said_with_its_place(answer, gpus, remapped, level, text):
    finding = next(finding for finding in answer(gpus, remapped)[0] if finding.level is level)
    assert text in finding.text
    assert "00000000:41:00.0" in finding.text


def test_a_power_cap_and_what_is_not_available_are_normal(answer):
    old = GOOD.replace("Enabled, 0, 0, No", "[N/A], [N/A], [N/A], [N/A]").replace("0x0000000000000000", "0x4")
    (finding,) = answer(old)[0]
    assert (finding.level, "ECC off or not there" in finding.text) == (Level.OK, True)


def test_fields_that_a_version_does_not_know_are_left_out(answer):
    said = 'Field "retired_pages.pending" is not a valid field to query.'
    refuse = f"if [[ $1 == *retired_pages* ]]; then echo '{said}'; exit 2; fi"
    (finding,) = answer(GOOD.replace("No, ", ""), script=refuse)[0]
    assert finding.level is Level.OK


def test_a_driver_that_fails_or_hangs_is_bad(answer, monkeypatch):
    (lost,) = answer(GOOD, script="echo 'GPU is lost.  Reboot the system'; exit 15")[0]
    assert (lost.level, "ended with 15: GPU is lost. Reboot the system" in lost.text) == (Level.BAD, True)
    monkeypatch.setattr(nvidia, "_TIME_LIMIT_S", 0.3)
    (hung,) = answer(GOOD, script="exec sleep 30")[0]
    assert (hung.level, "does not answer within 0.3 s" in hung.text) == (Level.BAD, True)
    (none,) = answer("", script="exit 0")[0]
    assert (none.level, "lists no GPU" in none.text) == (Level.BAD, True)


def test_older_gpus_have_no_rows_to_remap(answer):
    (finding,) = answer(GOOD, script="[[ $1 == *remapped* ]] && exit 2")[0]
    assert finding.level is Level.OK


def test_without_the_tool_nothing_is_claimed(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,), facts = look_at_gpus()
    assert (finding.level, facts) == (Level.UNKNOWN, {})
