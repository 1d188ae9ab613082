from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.factories import write_shards
from training.data.shards import count_samples, expand_shards, require_num_samples, storage_location


def test_sources_braces_and_factors_expand_in_order(tmp_path: Path) -> None:
    first = write_shards(tmp_path / "a", shards=2, samples=1)
    shards = expand_shards(f"{first}::pipe:cat x/{{0..2}}.tar", upsampling_factors="1::2.5")
    assert [url.rsplit("/", 1)[-1] for url in shards.urls] == ["000.tar", "001.tar", "0.tar", "1.tar", "2.tar"]
    assert shards.urls[2] == "pipe:cat x/0.tar"
    assert shards.weights == (1.0, 1.0, 2.5, 2.5, 2.5)


def test_globs_and_directories_expand_sorted(tmp_path: Path) -> None:
    write_shards(tmp_path, shards=3, samples=1)
    expected = tuple(str(tmp_path / f"{i:03d}.tar") for i in range(3))
    assert expand_shards(f"{tmp_path}/*.tar").urls == expected
    assert expand_shards(str(tmp_path)).urls == expected


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No shard matches .*/\*\.tar.*--train-data"):
        expand_shards(f"{tmp_path}/*.tar")


def test_an_empty_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no .tar file"):
        expand_shards(str(tmp_path))


def test_missing_shards_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, shards=2, samples=1).replace("001", "003")
    with pytest.raises(ValueError, match=r"2 of 4 shards do not exist, first .*002\.tar"):
        expand_shards(pattern)


def test_factors_must_match_sources() -> None:
    with pytest.raises(ValueError, match="2 upsampling factors for 1 sources"):
        expand_shards("pipe:cat a.tar", upsampling_factors="1::2")


def test_samples_are_counted_from_sizes_json_then_len_then_flag(tmp_path: Path) -> None:
    shards = expand_shards(write_shards(tmp_path, shards=3, samples=5))
    assert count_samples(shards) == 15
    (tmp_path / "sizes.json").unlink()
    assert count_samples(shards) is None
    with pytest.raises(ValueError, match=r"samples in 3 shards is unknown.*--train-num-samples"):
        require_num_samples(None, shards, flag="--train-num-samples")
    assert require_num_samples(7, shards, flag="--train-num-samples") == 7
    (tmp_path / "__len__").write_text("12")
    assert count_samples(shards) == 12


def test_a_shard_missing_in_sizes_json_makes_the_count_unknown(tmp_path: Path) -> None:
    shards = expand_shards(write_shards(tmp_path, shards=2, samples=5))
    (tmp_path / "sizes.json").write_text(json.dumps({"000.tar": 5}))
    assert count_samples(shards) is None


def test_the_digest_depends_on_order_and_weights() -> None:
    digests = {
        expand_shards("pipe:a::pipe:b").digest,
        expand_shards("pipe:b::pipe:a").digest,
        expand_shards("pipe:a::pipe:b", upsampling_factors="1::2").digest,
    }
    assert len(digests) == 3


def test_the_shards_of_a_source_are_neighbours_and_know_it() -> None:
    shards = expand_shards("s3://b/{0..2}.tar::pipe:cat x/{0..1}.tar")
    assert [(source.first, source.num_shards) for source in shards.sources] == [(0, 3), (3, 2)]
    assert shards.source_of_shard.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("factors", ["1::x", "-1::2", "nan::1", "0::0", "inf::1"])
def test_factors_that_are_no_weights_are_errors(factors: str) -> None:
    with pytest.raises(ValueError, match=f"--train-data-upsampling-factors '{factors}'"):
        expand_shards("pipe:a::pipe:b", upsampling_factors=factors)


@pytest.mark.parametrize("pattern", ["", "::"])
def test_an_empty_pattern_is_an_error(pattern: str) -> None:
    with pytest.raises(ValueError, match="names no shards: correct --train-data"):
        expand_shards(pattern)


def test_an_unbalanced_brace_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Pattern 's3://b/\{0..2.tar' cannot be expanded .*correct --train-data"):
        expand_shards("s3://b/{0..2.tar")


@pytest.mark.parametrize("head", ["s3://b/", "pipe:aws s3 cp s3://b/", "/nowhere/"])
def test_the_names_of_laion_2b_expand_in_a_fraction_of_a_second(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[object] = []
    monkeypatch.setattr(os.path, "isdir", looked_up.append)

    def exists(path: str) -> bool:
        looked_up.append(path)
        return True

    monkeypatch.setattr(os.path, "exists", exists)
    start = time.process_time()
    shards = expand_shards(head + "{000000..231349}.tar")
    assert time.process_time() - start < 2  # 0.3 s on an idle core
    assert len(shards.urls) == 231_350
    assert shards.urls[231_349] == head + "231349.tar"
    assert len(looked_up) < 1100


@pytest.mark.parametrize(
    ("url", "location"),
    [
        ("a/0.tar", "a/0.tar"),
        ("pipe:aws s3 cp s3://b/a/0.tar -", "s3://b/a/0.tar"),
        ("pipe:aws s3 cp 's3://b/a/0.tar' - | cat", "s3://b/a/0.tar"),
        ("pipe:curl -s https://h/0.tar", "https://h/0.tar"),
        ("pipe:aws --endpoint-url http://h:9000 s3 cp s3://b/0.tar -", "s3://b/0.tar"),
        ("pipe:cat s3://b/0.tar s3://b/1.tar", None),
        ("pipe:zcat a/0.tar.gz", None),
    ],
)
def test_the_place_that_a_pipe_reads_from_is_recognized(url: str, location: str | None) -> None:
    assert storage_location(url) == location


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sizes.json", "{", "sizes.json' is not JSON"),
        ("sizes.json", "[]", "sizes.json' is no object of shard names"),
        ("sizes.json", '{"000.tar": "many"}', "sizes.json' gives 'many' samples for '000.tar'"),
        ("__len__", "many", "__len__' holds no number .'many'."),
    ],
)
def test_broken_counts_are_errors_that_name_the_file(tmp_path: Path, name: str, text: str, message: str) -> None:
    shards = expand_shards(write_shards(tmp_path, shards=1, samples=1))
    (tmp_path / "sizes.json").unlink()
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        count_samples(shards)


class _Files(BaseHTTPRequestHandler):
    """A directory over HTTP, in ranges; what is called ``denied`` is not for everybody."""

    def __init__(self, directory: Path, *args: Any) -> None:
        self.directory = directory
        super().__init__(*args)

    def do_GET(self) -> None:
        file = self.directory / self.path.lstrip("/")
        if "denied" in self.path or not file.is_file():
            self.send_error(403 if "denied" in self.path else 404)
            return
        data = file.read_bytes()
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def file_server(tmp_path: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, tmp_path))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("command", ["", "pipe:curl -s "])
def test_remote_samples_are_counted_beside_the_shards(file_server: str, tmp_path: Path, command: str) -> None:
    write_shards(tmp_path, shards=3, samples=5)
    shards = expand_shards(f"{command}{file_server}/{{000..002}}.tar")
    assert count_samples(shards) == 15
    (tmp_path / "sizes.json").unlink()
    assert count_samples(shards) is None


def test_samples_are_counted_at_the_endpoint_that_a_pipe_names(file_server: str, tmp_path: Path) -> None:
    write_shards(tmp_path / "bucket" / "a", shards=3, samples=5)
    pattern = "s3://bucket/a/{000..002}.tar"
    shards = expand_shards(f"pipe:aws s3 cp {pattern} - --endpoint-url {file_server} --no-sign-request")
    assert count_samples(shards) == 15


def test_counts_that_may_not_be_read_are_unknown_with_a_warning(
    file_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert count_samples(expand_shards(f"{file_server}/denied/{{0..1}}.tar")) is None
    assert "denied/0.tar' could not be read" in caplog.text


def test_counts_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    shards = expand_shards(write_shards(tmp_path, shards=1, samples=1))
    (tmp_path / "sizes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"sizes.json' is not UTF-8 text"):
        count_samples(shards)
