"""What the doctor measures on a real GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from training.commands.doctor import main
from training.diagnosis.device_speed import check_products, measure_device
from training.diagnosis.findings import Level
from training.diagnosis.nvidia import look_at_gpus
from training.distributed.link_rates import LinkRates

pytestmark = pytest.mark.gpu


def test_a_good_gpu_is_exact_and_has_rates(device: torch.device) -> None:
    findings, rates = measure_device(device, seconds=0.5)
    assert [finding.level for finding in findings] == [Level.OK, Level.OK], findings
    assert [rate.check for rate in rates] == ["compute", "host to device", "device to host"]
    assert all(rate.value > 1 and torch.cuda.get_device_name(device) in rate.kind for rate in rates)


def test_one_wrong_element_is_found_on_the_gpu(device: torch.device) -> None:
    def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = left @ right
        product[4000, 4000] += 1
        return product

    finding = check_products(device, "GPU 0", seconds=0.1, multiply=multiply)
    assert (finding.level, "in 1 row(s), e.g. 4000" in finding.text) == (Level.BAD, True)


def test_memory_that_is_taken_is_seen(device: torch.device) -> None:
    free, total = torch.cuda.mem_get_info(device)
    taken = torch.empty(int(free - 0.85 * total), dtype=torch.uint8, device=device)
    (memory, _), _ = measure_device(device, seconds=0.05)
    assert (memory.check, memory.level) == ("GPU memory", Level.BAD)
    del taken


def test_the_tool_and_torch_agree_on_the_gpus(device: torch.device) -> None:
    findings, facts = look_at_gpus()
    assert findings[0].level is not Level.BAD, findings
    assert torch.cuda.get_device_name(device) in facts.get("GPUs", torch.cuda.get_device_name(device))


def test_a_group_of_nccl_is_made_adds_up_and_ends(device: torch.device) -> None:
    links = LinkRates(HashStore(), rank=0, device=device, backend="nccl", num_bytes=1 << 24)
    assert links.measure("alone", [0], timeout_s=30) == 0.0  # nothing has to travel


def test_the_command_examines_a_machine_with_a_gpu(device: torch.device, tmp_path: Path, capsys) -> None:
    assert main(["--quick", f"--run={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "h2d GB/s" in shown
    assert "matrix product: GPU 0:" in shown
