"""Resuming is the same command: a driver that was killed and run again leaves what an undisturbed one leaves."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.storage import Storage
from tests.drivers import Driver, Drivers
from tests.small_run import contents, write_config


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drivers]:
    with Drivers(tmp_path_factory.mktemp("drivers")) as drivers:
        yield drivers


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def undisturbed(drivers: Drivers, config: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("undisturbed")
    assert drivers.run(command(config, place)).status == 0
    return contents(only_run(place))


def command(config: str, place: Path) -> list[str]:
    return ["run", config, "--storage", str(place), "--serial", "--quiet"]


def only_run(place: Path) -> Storage:
    (folder,) = place.iterdir()
    return Storage.open(str(folder))


def written(place: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}


def until(driver: Driver, place: Path, pattern: str, count: int) -> None:
    """Wait until so many objects are there."""
    while len(list(place.glob(f"*/{pattern}"))) < count and not driver.ended.is_set():
        time.sleep(0.002)


MOMENTS = [
    ("run.json", 1),
    ("map/start=0/theta.safetensors", 1),
    ("plan.json", 1),
    ("walks/shard=*/block=*.parquet", 1),
    ("walks/shard=*/block=*.parquet", 11),
    ("radius.json", 1),
    ("deformation/deformation.json", 1),
]


def test_resume_gives_what_an_undisturbed_run_gives(drivers: Drivers, config: str, tmp_path: Path, undisturbed):
    for pattern, count in MOMENTS:
        driver = drivers.start(command(config, tmp_path))
        until(driver, tmp_path, pattern, count)
        driver.send(signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL
    assert drivers.run(command(config, tmp_path)).status == 0
    assert contents(only_run(tmp_path)) == undisturbed


def test_a_finished_run_is_left_alone(drivers: Drivers, config: str, tmp_path: Path):
    assert drivers.run(command(config, tmp_path)).status == 0
    before = written(tmp_path)
    driver = drivers.run(command(config, tmp_path))
    assert driver.status == 0
    assert "nothing to do" in driver.output()
    assert written(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_keeps_what_is_committed_and_says_how_to_go_on(
    drivers: Drivers, config: str, tmp_path: Path, undisturbed, number: signal.Signals
):
    driver = drivers.start(command(config, tmp_path))
    until(driver, tmp_path, "walks/shard=*/block=*.parquet", 2)
    driver.send(number)
    assert driver.wait() == 130
    assert "goes on from there" in driver.output()
    there = contents(only_run(tmp_path))
    assert there.items() <= undisturbed.items()
    assert not list(tmp_path.rglob(".*.tmp"))
    assert drivers.run(command(config, tmp_path)).status == 0
    assert contents(only_run(tmp_path)) == undisturbed


def test_a_full_disk_stops_the_run_and_the_same_command_goes_on(
    drivers: Drivers, config: str, tmp_path: Path, undisturbed
):
    driver = drivers.run(command(config, tmp_path), file_limit=8000)  # enough for small objects, too little for others
    assert driver.status == 1
    assert "run again" in driver.output()
    assert not list(tmp_path.rglob(".*.tmp"))
    assert drivers.run(command(config, tmp_path)).status == 0
    assert contents(only_run(tmp_path)) == undisturbed


def test_two_drivers_at_once_are_harmless(drivers: Drivers, config: str, tmp_path: Path, undisturbed):
    pair = [drivers.start(command(config, tmp_path)) for _ in range(2)]
    assert [driver.wait() for driver in pair] == [0, 0], [driver.output() for driver in pair]
    assert contents(only_run(tmp_path)) == undisturbed


def objects(place: Path) -> dict[str, bytes]:
    """Every object of the one run, by its path below the run."""
    run = only_run(place)
    return {entry.path: run.read(entry.path) for entry in run.list()}


def spoil(data: bytes, rng: random.Random) -> bytes | None:
    """The bytes with one bit flipped or the end cut off; None for an object that is deleted."""
    way = rng.randrange(3)
    if way == 2:
        return None
    if way == 1:
        return data[: rng.randrange(len(data))]
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def test_a_finished_run_is_mended_whatever_object_is_damaged(drivers: Drivers, config: str, tmp_path: Path):
    assert drivers.run(command(config, tmp_path)).status == 0
    run, whole, rng = only_run(tmp_path), objects(tmp_path), random.Random(4)
    blocks = [path for path in whole if path.startswith("walks/")]
    # A document that is missing hides what it says of others: first everything but documents, then all of them.
    documents = [path for path in whole if path.endswith((".json", ".yaml", ".html"))]
    for broken in ([*rng.sample(blocks, 9), *sorted(set(whole) - set(blocks) - set(documents))], documents):
        for path in broken:
            data = spoil(whole[path], rng)
            run.delete(path) if data is None else run.replace(path, data)
        found = drivers.run(["verify", run.uri])
        assert found.status == 1
        assert all(path in found.output() for path in broken if path != "report.html"), found.output()
        assert drivers.run(["verify", run.uri, "--repair"]).status == 0
        assert drivers.run(command(config, tmp_path)).status == 0
        assert drivers.run(["verify", run.uri]).status == 0
        there = objects(tmp_path)
        assert [path for path in whole.keys() | there.keys() if whole.get(path) != there.get(path)] == []
