"""No secret is in any object, output or error of a full run on S3, whatever goes wrong on the way."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.storage import Storage
from tests.drivers import Driver, Drivers
from tests.s3server import KEY, SECRET, S3Server
from tests.small_run import write_config

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drivers]:
    with Drivers(tmp_path_factory.mktemp("drivers")) as drivers:
        yield drivers


def fiberwalk(drivers: Drivers, server: S3Server, *arguments: str, **environment: str) -> Driver:
    return drivers.run(arguments, environment=server.environment | environment)


def test_nothing_that_a_run_writes_or_says_holds_a_secret(drivers: Drivers, s3: S3Server, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    place = f"s3://{s3.bucket}/secrets"
    done = fiberwalk(drivers, s3, "run", config, "--serial", "--storage", place)
    assert done.status == 0, done.output()
    (run,) = {entry.path.split("/")[0] for entry in Storage.open(place).list()}
    uri = f"{place}/{run}"
    said = [done.output()]
    for command in (
        ["status", uri], ["verify", uri], ["report", uri],
        ["export", uri, "--format", "arviz", "--out", f"{place}/out.nc"],
        ["export", uri, "--format", "parquet", "--out", str(tmp_path / "here.parquet")],
        ["sample", uri, "--draws", "10", "--out", f"{place}/draws.parquet"],
    ):  # fmt: skip
        answer = fiberwalk(drivers, s3, *command)
        assert answer.status == 0, answer.output()
        said.append(answer.output())
    assert all(said)
    objects = {entry.path: Storage.open(place).read(entry.path) for entry in Storage.open(place).list()}
    objects |= {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(objects) > 15
    for secret in (KEY, SECRET):
        assert not [name for name, data in objects.items() if secret.encode() in data]
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
def test_no_error_repeats_a_secret(drivers: Drivers, s3: S3Server, tmp_path: Path, changed: dict[str, str]) -> None:
    arguments = ["run", write_config(tmp_path), "--serial", "--storage", f"s3://{s3.bucket}/refused"]
    failed = fiberwalk(drivers, s3, *arguments, **changed)
    assert failed.status == 2 and failed.output(), failed.output()
    assert SECRET not in failed.output() and KEY not in failed.output()
