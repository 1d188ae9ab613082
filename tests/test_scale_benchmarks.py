"""The scale benchmarks: what they count is what the real code does, and the document says what they found."""

from __future__ import annotations

import gc
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks import (
    executed_loss,
    scale_all,
    scale_checkpoints,
    scale_goodput,
    scale_lanes,
    scale_loss,
    scale_network,
    scale_rank,
    scale_report,
)
from benchmarks.scale_goodput import Plan
from benchmarks.scale_jobs import BOOSTER, LEGS, NETWORKS, XXLARGE
from benchmarks.scale_memory import full_size
from benchmarks.scale_network import Compute, Traffic, network_times, saved_s
from benchmarks.scale_rank import Setting, exchange
from benchmarks.scale_world import LiveMemory, fake_world
from models.config import load_model_config
from models.factory import build_model
from training.config import LossConfig
from training.data.lanes import LanePosition
from training.data.position import read_position
from training.distributed.collectives import all_gather_rows, all_reduce_max, all_reduce_sum, gather_objects
from training.losses.tiles import TILE_ELEMENTS

DEMO = Setting("demo-vit", 2)


def test_a_fake_world_adds_up_ranks_that_hold_the_same():
    with fake_world(1024, rank=3) as (runtime, log):
        assert all_reduce_sum(torch.ones(2)).tolist() == [1024, 1024]
        assert all_reduce_max(torch.ones(2)).tolist() == [1, 1]
        assert len(all_gather_rows(torch.ones(3, 2))) == 3 * 1024
        assert gather_objects("here") == ["here"] * runtime.world_size
    assert [call.num_bytes for call in log.calls[:2]] == [8, 8]


def test_memory_is_counted_once_and_until_it_goes():
    with LiveMemory() as memory:
        rows = torch.zeros(1000)
        view = rows[:10]
        kept = rows + 1
        del rows
        assert memory.live == 8000  # the view keeps its storage
        del view
        assert (memory.live, memory.peak) == (4000, 8000)
        del kept
    assert memory.live == 0


def test_a_rank_of_a_thousand_sends_gradients_texts_normalisers_and_seventeen_numbers():
    found = exchange(DEMO, world=1024)
    gradients = 4 * found["parameters"]
    texts = 1024 * DEMO.batch_size * found["feature_width"] * 4
    normalisers = 2 * 4 * 1024 * DEMO.batch_size
    assert found["collectives"]["all_reduce"]["bytes"] == gradients + normalisers + 4 * 17
    assert found["collectives"]["all_gather"] == {"calls": 1, "bytes": texts}
    assert found["collectives"]["reduce_scatter"] == {"calls": 1, "bytes": texts}
    assert found["judged_bad"] == 0
    assert found["changed_parameters"] == found["of_parameters"]


def test_twice_the_ranks_send_no_more_than_twice_the_bytes():
    few, many = (exchange(DEMO, world=world)["collectives"] for world in (256, 512))
    assert {kind: found["calls"] for kind, found in few.items()} == {
        kind: found["calls"] for kind, found in many.items()
    }
    assert many["all_reduce"]["bytes"] - few["all_reduce"]["bytes"] == 2 * 4 * 256 * DEMO.batch_size
    assert many["all_gather"]["bytes"] == 2 * few["all_gather"]["bytes"]


def test_a_step_at_full_size_takes_no_memory_here():
    found = full_size(Setting("demo-vit", 512, precision="amp_bf16"), world=1024)
    assert found["optimizer_bytes"] == pytest.approx(2 * found["weights_bytes"], rel=1e-3)
    all_texts = 4 * 1024 * 512 * 128
    assert found["step_bytes"] > 2 * all_texts  # and their gradients


def test_tiled_losses_hold_the_texts_and_stored_ones_grow_with_the_square_of_the_batch():
    def growth(form):
        few, many = (scale_loss.count_bytes(form, 1024, 8, world=world) for world in (64, 128))
        return few, many / few

    for name in scale_rank.LOSSES:
        assert growth(name)[0] < 6 * 4 * TILE_ELEMENTS
    local, local_growth = growth("softmax, stored logits of local rows")
    assert local > 2 * 4 * 1024 * 64 * 1024
    assert local_growth == pytest.approx(2, rel=0.1)
    assert growth("softmax, stored logits of all rows")[1] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("form", scale_rank.LOSSES)
def test_a_loss_leaves_nothing_for_the_garbage_collector(form):
    gc.collect()
    gc.disable()
    try:
        with fake_world(64), LiveMemory() as memory:
            images, texts, scale, bias = (torch.ones(shape, requires_grad=True) for shape in ((4, 8), (4, 8), (), ()))
            loss = scale_loss.FORMS[form](images, texts, scale, bias)
            loss.backward()
            assert memory.live < 4 * 64 * 4 * 8  # not even while the loss is held: less than all texts
    finally:
        gc.enable()


@pytest.mark.parametrize("all_rows", [False, True])
def test_the_loss_of_stored_logits_is_the_tiled_one(all_rows):
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(8, 4, generator=generator)) for _ in range(2))
    inputs = images, texts, torch.tensor(20.0), None
    stored = scale_loss.stored_softmax(*inputs, all_rows=all_rows)
    assert stored.item() == pytest.approx(scale_loss.FORMS["CLIP"](*inputs).item(), rel=1e-5)


def test_an_executed_rank_computes_four_products_and_the_loss_of_the_reference():
    shape = executed_loss.Shape(world=7, batch_size=6, width=8)
    for name, config in scale_loss.EXECUTED.items():
        found = executed_loss.execute(config, shape, check=True)
        assert max(found["relative_errors"].values()) < 5e-6, name
        assert found["products"] == 4
        assert found["largest_kept_elements"] == shape.global_batch * shape.width
        gathered = [message for message in found["messages"] if message != "allreduce_"]
        assert gathered == ["_allgather_base_", "_reduce_scatter_base_"]


@pytest.mark.parametrize("siglip", [False, True])
def test_the_reference_of_an_executed_rank_is_the_global_loss_in_fp64(siglip):
    world, own = 7, slice(5 * 6, 6 * 6)
    images, rows = (F.normalize(torch.randn(count, 8).double()).requires_grad_() for count in (6, 42))
    scale = torch.tensor(executed_loss.SCALE, dtype=torch.float64, requires_grad=True)
    others = executed_loss.SCALE * (images @ rows.T).detach() + executed_loss.BIAS
    mine = scale * images @ rows.T + executed_loss.BIAS
    logits, labels = torch.cat([others] * 5 + [mine] + [others]), torch.arange(42)  # [G, G]; this is rank 5
    if siglip:
        answers = 2 * torch.eye(42, dtype=torch.float64) - 1
        losses = -F.logsigmoid(answers * logits).sum(dim=1)
    else:
        by_image, by_text = (F.cross_entropy(value, labels, reduction="none") for value in (logits, logits.T))
        losses = (by_image + by_text) / 2
    (world * losses.mean()).backward()
    config = LossConfig(siglip=siglip)
    found = executed_loss.reference(config, images, rows.detach(), world=world, of_texts=rows.grad)
    assert found.loss == pytest.approx(losses[own].mean().item(), rel=1e-12)
    assert found.scale == pytest.approx(scale.grad.item(), rel=1e-10)
    torch.testing.assert_close(found.images, images.grad, rtol=1e-10, atol=1e-12)
    assert found.texts_error < 1e-10


def test_every_sample_of_an_epoch_is_seen_once_by_shrinking_and_growing_jobs():
    found = scale_lanes.account(shards=2000, mean_samples=4, scale=64)
    assert [leg["ranks"] for leg in found["legs"]] == [gpus // 64 for gpus, _ in LEGS]
    assert found["seen_once"] == found["samples"]
    assert found["next_epochs_seen_more_often"] == 0
    assert found["consumed"] == found["counted"]
    assert found["loader_deals_anew_equally"]


def test_samples_that_a_job_forgets_are_noticed(monkeypatch):
    saved = []

    def forgetful(tensors, facts):
        saved.append(facts)
        position = read_position(tensors, facts)
        if len(saved) > 1:
            return position
        lanes = [LanePosition(place.turn + 1) if lane == 5 else place for lane, place in enumerate(position.lanes)]
        return replace(position, lanes=lanes)

    monkeypatch.setattr(scale_lanes, "read_position", forgetful)
    found = scale_lanes.account(shards=2000, mean_samples=4, scale=64)
    assert 0 < found["seen_never"] <= 5


def test_worlds_that_divide_lanes_and_batch_see_the_same_global_batches():
    found = scale_lanes.compare(17_408, shards=1000, scale=64)
    assert list(found["worlds"]) == ["1024", "512", "1088"]
    assert scale_lanes._all_equal(found["worlds"])


def test_files_of_a_checkpoint_are_few_and_even():
    plans = scale_checkpoints.plan("ViT-B-32", 1024)["plans"]
    assert plans["DDP"]["writers"] == 4
    assert plans["DDP"]["least_of_largest"] > 0.95
    assert plans["FSDP"]["writers"] == 1024


def test_the_lanes_of_a_job_are_a_megabyte():
    found = scale_checkpoints.measure_lanes(1024, shards=XXLARGE.num_shards)
    assert found["lanes"] == 48 * 1024
    assert found["tensor_bytes"] == 20 * found["lanes"]


def test_simulated_goodput_agrees_with_the_formula():
    plan = Plan(interval_s=1800, stall_s=20, write_s=60, restart_s=400)
    runs = [scale_goodput.simulate(plan, mttf_s=8 * 3600, span_s=90 * 86400, seed=seed) for seed in range(60)]
    exact = scale_goodput.formula(plan, mttf_s=8 * 3600)
    assert np.mean(runs) == pytest.approx(exact, abs=5 * np.std(runs) / math.sqrt(len(runs)) + 2e-3)


def test_the_best_interval_is_near_young_and_dalys():
    best = scale_goodput.young_daly(20, 8 * 3600)
    goodput = [
        scale_goodput.formula(Plan(factor * best, 20, 0, 400), mttf_s=8 * 3600) for factor in (0.5, 0.7, 1, 1.4, 2)
    ]
    assert max(goodput) == goodput[2]


def test_an_exchange_takes_as_long_as_the_adapters_of_a_node():
    gigabyte_s = scale_network.all_reduce_s(1e9, BOOSTER, nodes=256, messages=0)
    assert gigabyte_s == pytest.approx(2 / 80, rel=0.01)  # 800 Gbit/s at 80 %, both ways
    slower = [scale_network.gather_s(1e9, network, nodes=128, messages=1) for network in NETWORKS]
    assert slower == sorted(slower)


def test_buckets_are_those_of_ddp_and_the_last_one_has_the_token_embedding():
    model = build_model(load_model_config("demo-vit"), device="meta")
    image_hw = (model.config.vision_cfg.image_size,) * 2
    sizes = scale_network._gradients_in_order(model, image_hw, images_first=False)
    assert sum(sizes) == sum(parameter.nbytes for parameter in model.parameters())
    assert sizes[-1] == model.token_embedding.weight.nbytes
    limits = [scale_network._FIRST_BUCKET, scale_network._DEFAULT_BUCKET]
    expected, _ = torch.distributed._compute_bucket_assignment_by_size(
        [torch.empty(size // 4) for size in sizes], limits
    )
    found = scale_network.ddp_buckets(model, image_hw=image_hw)
    assert found == [sum(sizes[place] for place in bucket) for bucket in expected]


def test_what_hides_nothing_is_exposed():
    facts = dict.fromkeys(Traffic._fields, 0) | {"padded_share": 1.0, "gradients": 6e8, "buckets": 16}
    traffic = Traffic(**facts | {"texts": 2e9, "last_bucket": 1e8, "last_bucket_images_first": 1e7})
    compute = Compute(step_s=10.0, image_forward_s=3.0)
    times = network_times(traffic, BOOSTER, blocks=24, compute=compute)
    assert times["exposed_s"] == pytest.approx(times["tail_s"] + times["vitals_s"] + times["normalisers_s"])
    assert times["exposed_fsdp_s"] > times["texts_s"] > times["exposed_hsdp_s"]
    saved = [saved_s(traffic, BOOSTER, ranks=ranks, compute=compute) for ranks in (8, 1024)]
    assert saved[0] < 0 < saved[1]
    assert saved[1] == pytest.approx(times["texts_s"] - 0.9 * 2 * 1e8 / 80e9, rel=0.02)


def test_missing_results_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"scale_rank.json is not there: run python -m benchmarks.scale_rank"):
        scale_report.load("scale_rank", tmp_path)


def test_a_table_without_a_place_is_refused():
    text = "<!-- table one -->\nold\n<!-- end -->\n"
    assert scale_report.fill(text, {"one": "new\n"}) == "<!-- table one -->\nnew\n<!-- end -->\n"
    with pytest.raises(ValueError, match="tables and places in the document differ: two"):
        scale_report.fill(text, {"one": "new\n", "two": "new\n"})


def test_the_document_holds_the_tables_of_the_results():
    text = scale_report.DOCUMENT.read_text()
    assert scale_report.fill(text, scale_all.all_tables()) == text


def test_results_say_what_they_were_made_with():
    for name in scale_all.BENCHMARKS:
        run = scale_report.load(name)["run"]
        assert run["command"] == f"python -m benchmarks.{name}"
        assert run["commit"]
        assert not run["uncommitted_changes"]


def test_a_benchmark_writes_its_result_and_prints_its_tables(tmp_path, capsys):
    out = tmp_path / "result.json"
    scale_report.run_benchmark(
        "scale_goodput", scale_goodput.measure, scale_goodput.tables, ["--small", f"--out={out}"]
    )
    assert json.loads(out.read_text())["benchmark"] == "scale_goodput"
    assert "| every 10 min |" in capsys.readouterr().out
