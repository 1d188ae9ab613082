"""The jobs that the scale benchmarks speak of, and every assumption about machines that nobody here could measure.

What is measured or counted is not in this file. A number here is published, with its source, or assumed and called so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """Between the nodes of a cluster, and between the GPUs of a node."""

    name: str
    gpus_per_node: int
    node_gbit_s: float
    """Of all adapters of a node together, one direction. Published."""
    gpu_gb_s: float
    """Bus bandwidth of an all-reduce within a node. Assumed: measured figures of NVLink 3 nodes lie around it."""

    @property
    def node_gb_s(self) -> float:
        """What a node can send, and receive, at the assumed efficiency."""
        return self.node_gbit_s / 8 * EFFICIENCY


@dataclass(frozen=True)
class Job:
    """One run at scale."""

    name: str
    model: str
    gpus: int
    batch_size: int
    """Per GPU."""
    workers: int
    samples_per_epoch: int
    """Of ``--train-num-samples``."""
    num_shards: int
    sample_kb: float
    samples_per_s: float
    """Of the whole job, published or, where it says so, scaled from what was."""
    source: str

    @property
    def global_batch(self) -> int:
        return self.gpus * self.batch_size

    @property
    def step_s(self) -> float:
        """At the published rate: with everything that kept that run waiting."""
        return self.global_batch / self.samples_per_s


EFFICIENCY = 0.8
"""Of a network's line rate that NCCL's large collectives reach. Assumed."""
HOP_S = 10e-6
"""Latency of one step of a collective between two nodes. Assumed."""
PEAK_TFLOPS = 312.0
"""A100, dense bf16. Published."""
MFU = 0.40
"""Of the towers' compute, recomputation counted as work. Assumed: LAION's run reached 0.28."""
SECONDS_OF_MTTF = 8 * 3600.0
"""Of a job on 1,024 GPUs. Published: 7.9 h on Meta's RSC (arXiv 2410.21680)."""

BOOSTER = Network("JUWELS Booster, 4 x HDR200 for 4 GPUs", gpus_per_node=4, node_gbit_s=800, gpu_gb_s=200)
EFA = Network("EFA 400 Gbit/s for 8 GPUs", gpus_per_node=8, node_gbit_s=400, gpu_gb_s=230)
SLOW = Network("200 Gbit/s for 4 GPUs (JURECA: 2 x HDR200 are 400)", gpus_per_node=4, node_gbit_s=200, gpu_gb_s=200)
NETWORKS = (BOOSTER, EFA, SLOW)

LAION_SHARDS = 231_350
LAION_CARD = "card of laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg"
XXLARGE = Job(
    name="convnext_xxlarge, Booster",
    model="convnext_xxlarge",
    gpus=1024,
    batch_size=80,
    workers=6,
    samples_per_epoch=135_646_078,
    num_shards=LAION_SHARDS,
    sample_kb=40.0,
    samples_per_s=51_000,
    source=LAION_CARD,
)
B_32_256 = Job(
    name="ViT-B-32-256, as on JURECA but 1,024 GPUs",
    model="ViT-B-32-256",
    gpus=1024,
    batch_size=896,
    workers=8,
    samples_per_epoch=1_398_270_000,
    num_shards=140_000,
    sample_kb=40.0,
    samples_per_s=1024 * 630,
    source="630 samples/s per GPU: half way between 540 and 720, derived from the JURECA run's 24 h jobs; scaled",
)
JOBS = (XXLARGE, B_32_256)

LEGS = ((1024, 80), (512, 160), (320, 256), (1088, 88))
"""(GPUs, batch per GPU) of the convnext_xxlarge run in the order in which it moved. Published: the same card."""

MODELS = ("ViT-B-32-256", "ViT-B-16", "ViT-L-14", "ViT-H-14", "convnext_xxlarge", "ViT-bigG-14")
LOCAL_BATCHES = {
    "ViT-B-32-256": 896,
    "ViT-B-16": 448,
    "ViT-L-14": 128,
    "ViT-H-14": 80,
    "convnext_xxlarge": 80,
    "ViT-bigG-14": 64,
}
"""Per GPU with 1,024 of them: the historical runs', and for the others what keeps the global batch near 80,000 or,
for the two small models, a GPU busy."""
