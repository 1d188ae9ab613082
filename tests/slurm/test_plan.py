"""The arithmetic of a job: equal to the trainer's where the trainer has one, and honest where it estimates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scale_loss import count_bytes
from models.config import PreprocessConfig, list_models
from slurm.data_facts import DataFacts, read_data_facts
from slurm.model_facts import FACTS_PATH, FoundFacts, find_facts
from slurm.plan import _TILE_BYTES, Assumptions, JobShape, Plan, choose_signal, make_plan, plan_checkpoints
from slurm.summary import _memory
from tests.factories import write_csv, write_shards
from training.cli import load_config, parse_args
from training.config import Config, LossConfig, ModelConfig
from training.data import build
from training.data.epoch import train_data_type
from training.losses.tiles import TILE_ELEMENTS
from training.phases import Phases, read_phases

RUNS = Path(__file__).resolve().parents[2] / "configs" / "runs"
DAY = 24 * 3600
LAION = DataFacts("webdataset", 135_646_078, 231_350, num_shards=231_350, first_shard="s3://b/0.tar")
SYNTHETIC = ("--dataset-type=synthetic", "--train-num-samples=100000")


def plan_of(
    config: Config,
    *,
    nodes: int = 128,
    per_node: int = 8,
    data: DataFacts = LAION,
    phases: Phases | None = None,
    first_step: int = 0,
    **assumed: object,
) -> Plan:
    shape = JobShape(nodes, per_node, DAY)
    assumptions = Assumptions(**assumed)  # type: ignore[arg-type]
    model = find_facts(config.model)
    run = {"data": data, "phases": phases, "first_step": first_step}
    return make_plan(config, shape, model=model, assumptions=assumptions, **run)  # type: ignore[arg-type]


def with_phases(config: Config, path: Path) -> Config:
    return replace(config, schedule=replace(config.schedule, phases=str(path)))


def xxlarge(**engine: object) -> Config:
    config = load_config(RUNS / "convnext-xxlarge.yaml")
    return replace(config, engine=replace(config.engine, **engine))


def flags_for(kind: str, directory: Path) -> list[str]:
    if kind == "synthetic":
        return ["--dataset-type=synthetic", "--train-num-samples=300"]
    if kind == "csv":
        return [f"--train-data={write_csv(directory, rows=30)}"]
    pattern = write_shards(directory, shards=3, samples=4)
    if kind != "manifest":
        return [f"--train-data={pattern}", *(["--dataset-resampled"] if kind == "resampled" else [])]
    (directory / "m.yaml").write_text(f"sources:\n  - {{name: a, shards: ['{pattern}']}}\n")
    return [f"--train-data-manifest={directory / 'm.yaml'}"]


@pytest.mark.parametrize("kind", ["synthetic", "csv", "shards", "resampled", "manifest"])
def test_data_is_counted_as_the_trainer_counts_it(kind, tmp_path):
    data = parse_args(flags_for(kind, tmp_path)).data
    source, num_samples, _ = build._build_source(data, preprocess=PreprocessConfig(size=(32, 32)), seed=0)
    facts = read_data_facts(data)
    assert (facts.slots, facts.num_samples, facts.kind) == (source.slots_per_epoch, num_samples, train_data_type(data))


def test_local_shards_tell_the_size_of_a_sample(tmp_path):
    data = parse_args([f"--train-data={write_shards(tmp_path, shards=3, samples=4)}"]).data
    size = sum(path.stat().st_size for path in tmp_path.glob("*.tar")) / 12
    assert read_data_facts(data).sample_bytes == pytest.approx(size)


def test_a_table_of_json_lines_has_as_many_rows_as_lines(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    facts = read_data_facts(parse_args([f"--train-data={tmp_path / 't.jsonl'}"]).data)
    assert (facts.kind, facts.num_samples) == ("jsonl", 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train-data=/no/such/{0..2}.tar"], "3 of 3 shards do not exist"),
        (["--train-data=/no/such.jsonl"], "cannot be read"),
        (["--train-data=/dev/null", "--dataset-type=jsonl"], "has no rows: correct --train-data"),
        (["--train-data=/no/such"], "Cannot tell the type"),
        (["--train-data=pipe:cat {0..9}.tar"], "number of samples in 10 shards is unknown"),
    ],
)
def test_data_that_is_not_there_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        read_data_facts(parse_args(flags).data)


def test_weights_of_a_manifest_need_resampling(tmp_path):
    pattern = write_shards(tmp_path, shards=2, samples=4)
    sources = f"sources:\n  - {{name: a, shards: ['{pattern}'], weight: 3}}\n  - {{name: b, shards: ['{pattern}']}}\n"
    (tmp_path / "m.yaml").write_text(sources)
    with pytest.raises(ValueError, match="need --dataset-resampled: pass it too"):
        read_data_facts(parse_args([f"--train-data-manifest={tmp_path / 'm.yaml'}"]).data)


def test_a_manifest_without_counts_needs_them(tmp_path):
    (tmp_path / "m.yaml").write_text("sources:\n  - {name: a, shards: ['pipe:cat {0..9}.tar']}\n")
    with pytest.raises(ValueError, match="give every source num_samples"):
        read_data_facts(parse_args([f"--train-data-manifest={tmp_path / 'm.yaml'}"]).data)


def test_data_of_the_compute_nodes_alone_is_planned_from_the_flags():
    data = parse_args(["--train-data=/nvme/{000..099}.tar::/nvme/b/{0..9}.tar", "--train-num-samples=5000"]).data
    facts = read_data_facts(data, visible=False)
    assert (facts.num_shards, facts.slots, facts.num_samples) == (110, 110, 5000)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train-data=/nvme/*.tar", "--train-num-samples=5000"], "Write a brace range"),
        (["--train-data=/nvme/{0..9}.tar"], "--data-elsewhere leaves only the flags"),
        (["--train-data=/nvme/a.csv"], "--data-elsewhere leaves only the flags"),
    ],
)
def test_data_of_the_compute_nodes_alone_must_be_told_in_full(flags, message):
    with pytest.raises(ValueError, match=message):
        read_data_facts(parse_args(flags).data, visible=False)


def test_the_historical_run_has_its_published_numbers():
    plan = plan_of(xxlarge())
    assert plan.steps is not None
    assert plan.speed is not None
    assert plan.memory is not None
    assert (plan.steps.global_batch, plan.steps.per_epoch, plan.steps.lanes) == (81_920, 1656, 49_152)
    assert plan.steps.samples == pytest.approx(34.7e9, rel=1e-3)
    # Published on JUWELS Booster: 47 to 50 samples/s a GPU; and it did fit into 40 GB.
    assert 40 < plan.speed.samples_per_s / 1024 < 55
    assert 30 < plan.memory.total < 39.4
    assert plan.speed.gbit_per_s == pytest.approx(8 * plan.speed.samples_per_s * 40e3 / 1e9)


def test_time_and_data_rate_follow_the_assumptions():
    slow, fast = (plan_of(xxlarge(), mfu=mfu, sample_kb=kb).speed for mfu, kb in ((0.1, 80.0), (0.4, 20.0)))
    assert slow is not None
    assert fast is not None
    assert slow.hours == pytest.approx(4 * fast.hours)
    assert slow.gbit_per_s == pytest.approx(fast.gbit_per_s)


def test_ddp_keeps_18_bytes_a_parameter_in_mixed_precision_and_fsdp_a_share_of_16():
    facts = find_facts(ModelConfig(model="convnext_xxlarge")).facts
    assert facts is not None
    whole, shared = (plan_of(xxlarge(fsdp=fsdp)).memory for fsdp in (False, True))
    assert whole is not None
    assert shared is not None
    assert whole.state + whole.copies == pytest.approx(18 * facts.parameters / 2**30)
    assert shared.state == pytest.approx(16 * facts.parameters / 1024 / 2**30)
    assert shared.copies < whole.copies
    assert shared.activations == whole.activations


def test_hsdp_shares_among_as_many_ranks_as_asked_for():
    within_nodes, everywhere = (plan_of(xxlarge(fsdp=True, fsdp_shard_ranks=ranks)).memory for ranks in (8, 0))
    assert within_nodes is not None
    assert everywhere is not None
    assert within_nodes.state == pytest.approx(128 * everywhere.state)


def test_locked_towers_need_no_gradients_and_no_moments():
    config = xxlarge()
    locked = plan_of(replace(config, model=replace(config.model, lock_image=True, lock_text=True))).memory
    assert locked is not None
    assert locked.weights > 4
    assert locked.moments < 0.01


def test_checkpointing_saves_what_it_promises():
    whole, less = (plan_of(xxlarge(grad_checkpointing=on), gpu="b200").memory for on in (False, True))
    assert whole is not None
    assert less is not None
    assert whole.activations > 3 * less.activations
    assert whole.loss == less.loss


def test_a_policy_that_keeps_less_than_all_is_planned_as_if_it_kept_all():
    plain = plan_of(xxlarge(grad_checkpointing=False))
    selective = plan_of(xxlarge(grad_checkpointing=True, grad_checkpointing_policy="selective"))
    assert selective.memory == plain.memory
    said = _memory(xxlarge(grad_checkpointing=True, grad_checkpointing_policy="selective"), selective, Assumptions())
    assert "(at most: as if all were kept" in said
    assert "consider --grad-checkpointing-policy full" in str(selective.remarks)


def test_texts_in_bf16_take_less_of_the_loss():
    config = xxlarge()
    plain, halved = (
        plan_of(replace(config, loss=replace(config.loss, gather_dtype=dtype))).memory for dtype in ("fp32", "bf16")
    )
    assert plain is not None
    assert halved is not None
    assert plain.loss - halved.loss == pytest.approx(2 * 1024 * 81_920 / 2**30)


@pytest.mark.parametrize("siglip", [False, True])
def test_the_loss_takes_what_its_code_is_counted_to_take(siglip):
    config = xxlarge()
    memory = plan_of(replace(config, loss=LossConfig(siglip=siglip, local_loss=not siglip))).memory
    assert memory is not None
    counted = count_bytes("SigLIP" if siglip else "CLIP", 80, 1024, world=1024) / 2**30
    assert counted < memory.loss < 1.2 * counted
    assert _TILE_BYTES == 4 * TILE_ELEMENTS


@pytest.mark.parametrize("flags", [["--precision=fp32"], ["--precision=pure_bf16"], ["--siglip", "--fsdp"]])
def test_every_precision_and_loss_has_an_estimate(flags):
    config = parse_args([*SYNTHETIC, "--model=ViT-B-32", *flags])
    memory = plan_of(config, nodes=1, data=DataFacts("synthetic", 100_000, 1000)).memory
    assert memory is not None
    assert 2 < memory.total < 20


def test_a_checkpoint_is_as_large_as_weights_and_moments():
    facts = find_facts(ModelConfig(model="convnext_xxlarge")).facts
    assert facts is not None
    plan = plan_checkpoints(xxlarge(), facts, JobShape(128, 8, DAY), lanes=49_152, assumptions=Assumptions())
    assert plan.gigabytes == pytest.approx(12 * facts.parameters / 1e9, rel=1e-3)
    assert plan.files == 2 * 27 + 4
    sharded = plan_checkpoints(xxlarge(fsdp=True), facts, JobShape(128, 8, DAY), lanes=1, assumptions=Assumptions())
    assert sharded.files == 2 * 1024 + 4


def test_rarer_failures_allow_rarer_checkpoints():
    facts = find_facts(ModelConfig(model="ViT-L-14")).facts
    assert facts is not None
    config = parse_args([*SYNTHETIC, "--model=ViT-L-14"])
    few, many = (
        plan_checkpoints(config, facts, JobShape(nodes, 8, DAY), lanes=48, assumptions=Assumptions(storage_gb_per_s=99))
        for nodes in (1, 1024)
    )
    assert many.minutes == 10 < few.minutes <= 60


def test_the_signal_comes_early_enough_for_two_saves():
    facts = find_facts(ModelConfig(model="ViT-bigG-14")).facts
    assert facts is not None
    shape = JobShape(8, 8, DAY)
    slow = Assumptions(storage_gb_per_s=0.2)
    saves = plan_checkpoints(parse_args(list(SYNTHETIC)), facts, shape, lanes=1, assumptions=slow)
    assert choose_signal(shape, checkpoints=None, step_s=0) == 300
    chosen = choose_signal(shape, checkpoints=saves, step_s=2)
    assert chosen > 60 + 2 * saves.write_s
    assert chosen % 60 == 0


@pytest.mark.parametrize(
    ("time_limit_s", "signal_before_s", "message"),
    [
        (420, None, "a time limit of 420 s is too short for one checkpoint.* --time with more than 7 minutes"),
        (DAY, 30, "--signal-before 30 is shorter than SLURM's clock"),
        (DAY, 70, "--signal-before 70 is too short for a checkpoint.* Pass 120 or more"),
    ],
)
def test_a_limit_or_a_signal_that_is_too_short_is_refused(time_limit_s, signal_before_s, message):
    with pytest.raises(ValueError, match=message):
        choose_signal(JobShape(1, 1, time_limit_s, signal_before_s), checkpoints=None, step_s=10)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fsdp", "--fsdp-shard-ranks=12"], "--fsdp-shard-ranks 12 does not divide 8 ranks"),
        (["--data-lanes=4"], "4 lanes for 8 ranks: raise --data-lanes"),
        (["--data-lanes=4096"], "--data-lanes 1000 or fewer, or --dataset-resampled"),
        (["--batch-size=20000"], "100000 samples are fewer than one global batch of 160000"),
        (["--model=ViT-bigG-14", "--batch-size=8"], "weights, gradients and moments alone take .* pass --fsdp"),
    ],
)
def test_what_does_not_fit_is_refused(flags, message):
    config = parse_args([*SYNTHETIC, "--model=ViT-B-32", *flags])
    with pytest.raises(ValueError, match=message):
        plan_of(config, nodes=1, data=DataFacts("csv", 100_000, 1000), gpu="v100-32")


def test_sums_over_too_many_ranks_in_bf16_are_refused():
    with pytest.raises(ValueError, match="--grad-reduce-dtype bf16 over 1024 ranks"):
        plan_of(xxlarge(grad_reduce_dtype="bf16"))


def test_fewer_slots_than_ranks_are_refused():
    config = parse_args([*SYNTHETIC, "--model=ViT-B-32"])
    with pytest.raises(ValueError, match="5 slots of data .* for 8 ranks: pass --dataset-resampled, use fewer ranks"):
        plan_of(config, nodes=1, data=DataFacts("csv", 100_000, 5))


def test_too_much_memory_and_too_few_workers_are_remarked_on():
    config = parse_args([*SYNTHETIC, "--model=ViT-B-32", "--dataset-type=webdataset", "--train-data=a.tar"])
    huge = replace(config, data=replace(config.data, batch_size=2000, workers=1))
    remarks = "\n".join(plan_of(huge, nodes=1).remarks)
    assert "more than the 39 GiB of a100-40: consider --grad-checkpointing, --fsdp" in remarks
    assert "consider --workers" in remarks


def test_a_run_on_cpus_has_neither_memory_nor_time():
    config = parse_args([*SYNTHETIC, "--model=demo-vit", "--device=cpu"])
    plan = plan_of(config, nodes=1, data=DataFacts("synthetic", 100_000, 1000))
    assert (plan.memory, plan.speed) == (None, None)
    assert plan.checkpoints is not None


def test_a_model_that_is_not_known_is_planned_without_its_numbers():
    config = parse_args([*SYNTHETIC, "--model=/my/own.json"])
    plan = plan_of(config, nodes=1, data=DataFacts("synthetic", 100_000, 1000))
    assert (plan.memory, plan.checkpoints, plan.speed) == (None, None, None)
    assert plan.remarks[0].startswith("size and cost of /my/own.json are not known here (it is not a built-in model)")


def test_what_the_force_flags_change_is_scaled_and_said():
    plain = find_facts(ModelConfig(model="ViT-B-16")).facts
    model = ModelConfig("ViT-B-16", force_image_size=(448,), force_patch_dropout=0.5, force_context_length=154)
    scaled, remarks = find_facts(model)
    assert plain is not None
    assert scaled is not None
    assert scaled.image_gmac == pytest.approx(2 * plain.image_gmac)
    assert scaled.text_mb == pytest.approx(2 * plain.text_mb)
    assert len(remarks) == 3


def test_phases_are_planned_one_by_one_and_memory_for_the_largest(tmp_path):
    config = parse_args(["--model=ViT-B-16", "--train-data=x.tar", "--batch-size=64", "--epochs=2"])
    whole = plan_of(config, nodes=1)
    path = tmp_path / "phases.yaml"
    path.write_text(
        "- {until_samples: 135.6e6, image_size: 112, text_length: 16, batch_size: 128}\n- {patch_dropout: 0.5}\n- {}\n"
    )
    with pytest.raises(ValueError, match=r"phase 2 has no until_samples"):
        read_phases(with_phases(config, path))
    path.write_text("- {until_samples: 135.6e6, image_size: 112, text_length: 16, batch_size: 128}\n- {}\n")
    phases = read_phases(with_phases(config, path))
    found = plan_of(config, nodes=1, phases=phases)
    assert found.steps is not None
    assert found.steps.of_phases == (-(-135_600_000 // 1024), found.steps.total - found.steps.of_phases[0])
    assert found.memory == whole.memory
    assert whole.speed is not None
    assert 0.5 < found.speed.hours / whole.speed.hours < 0.75
    assert "phase 1 of 2 (image size [112], text length 16, batch size 128): 132,422 steps of 1,024" in str(
        found.remarks
    )
    later = plan_of(config, nodes=1, phases=phases, first_step=found.steps.of_phases[0])
    assert later.speed.hours == pytest.approx(whole.speed.hours / 2, rel=0.01)
    path.write_text("- {text_length: 78}\n")
    with pytest.raises(ValueError, match="text_length 78 is more than the model's context of 77"):
        plan_of(config, nodes=1, phases=read_phases(with_phases(config, path)))


def test_every_built_in_model_is_in_the_file_of_facts():
    known = [name for name in list_models() if find_facts(ModelConfig(model=name)) != FoundFacts(None, ())]
    unknown = [name for name in known if find_facts(ModelConfig(model=name)).facts is None]
    assert all("cannot run without memory" in find_facts(ModelConfig(model=name)).remarks[0] for name in unknown)
    assert len(unknown) == 9
    assert FACTS_PATH.stat().st_size < 100_000


@pytest.mark.parametrize("name", ["demo-resnet", "ViT-B-32", "EVA02-B-16", "convnext_base", "ViT-B-16-SigLIP"])
def test_the_file_of_facts_is_up_to_date(name):
    from benchmarks.model_facts import model_facts

    facts = find_facts(ModelConfig(model=name)).facts
    assert facts is not None
    counted = model_facts(name)
    # What kernels save differs a little between versions of torch; sizes and arithmetic do not.
    for key, value in facts._asdict().items():
        expected = list(value) if isinstance(value, tuple) else value
        assert counted[key] == (pytest.approx(expected, rel=0.01) if key.endswith("_mb") else expected), key
