"""Which commands are read without being run, and where S3's settings come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.data.aws_command import parse_s3_copy
from training.data.aws_settings import find_settings, profile_credentials
from training.data.storage import AccessDenied


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("aws s3 cp s3://b/k.tar -", {}),
        ("  aws   s3 cp 's3://b/k.tar'  - ", {}),
        ("/usr/local/bin/aws s3 cp --quiet s3://b/k.tar - --only-show-errors --no-progress", {}),
        ("aws s3 cp s3://b/k.tar - --no-sign-request", {"anonymous": "true"}),
        ("aws --endpoint-url=http://h:1 s3 cp s3://b/k.tar -", {"endpoint": "http://h:1"}),
        ("aws --endpoint-url http://h:1 --region r s3 cp s3://b/k.tar -", {"endpoint": "http://h:1", "region": "r"}),
        ("aws s3 cp --profile p --expected-size 99 s3://b/k.tar -", {"profile": "p"}),
    ],
)
def test_copies_to_the_output_are_recognised(command: str, settings: dict[str, str]) -> None:
    copy = parse_s3_copy(command)
    assert copy is not None
    assert copy.url == "s3://b/k.tar"
    assert dict(copy.settings) == settings


@pytest.mark.parametrize(
    "command",
    [
        "aws s3 cp s3://b/k.tar - || true",
        "aws s3 cp s3://b/k.tar - | zcat",
        "aws s3 cp s3://b/k.tar - ; sleep 1",
        "aws s3 cp s3://b/$NAME.tar -",
        "aws s3 cp s3://b/`name`.tar -",
        "aws s3 cp s3://b/k*.tar -",
        "aws s3 cp s3://b/k.tar file.tar",
        "aws s3 cp file.tar s3://b/k.tar",
        "aws s3 cp s3://b/k.tar - --recursive",
        "aws s3 cp s3://b/k.tar - --sse-c AES256",
        "aws s3 cp s3://b/k.tar - --no-verify-ssl",
        "aws s3 cp s3://b/k.tar - --region",
        "aws s3 cp s3://b/d//k.tar -",
        "aws s3 cp s3://b/../k.tar -",
        "aws s3 cp s3://arn:aws:s3:::accesspoint/x/k.tar -",
        "aws s3 cp s3:///k.tar -",
        "aws s3 ls s3://b/k.tar -",
        "AWS_PROFILE=p aws s3 cp s3://b/k.tar -",
        "s5cmd cat s3://b/k.tar",
        "aws s3 cp 's3://b/k.tar -",
        "",
    ],
)
def test_every_other_command_is_left_to_the_shell(command: str) -> None:
    assert parse_s3_copy(command) is None


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty environment and a home directory with three profiles."""
    import os

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(
        "[default]\naws_access_key_id = default-key\naws_secret_access_key = s\n"
        "[team]\naws_access_key_id = team-key\naws_secret_access_key = s\naws_session_token = t\n"
    )
    (tmp_path / ".aws/config").write_text(
        "[default]\nregion = eu-west-1\n[profile team]\nregion = eu-west-2\nendpoint_url = https://team\n"
        "[profile login]\nsso_session = x\n"
    )
    return tmp_path


def test_the_default_profile_is_used_where_nothing_is_said(home: Path) -> None:
    settings = find_settings({})
    assert (settings.profile, settings.region, settings.endpoint) == ("default", "eu-west-1", None)
    assert profile_credentials("default")()["access_key_id"] == "default-key"


def test_flags_win_over_the_environment_and_that_over_the_profile(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert find_settings({})[:2] == ("https://team", "eu-west-2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://all")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-1")
    assert find_settings({})[:2] == ("https://all", "us-west-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://s3")
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    assert find_settings({})[:2] == ("https://s3", "us-west-2")
    assert find_settings({"endpoint": "https://flag", "region": "r"})[:2] == ("https://flag", "r")


def test_keys_in_the_environment_win_over_aws_profile_but_not_over_the_flag(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert find_settings({}).profile is None
    assert find_settings({"profile": "default"}).profile == "default"
    assert find_settings({"anonymous": "true", "profile": "default"}).profile is None


def test_keys_that_another_program_replaces_are_read_again(home: Path) -> None:
    provider = profile_credentials("team")
    assert provider()["token"] == "t"
    file = home / ".aws/credentials"
    file.write_text(file.read_text().replace("team-key", "new-key"))
    assert provider()["access_key_id"] == "new-key"


@pytest.mark.parametrize("name", ["AWS_NO_SIGN_REQUEST", "AWS_SKIP_SIGNATURE"])
def test_public_data_need_no_keys(home: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "true")
    assert find_settings({}).anonymous


def test_missing_profiles_keys_and_broken_files_are_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AccessDenied, match="no AWS profile 'typo'"):
        find_settings({"profile": "typo"})
    monkeypatch.setenv("AWS_CONFIG_FILE", str(home / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(home / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(AccessDenied, match="No credentials for S3.*AWS_EC2_METADATA_DISABLED"):
        find_settings({})
    (home / "none").write_text("no ini file")
    with pytest.raises(AccessDenied, match="none cannot be read"):
        find_settings({})


def test_a_profile_that_logs_in_elsewhere_needs_boto3(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_settings({"profile": "login"}).profile == "login"
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)
    with pytest.raises(AccessDenied, match="profile 'login' logs in by SSO.*pip install boto3"):
        profile_credentials("login")
