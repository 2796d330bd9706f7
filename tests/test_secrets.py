"""No secret is in any object, output or error of a full run on S3, whatever goes wrong on the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.storage import Storage
from tests.s3server import KEY, SECRET, S3Server
from tests.small_run import write_config

pytestmark = pytest.mark.s3


def fiberwalk(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    variables = {**os.environ, "FIBERWALK_STORAGE_PATIENCE": "2", "PYTHONPATH": os.getcwd(), **environment}
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240
    )


def test_nothing_that_a_run_writes_or_says_holds_a_secret(s3: S3Server, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    place = f"s3://{s3.bucket}/secrets"
    done = fiberwalk("run", config, "--serial", "--storage", place, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    (run,) = {entry.path.split("/")[0] for entry in Storage.open(place).list()}
    uri = f"{place}/{run}"
    said = [done.stdout]
    for command in (
        ["status", uri], ["verify", uri], ["report", uri],
        ["export", uri, "--format", "arviz", "--out", f"{place}/out.nc"],
        ["export", uri, "--format", "parquet", "--out", "here.parquet"],
        ["sample", uri, "--draws", "10", "--out", f"{place}/draws.parquet"],
    ):  # fmt: skip
        answer = fiberwalk(*command, cwd=tmp_path)
        assert answer.returncode == 0, answer.stdout
        said.append(answer.stdout)
    objects = {entry.path: Storage.open(place).read(entry.path) for entry in Storage.open(place).list()}
    objects |= {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(objects) > 15
    for secret in (KEY.encode(), SECRET.encode()):
        assert not [name for name, data in objects.items() if secret in data]
        assert not [text for text in said if secret in text]


@pytest.mark.parametrize(
    "changed",
    [
        {"AWS_SECRET_ACCESS_KEY": SECRET + "-wrong"},
        {"AWS_ACCESS_KEY_ID": KEY + "-unknown"},
        {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
        {"AWS_SECRET_ACCESS_KEY": SECRET + "-wrong", "FIBERWALK_DEBUG": "1"},
    ],
)
def test_no_error_repeats_a_secret(s3: S3Server, tmp_path: Path, changed: dict[str, str]) -> None:
    config = write_config(tmp_path)
    failed = fiberwalk("run", config, "--serial", "--storage", f"s3://{s3.bucket}/refused", cwd=tmp_path, **changed)
    assert failed.returncode == 2, failed.stdout
    assert SECRET.encode() not in failed.stdout and KEY.encode() not in failed.stdout
