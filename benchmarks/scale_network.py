"""Bytes that a step sends between 1,024 GPUs, by model and kind of data parallelism, and how long they take.

    python -m benchmarks.scale_network

Bytes are counted (scale_rank shows that the real step sends just these). Times are arithmetic: a ring over nodes, at
the line rates, efficiency and latency of scale_jobs. All GPUs of a node share its adapters.

    all-reduce of S       2 S (N-1)/N per node      all-gather, reduce-scatter of S in all      S (N-1)/N per node
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import nn

from benchmarks.scale_jobs import HOP_S, JOBS, LOCAL_BATCHES, MFU, MODELS, NETWORKS, PEAK_TFLOPS, Network
from benchmarks.scale_report import Result, Tables, num_bytes, run_benchmark, seconds, table
from models.config import load_model_config
from models.factory import build_model
from slurm.model_facts import find_facts
from training.config import ModelConfig
from training.distributed.parallelize import tower_blocks

NAME = "scale_network"
WORLD = 1024
_BUCKET_BYTES = 25 * 2**20
"""Of DDP: torch's default."""
_VITALS_BYTES = 4 * 17
"""What the guard sums in a step; scale_rank counts it."""
_BACKWARD_SHARE = 2 / 3
"""Of the compute of a step without recomputation: what the exchange of gradients hides behind."""
_SHARDED_RING = 8
"""Ranks that share a copy with HSDP: a node's, or two of the smaller ones'."""


class Traffic(NamedTuple):
    """Of one step, bytes of whole tensors."""

    gradients: int
    """fp32."""
    weights_half: int
    """One copy in bf16, as FSDP gathers it."""
    padded_share: float
    """FSDP over all ranks cuts rows: a tensor of fewer rows than ranks is sent as if it had as many."""
    texts: int
    """fp32 features of all ranks' texts; gathered forward, their gradients reduce-scattered backward."""
    normalisers: int
    """Of CLIP's softmax over images: for every text a maximum and a sum, one all-reduce each. SigLIP has none."""
    vitals: int


class Compute(NamedTuple):
    """Of one step, without recomputation."""

    step_s: float
    image_forward_s: float
    """What the gather of texts hides behind; its backward pass is twice as long, and hides what comes back."""


def measure(*, small: bool = False) -> Result:
    """Every model on every network."""
    models = ("demo-vit",) if small else MODELS
    rows = [measure_model(model, LOCAL_BATCHES.get(model, 8)) for model in models]
    published = [
        {"job": job.name, "published_step_s": job.step_s, "source": job.source} for job in JOBS if job.model in models
    ]
    return {
        "world": WORLD,
        "assumed": {"mfu": MFU, "peak_tflops": PEAK_TFLOPS, "hop_s": HOP_S, "backward_share": _BACKWARD_SHARE},
        "models": rows,
        "published": published,
    }


def measure_model(model: str, batch_size: int) -> dict[str, Any]:
    """From the facts that submitting a job uses too."""
    facts = find_facts(ModelConfig(model=model)).facts
    assert facts is not None
    plain = build_model(load_model_config(model), device="meta")
    blocks = len(tower_blocks(plain))
    traffic = Traffic(
        gradients=4 * facts.parameters,
        weights_half=2 * facts.parameters,
        padded_share=padded_elements(plain, WORLD) / facts.parameters,
        texts=WORLD * batch_size * facts.embed_dim * 4,
        normalisers=WORLD * batch_size * 2 * 4,
        vitals=_VITALS_BYTES,
    )
    train_flops = 3 * 2 * facts.gmac * 1e9 * batch_size
    compute_s = train_flops / (PEAK_TFLOPS * 1e12 * MFU)
    compute = Compute(compute_s, compute_s / 3 * facts.image_gmac / facts.gmac)
    times = {network.name: network_times(traffic, network, blocks=blocks, compute=compute) for network in NETWORKS}
    return {
        "model": model,
        "batch_size": batch_size,
        "parameters": facts.parameters,
        "blocks": blocks,
        "train_tflop": round(train_flops / 1e12, 2),
        "compute_s": compute.step_s,
        "image_forward_s": compute.image_forward_s,
        "traffic": traffic._asdict(),
        "networks": times,
    }


def padded_elements(model: nn.Module, ranks: int) -> int:
    """What FSDP gathers of a model: rows rounded up to a multiple of the ranks; scalars stay whole."""
    shapes = [parameter.shape for parameter in model.parameters() if parameter.ndim > 0]
    return sum(-(-shape[0] // ranks) * ranks * shape[1:].numel() for shape in shapes)


def network_times(traffic: Traffic, network: Network, *, blocks: int, compute: Compute) -> dict[str, float]:
    """Seconds of each exchange, and what of them the step waits for."""
    nodes = WORLD // network.gpus_per_node
    ddp_s = all_reduce_s(traffic.gradients, network, nodes=nodes, messages=-(-traffic.gradients // _BUCKET_BYTES))
    volume = traffic.padded_share * (2 * traffic.weights_half + traffic.gradients)
    fsdp_s = gather_s(volume, network, nodes=nodes, messages=3 * blocks)
    there_s = back_s = gather_s(traffic.texts, network, nodes=nodes, messages=1)
    normalisers_s = all_reduce_s(traffic.normalisers, network, nodes=nodes, messages=2)
    vitals_s = 2 * math.log2(nodes) * HOP_S
    # Texts there behind the image tower. Back, gradients of weights queue up behind those of texts, for which the text
    # tower's backward pass waits.
    ahead_s = max(0.0, there_s - compute.image_forward_s)
    behind_s = max(0.0, back_s - 2 * compute.image_forward_s, back_s + ddp_s - _BACKWARD_SHARE * compute.step_s)
    return {
        "ddp_s": ddp_s,
        "fsdp_s": fsdp_s,
        "hsdp_s": _hsdp_s(traffic, network, nodes=nodes, blocks=blocks),
        "texts_s": there_s + back_s,
        "normalisers_s": normalisers_s,
        "vitals_s": vitals_s,
        "exposed_s": ahead_s + behind_s + normalisers_s + vitals_s,
        "exposed_fsdp_s": max(0.0, fsdp_s + there_s + back_s - compute.step_s) + normalisers_s + vitals_s,
    }


def all_reduce_s(num_bytes: float, network: Network, *, nodes: int, messages: int) -> float:
    """The slower of the adapters and the links within the node; a tree's latency for each message."""
    between = 2 * num_bytes * (nodes - 1) / nodes / (network.node_gb_s * 1e9)
    within = 2 * num_bytes * (network.gpus_per_node - 1) / network.gpus_per_node / (network.gpu_gb_s * 1e9)
    return max(between, within) + messages * 2 * math.log2(nodes) * HOP_S


def gather_s(num_bytes: float, network: Network, *, nodes: int, messages: int) -> float:
    """All-gather or reduce-scatter of so many bytes in all; a ring's latency for each message."""
    between = num_bytes * (nodes - 1) / nodes / (network.node_gb_s * 1e9)
    within = num_bytes * (network.gpus_per_node - 1) / network.gpus_per_node / (network.gpu_gb_s * 1e9)
    return max(between, within) + messages * (nodes - 1) * HOP_S


def _hsdp_s(traffic: Traffic, network: Network, *, nodes: int, blocks: int) -> float:
    """Weights and gradients within a copy (one node, or two), then the sums of the copies' rows over all of them."""
    copy_nodes = max(1, _SHARDED_RING // network.gpus_per_node)
    volume = 2 * traffic.weights_half + traffic.gradients
    if copy_nodes == 1:
        in_copy = volume * (_SHARDED_RING - 1) / _SHARDED_RING / (network.gpu_gb_s * 1e9)
    else:
        in_copy = gather_s(volume, network, nodes=copy_nodes, messages=3 * blocks)
    copies = WORLD // _SHARDED_RING
    shares = traffic.gradients / copy_nodes  # of one copy, the rows that this node's adapters carry
    return (
        in_copy
        + 2 * shares * (copies - 1) / copies / (network.node_gb_s * 1e9)
        + blocks * (2 * math.log2(copies) * HOP_S)
    )


def tables(result: Result) -> Tables:
    """Markdown by name."""
    return {"network_bytes": _bytes_table(result), "network_times": _times_table(result)}


def _bytes_table(result: Result) -> str:
    body = []
    for row in result["models"]:
        traffic = row["traffic"]
        sharded = 2 * traffic["weights_half"] + traffic["gradients"]
        padded = traffic["padded_share"] * sharded
        body.append(
            [
                row["model"],
                f"{row['parameters'] / 1e6:,.0f} M",
                row["batch_size"],
                num_bytes(traffic["gradients"]),
                num_bytes(sharded),
                num_bytes(padded),
                num_bytes(traffic["texts"]),
                num_bytes(traffic["normalisers"]),
                f"{traffic['vitals']} B",
            ]
        )
    header = ["model", "parameters", "b", "DDP: gradients", "HSDP: weights twice, gradients", "FSDP: padded"]
    return table([*header, "loss: texts, each way", "CLIP: normalisers", "guard"], body)


def _times_table(result: Result) -> str:
    body = []
    for row in result["models"]:
        for network, times in row["networks"].items():
            body.append(
                [
                    row["model"],
                    network,
                    seconds(row["compute_s"]),
                    *(seconds(times[name]) for name in ("ddp_s", "hsdp_s", "fsdp_s", "texts_s", "normalisers_s")),
                    seconds(times["exposed_s"]),
                    f"{100 * times['exposed_s'] / (times['exposed_s'] + row['compute_s']):.0f} %",
                ]
            )
    header = ["model", "network", f"compute at {100 * result['assumed']['mfu']:.0f} % MFU", "DDP", "HSDP-8", "FSDP"]
    return table([*header, "texts, both ways", "normalisers", "exposed with DDP", "of the step"], body)


if __name__ == "__main__":
    run_benchmark(NAME, measure, tables)
