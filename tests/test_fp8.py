"""Linear layers in fp8: which, that nothing else changes, and what is refused. Products are emulated on the CPU."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import fp8_convergence
from models.clip import Clip
from models.config import parse_model_config
from models.factory import build_model
from models.packing import pack_texts
from training import fp8
from training.config import EngineConfig
from training.data.batch import DeviceBatch
from training.distributed.parallelize import parallelize
from training.distributed.runtime import Runtime
from training.fp8 import RECIPES, check_fp8, convert_blocks, padded_blocks, refusal, use_fp8

pytest.importorskip("torchao")

CPU = torch.device("cpu")
VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 4, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}


def tiny(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> Clip:
    torch.manual_seed(0)
    cfg = {"embed_dim": 8, "vision_cfg": {**VISION, **(vision or {})}, "text_cfg": {**TEXT, **(text or {})}}
    return build_model(parse_model_config(cfg, name="tiny"))


def blocks_of(model: Clip) -> list[nn.Module]:
    return [*model.image_blocks, *model.text_blocks]


def batch() -> DeviceBatch:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return DeviceBatch(images, pack_texts(torch.tensor([[48, 5, 49, 0], [48, 49, 0, 0]])))


def features(model: nn.Module) -> Tensor:
    output = model(*batch()[:2])
    return torch.cat([output.image_features, output.text_features])


def test_mlps_and_output_projections_of_blocks_are_converted_and_nothing_else():
    conversion = convert_blocks(blocks_of(tiny()), "rowwise", emulated=True)
    layers = ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    assert conversion.converted == tuple(f"{number}.{layer}" for number in range(4) for layer in layers)
    assert conversion.left == ()


def test_a_layer_with_a_side_that_is_no_multiple_of_16_is_left_as_it_is(caplog):
    model = tiny(text={"width": 24})
    with caplog.at_level("INFO"):
        conversion = convert_blocks(blocks_of(model), "rowwise", emulated=True)
    assert "fp8: 6 layers are left, with sides that are no multiples of 16." in caplog.text
    assert "2.attn.out_proj" in conversion.left
    assert type(model.text_blocks[0].mlp.c_fc) is nn.Linear
    assert "0.mlp.c_fc" in conversion.converted


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="--fp8 rowwise: no block of this model has linear layers .* multiples of 16"):
        convert_blocks(tiny(text={"width": 24}).text_blocks, "rowwise", emulated=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_parameters_and_checkpoints_are_those_of_the_plain_model(recipe):
    model = tiny()
    before = dict(model.named_parameters())
    weights = copy.deepcopy(model.state_dict())
    convert_blocks(blocks_of(model), recipe, emulated=True)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())
    tiny().load_state_dict(model.state_dict())
    model.load_state_dict(weights)


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_rounds_to_fp8_and_evaluation_does_not(recipe):
    plain, model = tiny(), tiny()
    convert_blocks(blocks_of(model), recipe, emulated=True)
    difference = (features(model) - features(plain)).abs().max()
    assert 1e-5 < difference < 0.1
    assert torch.equal(features(model.eval()), features(plain.eval()))
    assert not torch.equal(features(model.train()), features(plain.train()))


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_close_to_those_of_fp32(recipe):
    plain, model = tiny(), tiny()
    convert_blocks(blocks_of(model), recipe, emulated=True)
    target = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    for each in (plain, model):
        (features(each) * target).sum().backward()
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            assert (found.grad - expected.grad).norm() < 0.2 * expected.grad.norm() + 1e-6, name


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointed_and_compiled_blocks_compute_the_same(compiled):
    model, wrapped = tiny(), tiny()
    for each in (model, wrapped):
        convert_blocks(each.image_blocks, "rowwise", emulated=True)
    engine = EngineConfig(
        device="cpu", grad_checkpointing=True, torchcompile=compiled, torchcompile_backend="eager" if compiled else None
    )
    runtime = Runtime(rank=0, local_rank=0, world_size=1, device=CPU)
    trained = parallelize(wrapped, config=engine, runtime=runtime)
    found, expected = (each.encode_image(batch().images) for each in (trained, model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.square().sum().backward()
    expected.square().sum().backward()
    gradients = [each.visual.transformer.resblocks[0].mlp.c_fc.weight.grad for each in (wrapped, model)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_rows_that_are_no_multiple_of_16_are_padded_without_changing_anything():
    padded, model = tiny(), tiny()
    convert_blocks(blocks_of(padded), "tensorwise", padded=range(4), emulated=True)
    convert_blocks(blocks_of(model), "tensorwise", emulated=True)
    for each in (padded, model):
        features(each)[:, 0].sum().backward()
    for found, expected in zip(padded.parameters(), model.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None)
        if found.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "length"), [(64, 77), (64, 16), (256, 16), (896, 16), (72, 77)])
def test_the_rows_of_layers_without_padding_are_a_multiple_of_16(size, length):
    model = tiny(text={"context_length": 77})
    blocks = blocks_of(model)
    convert_blocks(blocks, "rowwise", padded=padded_blocks(4, batch_size=size, text_length=length), emulated=True)
    rows: list[tuple[int, bool]] = []
    for block in blocks:
        for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
            layer.register_forward_pre_hook(
                lambda layer, inputs: rows.append((inputs[0][..., 0].numel(), layer.config.pad_inner_dim))
            )
    texts = torch.zeros(size, length, dtype=torch.int64)
    texts[torch.arange(size), torch.arange(size) % (length - 1) + 1] = 49
    with torch.no_grad():
        model(torch.randn(size, 3, 16, 16), pack_texts(texts))
    assert len(rows) == 12
    assert [count for count, pads in rows if count % 16 and not pads] == []
    assert any(count % 16 for count, _ in rows)  # captions with their fillers


def test_the_last_text_block_has_a_row_for_every_filler_and_is_padded_alone():
    assert list(padded_blocks(24, batch_size=64, text_length=77)) == [23]
    assert len(padded_blocks(24, batch_size=72, text_length=77)) == 24
    assert len(padded_blocks(24, batch_size=64, text_length=16)) == 24  # packed texts come in multiples of 4


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("cpu", None, True), "needs a GPU with fp8 products, and the device is cpu"),
        (("cuda", (8, 0), True), "compute capability 8.9 .* A100 has 8.0"),
        (("cuda", (9, 0), False), r"needs torchao: pip install 'clipyard\[fp8\]'"),
    ],
)
def test_what_is_missing_is_named(arguments, reason):
    device_type, capability, has_torchao = arguments
    found = refusal(device_type, capability, name="A100", has_torchao=has_torchao)
    assert found is not None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found)


def test_ada_and_later_with_torchao_are_fine():
    assert refusal("cuda", (8, 9), has_torchao=True) is None
    assert refusal("cuda", (10, 0), has_torchao=True) is None


def test_a_cpu_is_refused_before_anything_is_converted():
    model = tiny()
    with pytest.raises(ValueError, match="--fp8 rowwise needs a GPU .* or leave the flag out"):
        use_fp8(blocks_of(model), "rowwise", device=CPU, batch_size=64, text_length=77, will_be_compiled=True)
    assert type(model.image_blocks[0].mlp.c_fc) is nn.Linear
    with pytest.raises(ValueError, match="the device is cpu"):
        check_fp8("tensorwise", device=CPU)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_makes_fp8_slow_is_a_warning(monkeypatch, caplog, compiled):
    monkeypatch.setattr(fp8, "check_fp8", lambda *_, **__: None)
    sizes = {"batch_size": 64, "text_length": 77} if compiled else {"batch_size": 72, "text_length": 77}
    use_fp8(blocks_of(tiny()), "rowwise", device=CPU, **sizes, will_be_compiled=compiled)
    found = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(found) == (0 if compiled else 2)
    assert compiled or "Pass --torchcompile" in found[0]
    assert compiled or "or 72 is no multiple of 16: products are padded" in found[1]


def test_the_convergence_run_trains_every_arm_and_draws_it(tmp_path):
    out, drawn = tmp_path / "curves.json", tmp_path / "curves.svg"
    fp8_convergence.main(
        ["--steps=2", "--batch-size=2", "--samples=8", "--device=cpu", f"--out={out}", f"--picture={drawn}"]
    )
    result = json.loads(out.read_text())
    assert result["settings"]["emulated"]
    assert {len(curve) for curve in result["losses"].values()} == {2}
    assert result["summary"]["bf16"]["largest_difference"] == 0
    assert result["losses"]["fp8 rowwise"] != result["losses"]["fp8 tensorwise"] != result["losses"]["bf16"]
    assert drawn.read_text().count("<path d=") > len(fp8_convergence.ARMS)


def test_the_share_of_flops_is_that_of_the_layers_converted():
    # Per token and width D of a block: QKV 3, output 1, MLP 8, all of D * D; what is left is attention and the ends.
    assert 0.6 < fp8_convergence.fp8_share("ViT-B-32") < 9 / 12
