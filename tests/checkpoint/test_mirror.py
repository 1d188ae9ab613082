from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoint.upload_server import UploadBucket, UploadServer
from tests.s3.server import Fault
from training.checkpoint.checkpointer import Checkpointer, StepCheckpoint
from training.checkpoint.manifest import MANIFEST_NAME, DamagedCheckpoint, verify
from training.checkpoint.mirror import Mirror
from training.checkpoint.mirror_fetch import RemoteRun, fetch_newest, fetch_url
from training.checkpoint.mirror_history import fetch_history
from training.checkpoint.mirror_plan import Sent, is_due
from training.checkpoint.mirror_store import RemoteFile, RemoteOptions, RemoteRefused, RemoteStore, open_store
from training.checkpoint.tags import Tags
from training.data.storage_errors import StorageError

QUICK = RemoteOptions(attempts=4, first_delay_s=0.01, longest_delay_s=0.02, timeout_s=5)
FILES = ("data.safetensors", "model.safetensors", "optimizer.safetensors", "rng.safetensors", "train.json")
_numbers = itertools.count()


@pytest.fixture(scope="module")
def upload_server() -> Iterator[UploadServer]:
    server = UploadServer()
    yield server
    server.close()


@pytest.fixture
def bucket(upload_server: UploadServer, monkeypatch: pytest.MonkeyPatch) -> UploadBucket:
    bucket = UploadBucket(upload_server, f"mirror-{next(_numbers)}")
    for name, value in bucket.environment().items():
        monkeypatch.setenv(name, value)
    return bucket


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints."""
    directory = tmp_path / "logs" / "run"
    save(directory, 10)
    save(directory, 20)
    (directory / "out.log").write_text("line 1\n")
    (directory / "metrics.jsonl").write_text('{"step": 1}\n{"ste')
    (directory / "leases").mkdir()
    (directory / "leases" / "00000001.json").write_text("{}")
    (directory / "checkpoints" / "epoch_1.pt").write_bytes(b"weights")
    return directory


def save(run: Path, step: int, *, value: float | None = None) -> Path:
    tensor = torch.full((4, 3), float(step if value is None else value))
    content = StepCheckpoint(
        {"w": tensor}, {"w//exp_avg": tensor}, {"0//cpu": torch.get_rng_state()}, {"lanes": tensor}, {"step": step}
    )
    return Checkpointer(run / "checkpoints", keep=2).save(step, content)


def mirror_of(run: Path, url: str, *, protocol: str | None = None) -> Mirror:
    return Mirror(run, open_store(url, protocol=protocol, options=QUICK), options=QUICK, every_s=0.05)


def remote_run(url: str) -> RemoteRun:
    return RemoteRun(open_store(url, options=QUICK), options=QUICK)


def whole_steps(url: str) -> list[int]:
    remote = remote_run(url)
    steps = remote.steps()
    for step in steps:
        for name, facts in remote.manifest(step).files.items():
            assert remote.describe(step, name) == facts
    return steps


@pytest.fixture(params=["s3", "file", "memory", "s3 through fsspec"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if "fsspec" in request.param:
        # Not in the test extra: it wants a release of botocore to itself, and pip gives up over that.
        pytest.importorskip("s3fs")
    if request.param.startswith("s3"):
        return request.getfixturevalue("bucket").url("runs/run")
    return f"memory://mirror-{next(_numbers)}/run" if request.param == "memory" else f"file://{tmp_path}/away/run"


@pytest.fixture
def protocol(request: pytest.FixtureRequest) -> str | None:
    return "fsspec" if "fsspec" in request.node.callspec.id else None


def test_everything_of_a_run_arrives_and_comes_back(run: Path, url: str, protocol: str | None, tmp_path: Path) -> None:
    mirror = mirror_of(run, url, protocol=protocol)
    mirror.check(continues=False)
    assert mirror.upload_once()
    keys = set(open_store(url, protocol=protocol).list())
    steps = {f"checkpoints/step_000000{step}/{name}" for step in (10, 20) for name in (*FILES, MANIFEST_NAME)}
    plain = {"out.log", "metrics.jsonl", "checkpoints/epoch_1.pt", "checkpoints/LATEST", "MIRROR.json"}
    assert keys == steps | plain
    back = tmp_path / "back" / "run"
    remote = RemoteRun(open_store(url, protocol=protocol))
    found = fetch_newest(remote, back / "checkpoints")
    assert found == back / "checkpoints" / "step_00000020"
    assert verify(found) == verify(run / "checkpoints" / "step_00000020")
    fetch_history(remote, back)
    assert (back / "out.log").read_text() == "line 1\n"
    assert (back / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert not (back / "checkpoints" / "epoch_1.pt").exists()


def test_what_is_there_is_not_sent_again(run: Path, bucket: UploadBucket) -> None:
    mirror_of(run, bucket.url("runs/run")).upload_once()
    sent = len(bucket.requests("PUT"))
    again = mirror_of(run, bucket.url("runs/run"))  # as after a new start
    assert again.upload_once()
    assert len(bucket.requests("PUT")) == sent
    with (run / "out.log").open("a") as file:
        file.write("line 2\n")
    assert again.upload_once()
    assert bucket.requests("PUT")[sent:] == ["runs/run/out.log"]
    assert bucket.get("runs/run/out.log") == b"line 1\nline 2\n"


def test_a_manifest_comes_after_all_files_and_goes_before_them(run: Path, bucket: UploadBucket) -> None:
    mirror = mirror_of(run, bucket.url("run"))
    mirror.upload_once()
    order = [key for key in bucket.requests("PUT") if "step_00000020" in key]
    assert order[-1].endswith(MANIFEST_NAME)
    assert len(order) == len(FILES) + 1
    save(run, 30)
    bucket.faults("run/checkpoints/step_00000030/MANIFEST.json", Fault(status=503))
    assert not mirror.upload_once()
    assert whole_steps(bucket.url("run")) == [10, 20]  # 10 is past retention here, but no newer one is complete there
    bucket.faults("run/checkpoints/step_00000030/MANIFEST.json")
    assert mirror.upload_once()
    assert whole_steps(bucket.url("run")) == [20, 30]
    assert not open_store(bucket.url("run")).list("checkpoints/step_00000010/")


def test_the_history_there_reaches_as_far_as_the_checkpoints(run: Path, bucket: UploadBucket) -> None:
    mirror_of(run, bucket.url("run")).upload_once()
    order = bucket.requests("PUT")
    first_step = next(place for place, key in enumerate(order) if "step_" in key)
    assert set(order[:first_step]) == {"run/out.log", "run/metrics.jsonl"}
    assert order[-1] == "run/checkpoints/LATEST"


def test_the_same_step_written_anew_is_retracted_before_it_is_replaced(run: Path, bucket: UploadBucket) -> None:
    mirror_of(run, bucket.url("run")).upload_once()
    save(run, 20, value=7)
    bucket.faults("run/checkpoints/step_00000020/optimizer.safetensors", Fault(status=500))
    mirror = mirror_of(run, bucket.url("run"))
    assert not mirror.upload_once()
    assert remote_run(bucket.url("run")).steps() == [10]
    bucket.faults("run/checkpoints/step_00000020/optimizer.safetensors")
    assert mirror.upload_once()
    assert whole_steps(bucket.url("run")) == [10, 20]


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 503, "code": "SlowDown"}, {"reset_at": 0}])
def test_a_fault_that_passes_is_waited_for(run: Path, bucket: UploadBucket, fault: dict[str, int]) -> None:
    bucket.faults("run/checkpoints/step_00000020/model.safetensors", Fault(times=4, **fault))
    mirror = mirror_of(run, bucket.url("run"))
    assert mirror.upload_once()
    assert mirror.status.retries >= 1
    assert mirror.status.failures == 0
    assert whole_steps(bucket.url("run")) == [10, 20]


def test_a_refusal_is_told_at_once_and_counted(
    run: Path, bucket: UploadBucket, caplog: pytest.LogCaptureFixture
) -> None:
    bucket.faults("run/checkpoints/step_00000020/model.safetensors", Fault(status=403, code="AccessDenied"))
    mirror = mirror_of(run, bucket.url("run"))
    with caplog.at_level(logging.ERROR):
        assert not mirror.upload_once()
    assert (mirror.status.failures, mirror.status.refused, mirror.status.retries) == (1, 1, 0)
    assert "403 AccessDenied" in caplog.text
    assert "The run goes on" in caplog.text
    bucket.faults("run/checkpoints/step_00000020/model.safetensors")
    assert mirror.upload_once()
    assert mirror.status.complete


_VICTIM = """
import sys, time
from pathlib import Path
from training.checkpoint.mirror import Mirror
from training.checkpoint.mirror_store import open_store
mirror = Mirror(Path(sys.argv[1]), open_store(sys.argv[2]))
mirror.start()
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["data.safetensors", "train.json", MANIFEST_NAME])
def test_a_kill_during_an_upload_leaves_each_checkpoint_whole_or_absent(
    run: Path, bucket: UploadBucket, name: str
) -> None:
    key = f"run/checkpoints/step_00000020/{name}"
    before = [f"run/checkpoints/step_00000020/{file}" for file in (*FILES, MANIFEST_NAME)]
    before = before[: before.index(key)]
    bucket.faults(key, Fault(times=1, stall_at=0, stall_s=30, status=500))
    victim = subprocess.Popen([sys.executable, "-c", _VICTIM, str(run), bucket.url("run")])
    _wait_for(lambda: set(before) <= set(bucket.requests("PUT")) and bucket.has_struck(key))
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert whole_steps(bucket.url("run")) == []
    assert fetch_newest(remote_run(bucket.url("run")), run.parent / "other" / "checkpoints") is None
    sent = len(bucket.requests("PUT"))
    assert mirror_of(run, bucket.url("run")).upload_once()
    assert not set(before) & set(bucket.requests("PUT")[sent:])  # resumed, not begun anew
    assert whole_steps(bucket.url("run")) == [10, 20]


def _wait_for(condition: object, *, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_uploads_that_a_kill_left_unfinished_are_removed(run: Path, bucket: UploadBucket) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=bucket.endpoint, region_name="us-east-1")
    client.create_multipart_upload(Bucket=bucket.name, Key="run/checkpoints/step_00000020/model.safetensors")
    client.create_multipart_upload(Bucket=bucket.name, Key="running/not-ours")
    mirror_of(run, bucket.url("run")).check(continues=False)
    uploads = client.list_multipart_uploads(Bucket=bucket.name)["Uploads"]
    assert [upload["Key"] for upload in uploads] == ["running/not-ours"]


def test_a_large_file_is_sent_in_parts(run: Path, bucket: UploadBucket) -> None:
    data = os.urandom(20 << 20)
    (run / "checkpoints" / "epoch_2.pt").write_bytes(data)
    bucket.faults("run/checkpoints/epoch_2.pt", Fault(times=2, after=1, status=503))
    assert mirror_of(run, bucket.url("run")).upload_once()
    assert bucket.get("run/checkpoints/epoch_2.pt") == data


@pytest.mark.parametrize("damage", ["truncated", "changed", "no manifest", "no file", "bad manifest"])
def test_a_damaged_remote_checkpoint_is_passed_over(run: Path, tmp_path: Path, damage: str) -> None:
    url = f"file://{tmp_path}/away/run"
    mirror_of(run, url).upload_once()
    step = tmp_path / "away" / "run" / "checkpoints" / "step_00000020"
    data = (step / "model.safetensors").read_bytes()
    if damage == "truncated":
        (step / "model.safetensors").write_bytes(data[:-4])
    elif damage == "changed":
        (step / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "bad manifest":
        (step / MANIFEST_NAME).write_text("{")
    else:
        (step / (MANIFEST_NAME if damage == "no manifest" else "train.json")).unlink()
    checkpoints = tmp_path / "back" / "checkpoints"
    assert fetch_newest(remote_run(url), checkpoints) == checkpoints / "step_00000010"
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000010"]


def test_a_run_does_not_start_over_while_damaged_checkpoints_exist(run: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/away/run"
    mirror_of(run, url).upload_once()
    for path in (tmp_path / "away").glob("run/checkpoints/step_*/model.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match="None of the 2 step checkpoints"):
        fetch_newest(remote_run(url), tmp_path / "back" / "checkpoints")
    with pytest.raises(DamagedCheckpoint, match="No checkpoint at"):
        fetch_url(url, tmp_path / "back" / "checkpoints")


def test_the_newest_whole_one_wins_wherever_it_is(run: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/away/run"
    mirror_of(run, url).upload_once()
    checkpoints = run / "checkpoints"
    (checkpoints / "step_00000020" / "model.safetensors").write_bytes(b"damaged")
    assert fetch_newest(remote_run(url), checkpoints) == checkpoints / "step_00000020"  # damaged here, whole there
    verify(checkpoints / "step_00000020")
    save(run, 30)
    assert fetch_newest(remote_run(url), checkpoints) == checkpoints / "step_00000030"
    Checkpointer(checkpoints).change_tags(lambda tags: tags.with_suspect([30]))
    assert fetch_newest(remote_run(url), checkpoints) == checkpoints / "step_00000020"


def test_a_resume_url_names_a_run_or_one_checkpoint(run: Path, bucket: UploadBucket, tmp_path: Path) -> None:
    url = bucket.url("runs/run")
    mirror_of(run, url).upload_once()
    back = tmp_path / "back"
    assert fetch_url(f"{url}/checkpoints/step_00000010", back).name == "step_00000010"
    assert fetch_url(f"{url}/", back).name == "step_00000020"
    bucket.faults("runs/run/checkpoints/step_00000020/model.safetensors", Fault(status=500))
    assert fetch_url(f"{url}/checkpoints", back).name == "step_00000020"  # there already, and the same
    with pytest.raises(ValueError, match=r"is no checkpoint .*the steps there: \[10, 20\]"):
        fetch_url(f"{url}/checkpoints/step_00000015", back)


def test_a_break_while_fetching_goes_on_at_the_byte_reached(run: Path, bucket: UploadBucket, tmp_path: Path) -> None:
    mirror_of(run, bucket.url("run")).upload_once()
    key = "run/checkpoints/step_00000020/rng.safetensors"
    bucket.faults(key, Fault(times=1, reset_at=100), Fault(times=1, status=503))
    assert fetch_newest(remote_run(bucket.url("run")), tmp_path / "back") is not None


def test_a_damaged_local_checkpoint_is_not_mirrored(
    run: Path, bucket: UploadBucket, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "checkpoints" / "step_00000020" / "model.safetensors").write_bytes(b"damaged")
    mirror = mirror_of(run, bucket.url("run"))
    assert not mirror.upload_once()
    assert "damaged here" in caplog.text
    assert whole_steps(bucket.url("run")) == [10]


def test_a_process_that_lost_the_run_changes_nothing(run: Path, bucket: UploadBucket) -> None:
    def lost() -> None:
        raise RuntimeError("generation 4 owns the run")

    mirror = Mirror(run, open_store(bucket.url("run"), options=QUICK), options=QUICK, fence=lost)
    assert not mirror.upload_once()
    assert mirror.status.last_error == "generation 4 owns the run"
    assert bucket.requests("PUT") == []


def test_the_later_of_two_that_mirror_to_one_place_wins(run: Path, bucket: UploadBucket, tmp_path: Path) -> None:
    """Two machines with a directory each do not see each other's lease."""
    first, second = mirror_of(run, bucket.url("run")), mirror_of(tmp_path / "other", bucket.url("run"))
    first.check(continues=False)
    assert first.upload_once()
    second.check(continues=True)
    save(run, 30)
    assert not first.upload_once()
    assert "another start of this run mirrors to" in str(first.status.last_error)
    assert whole_steps(bucket.url("run")) == [10, 20]


def test_the_thread_uploads_in_the_background_and_at_the_end(run: Path, bucket: UploadBucket) -> None:
    mirror = mirror_of(run, bucket.url("run"))
    mirror.start()
    _wait_for(lambda: mirror.status.newest_step == 20)
    save(run, 30)
    (run / "out.log").write_text("the end\n")
    status = mirror.finish(timeout_s=10)
    assert (status.complete, status.newest_step) == (True, 30)
    assert bucket.get("run/out.log") == b"the end\n"


def test_a_storage_that_hangs_does_not_hang_the_end(
    run: Path, bucket: UploadBucket, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = mirror_of(run, bucket.url("run"))
    bucket.faults("run/checkpoints/step_00000020/data.safetensors", Fault(times=1, stall_at=0, stall_s=3))
    mirror.start()
    start = time.monotonic()
    status = mirror.finish(timeout_s=0.3)
    assert time.monotonic() - start < 2
    assert not status.complete
    assert f"clipyard checkpoints mirror {run} {bucket.url('run')}" in caplog.text


def test_a_process_ends_although_its_upload_hangs(run: Path, bucket: UploadBucket) -> None:
    key = "run/checkpoints/step_00000020/data.safetensors"
    bucket.faults(key, Fault(times=1, stall_at=0, stall_s=30))
    program = _VICTIM.replace("time.sleep(60)", "mirror.finish(0.5)")
    start = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program, str(run), bucket.url("run")], timeout=25, check=False)
    assert ended.returncode == 0
    assert bucket.has_struck(key)
    assert time.monotonic() - start < 25


def test_a_start_is_refused_where_nothing_can_be_written(
    run: Path, bucket: UploadBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="--remote-sync: .*NoSuchBucket"):
        mirror_of(run, "s3://moto-none/run").check(continues=False)
    bucket.faults("run/MIRROR.json", Fault(status=403, code="AccessDenied"))
    with pytest.raises(ValueError, match="--remote-sync: .*403 AccessDenied"):
        mirror_of(run, bucket.url("run")).check(continues=False)
    bucket.faults("run/MIRROR.json", Fault(status=500))
    with pytest.raises(RuntimeError, match="--remote-sync: .* failed 4 times"):
        mirror_of(run, bucket.url("run")).check(continues=False)
    bucket.faults("run/MIRROR.json", Fault(after=1, replace_with="/x", status=500))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ValueError, match="cannot be used: No credentials for S3"):
        open_store("s3://bucket/run")


@pytest.mark.parametrize(
    ("url", "protocol", "message"),
    [
        ("/mnt/backup", "s3", "is no s3://BUCKET/PREFIX"),
        ("s3:///run", "s3", "names no bucket"),
        ("nonsense://x/run", "fsspec", "is no URL that fsspec can open here"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url: str, protocol: str, message: str, bucket: UploadBucket) -> None:
    with pytest.raises(ValueError, match=message):
        open_store(url, protocol=protocol)


def test_another_run_of_the_same_name_is_not_overwritten(run: Path, bucket: UploadBucket, tmp_path: Path) -> None:
    mirror_of(run, bucket.url("run")).upload_once()
    with pytest.raises(ValueError, match="holds checkpoints of another run of this name, up to step 20"):
        mirror_of(tmp_path / "new", bucket.url("run")).check(continues=False)
    mirror_of(run, bucket.url("run")).check(continues=True)


def test_what_a_mirror_writes_has_to_be_what_it_reads(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = mirror_of(run, f"file://{tmp_path}/away")
    monkeypatch.setattr(mirror._store, "read", lambda key: b"something else")
    with pytest.raises(RuntimeError, match="reads otherwise than it was written"):
        mirror.check(continues=False)


def test_an_upload_that_arrives_short_is_found(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = mirror_of(run, f"file://{tmp_path}/away")
    store: RemoteStore = mirror._store
    monkeypatch.setattr(store, "upload", lambda key, path: store.write(key, path.read_bytes()[:-1]))
    assert not mirror.upload_once()
    assert "it is sent again" in str(mirror.status.last_error)
    assert remote_run(f"file://{tmp_path}/away").steps() == []


def test_a_read_only_place_refuses(run: Path, tmp_path: Path) -> None:
    away = tmp_path / "away"
    away.write_text("a file where a directory should be")
    with pytest.raises(RemoteRefused, match="cannot be used|no such place"):
        open_store(f"file://{away}").write("run/x", b"1")


def test_tagged_and_kept_checkpoints_stay_there_after_a_fresh_start(run: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/away/run"
    Checkpointer(run / "checkpoints").change_tags(lambda _: Tags().with_good(10))
    mirror_of(run, url).upload_once()
    back = tmp_path / "back" / "run"
    fetch_history(remote_run(url), back)
    fetch_newest(remote_run(url), back / "checkpoints")
    for step in (30, 40, 50):
        save(back, step)
        mirror_of(back, url).upload_once()
    assert whole_steps(url) == [10, 40, 50]


def test_epoch_files_that_were_deleted_here_go_there_once_replaced(run: Path, tmp_path: Path) -> None:
    mirror = mirror_of(run, f"file://{tmp_path}/away/run")
    mirror.upload_once()
    (run / "checkpoints" / "epoch_1.pt").unlink()
    mirror.upload_once()
    away = tmp_path / "away" / "run" / "checkpoints"
    assert (away / "epoch_1.pt").exists()
    (run / "checkpoints" / "epoch_2.pt").write_bytes(b"more")
    mirror.upload_once()
    mirror.upload_once()
    assert [path.name for path in away.glob("*.pt")] == ["epoch_2.pt"]


def test_large_files_that_grow_are_sent_when_they_have_grown_enough() -> None:
    sent = Sent("x", 100 << 20, None)
    assert not is_due(101 << 20, sent, final=False)
    assert is_due(101 << 20, sent, final=True)
    assert is_due(111 << 20, sent, final=False)
    assert is_due(50 << 20, sent, final=False)  # written anew
    assert is_due(1 << 20, Sent("x", 1 << 19, None), final=False)


def test_a_list_of_uploads_that_cannot_be_read_costs_time_only(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"file://{tmp_path}/away/run"
    mirror_of(run, url).upload_once()
    for content in ("{", "[]", json.dumps({"url": url})):
        (run / ".mirror.json").write_text(content)
        assert mirror_of(run, url).upload_once()
    assert "everything is uploaded again" in caplog.text


def test_a_key_that_leaves_the_run_directory_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = remote_run(f"file://{tmp_path}/away")
    monkeypatch.setattr(remote, "listing", lambda: {f"{tmp_path}/elsewhere": None})
    with pytest.raises(StorageError, match="outside of"):
        fetch_history(remote, tmp_path / "run")


def _during(mirror: Mirror, key: str, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Does something once, while a file is being uploaded."""
    upload, acts = mirror._store.upload, [act]

    def upload_meanwhile(sent: str, path: Path) -> None:
        if sent.endswith(key) and acts:
            acts.pop()()
        upload(sent, path)

    monkeypatch.setattr(mirror._store, "upload", upload_meanwhile)


@pytest.mark.parametrize("name", ["data.safetensors", "model.safetensors", "train.json"])
def test_a_checkpoint_that_retention_deletes_during_its_upload_is_left_out(
    run: Path, url: str, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = mirror_of(run, url)
    directory = run / "checkpoints" / "step_00000020"
    delete = Checkpointer(run / "checkpoints")._delete
    _during(mirror, f"step_00000020/{name}", lambda: delete(directory), monkeypatch)
    assert mirror.upload_once()
    assert not directory.exists()
    assert (mirror.status.failures, mirror.status.newest_step, caplog.text) == (0, 10, "")
    assert whole_steps(url) == [10]
    save(run, 30)
    assert mirror.upload_once()
    assert whole_steps(url) == [10, 30]
    assert not open_store(url).list("checkpoints/step_00000020/")


def test_a_checkpoint_that_is_replaced_during_its_upload_comes_with_the_next_round(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"file://{tmp_path}/away/run"
    mirror = mirror_of(run, url)

    def verify_meanwhile(directory: Path) -> None:
        monkeypatch.setattr("training.checkpoint.mirror.verify", verify)
        save(run, 20, value=7)
        raise DamagedCheckpoint("read half before and half after")

    monkeypatch.setattr("training.checkpoint.mirror.verify", verify_meanwhile)
    assert not mirror.upload_once()
    assert "damaged" not in caplog.text
    assert whole_steps(url) == [10]
    _during(mirror, "step_00000020/train.json", lambda: save(run, 20, value=8), monkeypatch)
    mirror.upload_once()
    assert whole_steps(url) == [10]
    assert mirror.upload_once()
    assert whole_steps(url) == [10, 20]
    assert remote_run(url).manifest(20) == verify(run / "checkpoints" / "step_00000020")


def test_a_file_that_is_deleted_while_files_are_listed_is_no_failure(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_symlink = Path.is_symlink

    def look_meanwhile(path: Path) -> bool:
        if path.name == "epoch_1.pt":
            path.unlink(missing_ok=True)
        return is_symlink(path)

    monkeypatch.setattr(Path, "is_symlink", look_meanwhile)
    assert mirror_of(run, f"file://{tmp_path}/away/run").upload_once()


class _Panic(BaseException):
    """What a client that is written in another language raises for its own mistakes."""


def test_a_client_that_panics_ends_neither_the_thread_nor_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = mirror_of(run, f"file://{tmp_path}/away/run")
    find, panics = mirror._store.list, [_Panic("index out of bounds")]

    def find_or_panic(prefix: str = "") -> dict[str, RemoteFile]:
        if panics:
            raise panics.pop()
        return find(prefix)

    monkeypatch.setattr(mirror._store, "list", find_or_panic)
    mirror.start()
    _wait_for(lambda: mirror.status.complete)
    assert mirror.status.failures == 1
    panics.extend([_Panic("again")] * 1000)
    status = mirror.finish(timeout_s=0.3)
    assert not status.complete


def test_finishing_hides_no_exception_that_is_on_its_way(run: Path, bucket: UploadBucket) -> None:
    """Neither if the storage refuses, nor if it hangs, nor if the run never came to its first step."""
    key = "run/checkpoints/step_00000020/data.safetensors"
    for fault in (Fault(status=403, code="AccessDenied"), Fault(stall_at=0, stall_s=3), None):
        bucket.faults(key, *([fault] if fault else []))
        mirror = mirror_of(run, bucket.url("run"))
        begun = time.monotonic()
        with pytest.raises(ZeroDivisionError):
            _fail_and_finish(mirror, begin=fault is not None)
        assert time.monotonic() - begun < 2
        assert not mirror.status.complete


def _fail_and_finish(mirror: Mirror, *, begin: bool) -> None:
    try:
        if begin:
            mirror.start()
        raise ZeroDivisionError
    finally:
        assert mirror.finish(timeout_s=0.5).last_error is not None
