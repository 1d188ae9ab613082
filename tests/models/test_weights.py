from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from models.weights import adapt_state_dict, load_weights, read_state_dict
from tests.models.tiny import tiny_model


class Payload:
    """What a pickle must never be able to do."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


@pytest.mark.parametrize(
    ("name", "message"),
    [("gone.pt", "no weights file"), ("weights.npz", r"has the suffix '\.npz', weights are read from \.pt")],
)
def test_files_that_cannot_hold_weights_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "weights.npz").touch()
    with pytest.raises(ValueError, match=message):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize("payload", [Payload(), {"state_dict": Payload()}])
def test_pickled_code_is_never_run(tmp_path: Path, payload: object, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(payload, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"cannot read .*pickled code .* never loaded"):
        read_state_dict(tmp_path / "w.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(payload))
    with pytest.raises(ValueError, match="never loaded"):
        read_state_dict(tmp_path / "old.pt")
    assert "executed" not in capsys.readouterr().out


def test_torchscript_archives_are_refused(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "jit.pt"))
    with pytest.raises(ValueError, match="TorchScript archives are never loaded"):
        read_state_dict(tmp_path / "jit.pt")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    torch.save(tiny_model().state_dict(), tmp_path / "w.pt")
    data = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cannot read"):
        read_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"state_dict": {"a": 1}}, [torch.ones(1)]])
def test_a_file_without_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_state_dict(tmp_path / "w.pt")


def test_files_of_before_the_zip_format_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_state_dict(tmp_path / "w.pt")["a"], torch.ones(2))


def test_one_leading_module_is_stripped_and_only_if_all_names_have_it(tmp_path: Path) -> None:
    torch.save({"module.module.a": torch.ones(1), "module.b": torch.ones(1)}, tmp_path / "all.pt")
    assert list(read_state_dict(tmp_path / "all.pt")) == ["module.a", "b"]
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "some.pt")
    assert list(read_state_dict(tmp_path / "some.pt")) == ["module.a", "b"]


def test_another_architecture_is_refused_with_the_first_of_each_kind() -> None:
    state = tiny_model(vision={"layers": 4, "patch_size": 16}).state_dict()
    del state["ln_final.weight"]
    message = (
        r"do not fit model 'tiny': of \d+ tensors 1 missing \(first: ln_final\.weight\), "
        r"12 unexpected \(first: visual\.transformer\.resblocks\.3.*\), "
        r"1 of another shape \(first: visual\.conv1\.weight \(64, 3, 16, 16\) instead of \(64, 3, 8, 8\)\); .*--model"
    )
    with pytest.raises(ValueError, match=message):
        load_weights(tiny_model(), state)


def test_a_partial_state_dict_loads_when_asked() -> None:
    model, other = tiny_model(seed=1), tiny_model(seed=2)
    load_weights(model, {"visual.proj": other.visual.proj, "extra": torch.ones(1)}, strict=False)
    assert torch.equal(model.visual.proj, other.visual.proj)
    assert not torch.equal(model.text_projection, other.text_projection)
    with pytest.raises(ValueError, match="of another shape"):
        load_weights(model, {"visual.proj": torch.ones(1, 1)}, strict=False)


def test_the_temperature_changes_its_dims() -> None:
    state = tiny_model(init_logit_bias=-3).state_dict()
    model = tiny_model(init_logit_bias=-1, nonscalar_logit_scale=True)
    load_weights(model, state)
    assert model.logit_bias.tolist() == [-3]
    load_weights(tiny_model(init_logit_bias=-1), model.state_dict())


def test_a_missing_bias_starts_at_zero() -> None:
    model = tiny_model(init_logit_bias=-10)
    load_weights(model, tiny_model().state_dict())
    assert model.logit_bias.item() == 0


def test_a_bias_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 unexpected \(first: logit_bias\)"):
        load_weights(tiny_model(), tiny_model(init_logit_bias=-10).state_dict())


def test_adapting_leaves_the_given_state_dict_alone() -> None:
    state = tiny_model().state_dict()
    names = list(state)
    adapted = adapt_state_dict(tiny_model(vision={"image_size": 64}, custom_text=True), state)
    assert list(state) == names
    assert state["visual.positional_embedding"].shape == (17, 64)
    assert adapted["visual.positional_embedding"].shape == (65, 64)


def test_half_precision_positions_keep_their_type_when_resized() -> None:
    state = {name: tensor.half() for name, tensor in tiny_model().state_dict().items()}
    adapted = adapt_state_dict(tiny_model(vision={"image_size": 64}, text={"context_length": 20}), state)
    assert adapted["visual.positional_embedding"].dtype == torch.float16
    assert adapted["positional_embedding"].shape == (20, 48)


def test_positions_of_a_rectangle_are_not_guessed() -> None:
    with pytest.raises(ValueError, match=r"first: visual\.positional_embedding \(25, 64\) instead of \(17, 64\)"):
        load_weights(tiny_model(), tiny_model(vision={"image_size": (32, 48)}).state_dict())
