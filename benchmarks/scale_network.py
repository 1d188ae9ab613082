"""Bytes that a step sends between 1,024 GPUs, by model and kind of data parallelism, and how long they take.

    python -m benchmarks.scale_network

Bytes are counted (scale_rank shows that the real step sends just these). Times are arithmetic: a ring over nodes, at
the line rates, efficiency and latency of scale_jobs. All GPUs of a node share its adapters.

    all-reduce of S       2 S (N-1)/N per node      all-gather, reduce-scatter of S in all      S (N-1)/N per node

What the step waits for, with texts encoded first:

    DDP     texts beyond the image tower; gradients beyond the backward pass; the last bucket, which nothing hides
    HSDP    the same, with the weights outside of blocks as the last group
    FSDP    texts both ways in full: its groups are the texts' communicator, and blocks queue up behind them
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.scale_jobs import HOP_S, JOBS, LOCAL_BATCHES, MFU, MODELS, NETWORKS, PEAK_TFLOPS, Network
from benchmarks.scale_report import Result, Tables, num_bytes, run_benchmark, seconds, table
from models.clip import Clip
from models.config import load_model_config
from models.factory import build_model
from slurm.model_facts import find_facts
from training.config import ModelConfig
from training.distributed.gradient_exchange import bucket_cap_mib
from training.distributed.parallelize import tower_blocks

NAME = "scale_network"
WORLD = 1024
_RANKS = (16, 64, 256, WORLD)
"""At which the order of the towers is judged."""
_DEFAULT_BUCKET, _FIRST_BUCKET = 25 * 2**20, 2**20
"""Of torch's DDP, where ``bucket_cap_mib`` leaves the choice to it."""
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
    buckets: int
    """Of DDP."""
    last_bucket: int
    """Bytes of gradients that come when the backward pass is over: with the token embedding in it."""
    last_bucket_images_first: int
    """As it would be if images were encoded first, and texts went backward first."""
    outside_blocks: int
    """fp32 gradients of FSDP's last group."""


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
    buckets, images_first = (ddp_buckets(plain, image_hw=facts.image_hw, images_first=order) for order in (False, True))
    traffic = Traffic(
        gradients=4 * facts.parameters,
        weights_half=2 * facts.parameters,
        padded_share=padded_elements(plain, WORLD) / facts.parameters,
        texts=WORLD * batch_size * facts.embed_dim * 4,
        normalisers=WORLD * batch_size * 2 * 4,
        vitals=_VITALS_BYTES,
        buckets=len(buckets),
        last_bucket=buckets[-1],
        last_bucket_images_first=images_first[-1],
        outside_blocks=4 * (facts.parameters - facts.block_parameters),
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
        "saved_by_texts_first": {
            network.name: {str(ranks): saved_s(traffic, network, ranks=ranks, compute=compute) for ranks in _RANKS}
            for network in NETWORKS
        },
    }


def ddp_buckets(model: Clip, *, image_hw: tuple[int, int], images_first: bool = False) -> list[int]:
    """Bytes of DDP's buckets, in the order in which it sends them: gradients fill one until it has its size.

    Args:
        model: on ``meta``.
        images_first: as if the image tower were the first one forward, and so the last one backward.
    """
    cap = bucket_cap_mib(model)
    limits = [_FIRST_BUCKET, _DEFAULT_BUCKET] if cap is None else [cap * 2**20]
    sizes = [0]
    for nbytes in _gradients_in_order(model, image_hw, images_first=images_first):
        if sizes[-1] >= limits[min(len(sizes), len(limits)) - 1]:
            sizes.append(0)
        sizes[-1] += nbytes
    return sizes


def _gradients_in_order(model: Clip, image_hw: tuple[int, int], *, images_first: bool) -> list[int]:
    """Bytes of each, as the backward pass brings them: it runs, on tensors without memory."""
    found: list[int] = []
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda parameter: found.append(parameter.nbytes))
        for parameter in model.parameters()
    ]
    images = torch.empty(1, 3, *image_hw, device="meta")
    texts = torch.zeros(1, model.context_length, dtype=torch.int64, device="meta")
    towers = [partial(model.encode_text, texts), partial(model.encode_image, images)]
    first, second = (tower() for tower in (reversed(towers) if images_first else towers))
    ((first * second).sum() * model.logit_scale).backward()
    model.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    return found


def padded_elements(model: nn.Module, ranks: int) -> int:
    """What FSDP gathers of a model: rows rounded up to a multiple of the ranks; scalars stay whole."""
    shapes = [parameter.shape for parameter in model.parameters() if parameter.ndim > 0]
    return sum(-(-shape[0] // ranks) * ranks * shape[1:].numel() for shape in shapes)


def network_times(traffic: Traffic, network: Network, *, blocks: int, compute: Compute) -> dict[str, float]:
    """Seconds of each exchange, and what of them the step waits for."""
    nodes = WORLD // network.gpus_per_node
    ddp_s = all_reduce_s(traffic.gradients, network, nodes=nodes, messages=traffic.buckets)
    hsdp_s = _hsdp_s(traffic, network, blocks=blocks)
    volume = traffic.padded_share * (2 * traffic.weights_half + traffic.gradients)
    fsdp_s = gather_s(volume, network, nodes=nodes, messages=3 * blocks)
    one_way_s = gather_s(traffic.texts, network, nodes=nodes, messages=1)
    normalisers_s = all_reduce_s(traffic.normalisers, network, nodes=nodes, messages=2)
    vitals_s = 2 * math.log2(nodes) * HOP_S
    tail_s = all_reduce_s(traffic.last_bucket, network, nodes=nodes, messages=1)
    group_tail_s = gather_s(traffic.outside_blocks, network, nodes=nodes, messages=1)
    copies_tail_s = _sum_of_copies_s(traffic.outside_blocks, network)
    copies_tail_s += _in_copy_s(traffic.outside_blocks, network, messages=1)
    always_s = normalisers_s + vitals_s
    # FSDP's blocks of the image tower are gathered by the communicator of the texts, behind them, in both passes.
    fsdp_exposed_s = 2 * one_way_s + max(0.0, fsdp_s - group_tail_s - compute.step_s) + group_tail_s
    # HSDP's groups are others, but the adapters are the same.
    beyond_tower_s = max(0.0, one_way_s - compute.image_forward_s) + max(0.0, one_way_s - 2 * compute.image_forward_s)
    hsdp_beyond_s = max(beyond_tower_s, hsdp_s - copies_tail_s + 2 * one_way_s - compute.step_s)
    return {
        "ddp_s": ddp_s,
        "fsdp_s": fsdp_s,
        "hsdp_s": hsdp_s,
        "texts_s": 2 * one_way_s,
        "normalisers_s": normalisers_s,
        "vitals_s": vitals_s,
        "tail_s": tail_s,
        "exposed_s": _exposed_texts_first_s(ddp_s - tail_s, one_way_s, compute) + tail_s + always_s,
        "exposed_hsdp_s": hsdp_beyond_s + copies_tail_s + always_s,
        "exposed_fsdp_s": fsdp_exposed_s + always_s,
    }


def saved_s(traffic: Traffic, network: Network, *, ranks: int, compute: Compute) -> float:
    """What a step with DDP waits less because texts are encoded first; negative where the larger tail costs more.

    With images first the loss waits for the texts, and the text tower's backward pass, then the first, for their
    gradients.
    """
    nodes = max(1, ranks // network.gpus_per_node)
    one_way_s = gather_s(traffic.texts * ranks / WORLD, network, nodes=nodes, messages=1)
    ddp_s = all_reduce_s(traffic.gradients, network, nodes=nodes, messages=traffic.buckets)
    tail_s = all_reduce_s(traffic.last_bucket, network, nodes=nodes, messages=1)
    small_tail_s = all_reduce_s(traffic.last_bucket_images_first, network, nodes=nodes, messages=1)
    beyond_s = max(0.0, ddp_s - small_tail_s - _BACKWARD_SHARE * compute.step_s)
    images_first_s = 2 * one_way_s + beyond_s + small_tail_s
    return images_first_s - _exposed_texts_first_s(ddp_s - tail_s, one_way_s, compute) - tail_s


def _exposed_texts_first_s(buckets_s: float, one_way_s: float, compute: Compute) -> float:
    """Texts beyond the image tower in both passes, and all buckets but the last beyond the backward pass.

    Back, gradients of weights queue up behind those of texts, for which the text tower's backward pass waits.
    """
    ahead_s = max(0.0, one_way_s - compute.image_forward_s)
    behind_s = max(one_way_s - 2 * compute.image_forward_s, one_way_s + buckets_s - _BACKWARD_SHARE * compute.step_s)
    return ahead_s + max(0.0, behind_s)


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


def _hsdp_s(traffic: Traffic, network: Network, *, blocks: int) -> float:
    """Weights and gradients within a copy (one node, or two), then the sums of the copies' rows over all of them."""
    in_copy_s = _in_copy_s(2 * traffic.weights_half + traffic.gradients, network, messages=3 * blocks)
    latency_s = (blocks - 1) * 2 * math.log2(WORLD // _SHARDED_RING) * HOP_S
    return in_copy_s + _sum_of_copies_s(traffic.gradients, network) + latency_s


def _in_copy_s(volume: float, network: Network, *, messages: int) -> float:
    """All-gathers and reduce-scatters among the ranks that share a copy."""
    copy_nodes = max(1, _SHARDED_RING // network.gpus_per_node)
    if copy_nodes == 1:
        return volume * (_SHARDED_RING - 1) / _SHARDED_RING / (network.gpu_gb_s * 1e9)
    return gather_s(volume, network, nodes=copy_nodes, messages=messages)


def _sum_of_copies_s(num_bytes: float, network: Network) -> float:
    """All-reduce of one message over the copies of HSDP: of its bytes, the rows that a node's adapters carry."""
    copies, copy_nodes = WORLD // _SHARDED_RING, max(1, _SHARDED_RING // network.gpus_per_node)
    between = 2 * num_bytes / copy_nodes * (copies - 1) / copies / (network.node_gb_s * 1e9)
    return between + 2 * math.log2(copies) * HOP_S


def tables(result: Result) -> Tables:
    """Markdown by name."""
    return {
        "network_bytes": _bytes_table(result),
        "network_times": _times_table(result),
        "network_order": _order_table(result),
    }


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
                    *(_exposed(times[name], row["compute_s"]) for name in _EXPOSED),
                ]
            )
    header = ["model", "network", f"compute at {100 * result['assumed']['mfu']:.0f} % MFU", "DDP", "HSDP-8", "FSDP"]
    return table([*header, "texts, both ways", "normalisers", *_EXPOSED.values()], body)


_EXPOSED = {"exposed_s": "exposed with DDP", "exposed_hsdp_s": "with HSDP-8", "exposed_fsdp_s": "with FSDP"}


def _exposed(value: float, compute_s: float) -> str:
    return f"{seconds(value)}, {100 * value / (value + compute_s):.1f} %"


def _order_table(result: Result) -> str:
    body = [
        [
            row["model"],
            network,
            *(f"{row['traffic'][name] / 2**20:.0f}" for name in ("last_bucket_images_first", "last_bucket")),
            seconds(row["networks"][network]["tail_s"]),
            *(f"{1e3 * value:+.1f}" for value in saved.values()),
        ]
        for row in result["models"]
        for network, saved in row["saved_by_texts_first"].items()
    ]
    header = ["model", "network", "last bucket, MiB, images first", "texts first", f"its time on {WORLD:,} ranks"]
    return table([*header, *(f"texts first saves on {ranks:,}, ms" for ranks in _RANKS)], body)


if __name__ == "__main__":
    run_benchmark(NAME, measure, tables)
