"""Two runs that OpenCLIP is known for start by their published lines: JURECA's batch script and Stability's srun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.cluster.cluster import Cluster
from tests.factories import write_shards

JURECA = r"""#!/bin/bash -x
#SBATCH --nodes=24
#SBATCH --gres=gpu:4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
source /path/miniconda/bin/activate
export CUDA_VISIBLE_DEVICES=0,1,2,3
export MASTER_PORT=12802
master_addr=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR=$master_addr"i"
echo "MASTER_ADDR="$MASTER_ADDR
srun --cpu-bind=v --cpus-per-task=12 python -u -m training.main --aug-cfg scale='(0.4, 1.0)' color_jitter='(0.32, 0.32, 0.32, 0.08)' color_jitter_prob=0.8 gray_scale_prob=0.2 use_timm=True \
--save-frequency 1 \
--zeroshot-frequency 1 \
--dataset-type webdataset \
--train-data '/path/to/data' \
--report-to tensorboard \
--train-num-samples 1398270000 \
--warmup 2000 \
--batch-size 896 \
--epochs 24 \
--workers 8 \
--model ViT-B-32-256 \
--logs logs \
--seed 0 \
--ddp-static-graph \
--local-loss \
--gather-with-grad \
--lr 0.001 \
--log-every-n-steps 20 \
--save-most-recent \
--resume latest \
--grad-checkpointing \
--precision amp_bfloat16 \
--beta1 0.9 \
--beta2 0.95 \
--wd 0.2
"""  # noqa: E501 - as published
"""ViT-B-32-256 on DataComp-1B; hosts with the suffix ``i``, which the sandbox's nodes answer to as well."""
STABILITY = r"""srun --cpu_bind=v --accel-bind=gn python -m training.main \
--save-frequency 1 \
--name "xxlarge-2b-81920-bf16" \
--resume "latest" \
--logs "/runs" \
--log-every-n-steps 50 \
--train-data="pipe:aws s3 cp s3://laion5b/laion2B-data/{000000..231349}.tar -" \
--train-num-samples 135646078 \
--dataset-type webdataset \
--warmup 10000 \
--batch-size=80 \
--epochs=256 \
--dataset-resampled \
--aug-cfg use_timm=True scale='(0.33, 1.0)' re_prob=0.35 \
--precision amp_bfloat16 \
--grad-clip-norm 5.0 \
--lr 1e-3 \
--workers=6 \
--beta2 0.98 \
--model "convnext_xxlarge" \
--seed 0 \
--ddp-static-graph \
--local-loss \
--gather-with-grad \
--grad-checkpointing \
--report-to "tensorboard"
"""
"""convnext_xxlarge on LAION-2B; published without the batch script around it, which set no MASTER_ADDR."""
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2}
VIT = {"image_size": 16, "layers": 2, "width": 16, "patch_size": 8, "head_width": 8}
CONVNEXT = {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 64}


def adapt(script: str, changes: dict[str, str]) -> str:
    """The script with each of these texts replaced; each stands in it once."""
    for text, replacement in changes.items():
        assert script.count(text) == 1, text
        script = script.replace(text, replacement)
    return script


def write_model(directory: Path, name: str, vision: dict[str, Any]) -> str:
    """A small model of the same kind and the same name."""
    path = directory / f"{name}.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}))
    return str(path)


def test_the_jureca_script_trains(cluster: Cluster) -> None:
    data = write_shards(cluster.directory / "data", shards=4, samples=20)
    script = adapt(
        JURECA,
        {
            "--nodes=24": "--nodes=2",
            "--gres=gpu:4": "--gres=gpu:2",
            "--ntasks-per-node=4": "--ntasks-per-node=2",
            "source /path/miniconda/bin/activate\n": "",
            "/path/to/data": data,
            "1398270000": "64",
            "--batch-size 896": "--batch-size 8",
            "--epochs 24": "--epochs 1",
            "--workers 8": "--workers 1",
            "--model ViT-B-32-256": f"--model {write_model(cluster.directory, 'ViT-B-32-256', VIT)}",
        },
    )
    job = cluster.submit(script)
    job.wait_for("COMPLETED", timeout_s=300)
    (run,) = (cluster.directory / "logs").iterdir()
    assert f"Finished {run.name}: see" in job.log
    assert "MASTER_ADDR=node0i" in job.log
    assert "global batch 32 = 8 per rank x 4 ranks" in job.log
    assert {path.name for path in (run / "checkpoints").glob("*.pt")} >= {"epoch_1.pt", "epoch_latest.pt"}


def test_the_stability_line_trains_and_resumes_without_a_master_address(cluster: Cluster) -> None:
    data = write_shards(cluster.directory / "data", shards=4, samples=20)
    line = adapt(
        STABILITY,
        {
            '"/runs"': f'"{cluster.directory}/runs"',
            "aws s3 cp s3://laion5b/laion2B-data/{000000..231349}.tar -": f"cat {data}",
            "135646078": "64",
            "--batch-size=80": "--batch-size=8",
            "--workers=6": "--workers=1",
            '"convnext_xxlarge"': f'"{write_model(cluster.directory, "convnext_xxlarge", CONVNEXT)}"',
        },
    )
    run = cluster.directory / "runs/xxlarge-2b-81920-bf16"
    # The same line twice; each start is asked to stop when it has finished an epoch.
    script = f"""#!/bin/bash
    for step in 0 1; do
        before=$(ls {run}/checkpoints/epoch_*.pt 2>/dev/null | wc -l)
        {line.rstrip()} &
        while (( $(ls {run}/checkpoints/epoch_*.pt 2>/dev/null | wc -l) <= before )); do
            sleep 0.5
            kill -0 $! || exit 1
        done
        scancel --signal=USR1 "$SLURM_JOB_ID.$step"
        wait $! || exit 1
    done
    """
    job = cluster.submit(script, "--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2")
    job.wait_for("COMPLETED", timeout_s=400)
    assert job.log.count("global batch 32 = 8 per rank x 4 ranks") == 2
    first, second = [json.loads(text)["step"] for text in (run / "starts.jsonl").read_text().splitlines()]
    assert first == 0 < second
    assert f"Resumed from {run}/checkpoints/step_{second:08d} at step {second} " in job.log
