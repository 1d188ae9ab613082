"""Site profiles: those that come with the program can be used, and what is not understood is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from slurm.sites import load_site, site_names

WHY = "because"


@pytest.mark.parametrize("name", site_names())
def test_every_profile_gives_a_reason_for_every_setting(name: str) -> None:
    site = load_site(name)
    settings = [*site.setup, *site.sbatch_options, *site.srun_options, *site.environment.values()]
    assert settings
    assert all(len(setting.why) > 10 for setting in settings)
    assert "/tmp" in site.node_local


def test_the_cores_of_a_node_are_shared_evenly() -> None:
    assert load_site("juwels-booster").cpus_per_task(4) == 12
    assert load_site("generic").cpus_per_task(4) is None


def test_a_profile_of_ones_own_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "home.yaml"
    path.write_text("{description: at home, setup: [{line: module load CUDA, why: it is not in the path}]}")
    assert load_site(str(path)).setup[0].text == "module load CUDA"
    assert load_site(str(path)).name == "home"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "a profile: .*give keys and values"),
        ("{a: b: c}", "is not YAML"),
        ("{description: x, partitoin: y}", "unknown key 'partitoin': did you mean partition"),
        ("{description: x, account: maybe}", "account: 'maybe'; give required or optional"),
        ("{description: x, gpu_request: tres}", "gpu_request: 'tres'; give one of gres"),
        ("{description: x, gpus_per_node: 0}", "gpus_per_node: 0; give a whole number above 0"),
        ("{description: x, setup: module}", "setup: 'module'; give a list"),
        ("{description: x, environment: {A: {value: 1}}}", "environment: A: no why; every setting has a reason"),
        ("{description: x, environment: {A-B: {value: 1, why: y}}}", "'A-B' is no name of a variable"),
        ("{description: x, environment: {A: {value: off, why: y}}}", "A: False; give one line of text"),
        ("{description: x, srun_options: [{option: mpi, why: y}]}", "'mpi' is no option"),
        ("{description: x, srun_options: [{option: -K, why: y, when: z}]}", "srun_options: unknown key 'when'"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_site(str(path))


def test_an_unknown_site_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="--site juwels-boster: did you mean juwels-booster"):
        load_site("juwels-boster")
