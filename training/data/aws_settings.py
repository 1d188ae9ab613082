"""Finds S3's endpoint, region and credentials where the AWS command finds them.

obstore itself knows the environment's keys, web identity, container and instance roles, and renews what expires. What
it does not know is here: the files in ~/.aws, and the variables that only the command reads.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from training.data.storage_errors import AccessDenied

_REREAD = timedelta(minutes=10)
"""Keys in a file may be temporary and be replaced by another program before they expire."""
_LOGINS = ("sso_session", "sso_start_url", "role_arn", "credential_process", "login_session")
_KEYS = "AWS_ACCESS_KEY_ID"
_ANONYMOUS = ("AWS_NO_SIGN_REQUEST", "AWS_SKIP_SIGNATURE")


class S3Settings(NamedTuple):
    """Everything that tells one S3 client from another."""

    endpoint: str | None
    region: str
    anonymous: bool
    profile: str | None
    """Whose keys in ~/.aws are used; None: obstore finds the credentials."""
    environment: tuple[str | None, ...]
    """The environment's keys, so that new keys make a new client."""


def find_settings(given: Mapping[str, str]) -> S3Settings:
    """Settings for ``given`` flags of the AWS command (endpoint, region, profile, anonymous), if there are any.

    Raises:
        AccessDenied: there is no such profile, or this machine has no credentials.
    """
    env = os.environ
    profile = given.get("profile") or env.get("AWS_PROFILE") or env.get("AWS_DEFAULT_PROFILE")
    section = read_profile(profile or "default")
    if profile is not None and not section:
        raise AccessDenied(f"There is no AWS profile {profile!r} in {_credentials_file()}: correct AWS_PROFILE.")
    endpoint = _first(given.get("endpoint"), env, "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    region = _first(given.get("region"), env, "AWS_REGION", "AWS_DEFAULT_REGION")
    anonymous = "anonymous" in given or any(_is_set(env, name) for name in _ANONYMOUS)
    # As the command: keys in the environment win over AWS_PROFILE, and lose against --profile.
    elsewhere = _KEYS in env or "AWS_WEB_IDENTITY_TOKEN_FILE" in env
    from_file = not anonymous and bool(section) and ("profile" in given or not elsewhere) and _has_login(section)
    if not (anonymous or from_file or elsewhere) and _is_set(env, "AWS_EC2_METADATA_DISABLED") and not _in_container():
        raise AccessDenied(no_credentials("AWS_EC2_METADATA_DISABLED is set"))
    return S3Settings(
        endpoint=endpoint or section.get("endpoint_url"),
        region=region or section.get("region") or "us-east-1",
        anonymous=anonymous,
        profile=(profile or "default") if from_file else None,
        environment=tuple(env.get(name) for name in (_KEYS, "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")),
    )


def no_credentials(why: str) -> str:
    """What to do without credentials."""
    return (
        f"No credentials for S3: neither the environment nor {_credentials_file()} has keys, and this machine gives "
        f"none ({why}). Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for public data "
        "AWS_NO_SIGN_REQUEST=1."
    )


def profile_credentials(profile: str) -> Any:
    """A function that obstore calls for the keys of a profile, again whenever they may have changed.

    Raises:
        AccessDenied: the profile logs in by SSO, a role or a process, and boto3 is not installed.
    """
    if "aws_access_key_id" in read_profile(profile):
        return FileCredentials(profile)
    try:
        # Optional: only for profiles that log in somewhere, which botocore can do and nobody should write again.
        import boto3  # type: ignore[import-untyped, unused-ignore]
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise AccessDenied(
            f"AWS profile {profile!r} logs in by SSO, a role or a process, which needs boto3: `pip install boto3`, or "
            "run `eval $(aws configure export-credentials --format env)` first, or pass --s3-native off."
        ) from None
    return Boto3CredentialProvider(boto3.Session(profile_name=profile), ttl=_REREAD)


class FileCredentials:
    """The keys of a profile, read from its file each time they are asked for."""

    def __init__(self, profile: str) -> None:
        self._profile = profile

    def __call__(self) -> dict[str, Any]:
        section = read_profile(self._profile)
        return {
            "access_key_id": section["aws_access_key_id"],
            "secret_access_key": section["aws_secret_access_key"],
            "token": section.get("aws_session_token"),
            "expires_at": datetime.now(UTC) + _REREAD,
        }


def read_profile(name: str) -> dict[str, str]:
    """What both files in ~/.aws say about a profile; the credentials file wins."""
    config = Path(os.environ.get("AWS_CONFIG_FILE") or Path.home() / ".aws" / "config")
    return _section(config, f"profile {name}", name) | _section(_credentials_file(), name)


def _credentials_file() -> Path:
    return Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or Path.home() / ".aws" / "credentials")


def _section(path: Path, *names: str) -> dict[str, str]:
    parser = configparser.RawConfigParser()
    try:
        parser.read(path)
    except (configparser.Error, UnicodeDecodeError, OSError) as error:
        raise AccessDenied(f"{path} cannot be read ({' '.join(str(error).split())}): correct it.") from error
    return next((dict(parser[name]) for name in names if parser.has_section(name)), {})


def _has_login(section: Mapping[str, str]) -> bool:
    return any(name in section for name in ("aws_access_key_id", *_LOGINS))


def _in_container() -> bool:
    names = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
    return any(name in os.environ for name in names)


def _is_set(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").lower() in ("1", "true", "yes", "on")


def _first(given: str | None, env: Mapping[str, str], *names: str) -> str | None:
    return given or next((env[name] for name in names if env.get(name)), None)
