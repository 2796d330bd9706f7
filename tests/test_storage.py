"""Storage: the first writer of a name wins, on a disk and on S3, and what is stored is read back."""

from __future__ import annotations

import json
import os
import pickle
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.backends.s3 import PART
from pipeline.errors import InputError, RunError
from pipeline.storage import Storage


@pytest.fixture
def storage(root: str) -> Storage:
    return Storage.open(root)


def test_what_is_created_is_read_back(storage: Storage):
    assert storage.create("a/b/data.bin", b"0123456789")
    assert storage.read("a/b/data.bin") == b"0123456789"
    assert storage.read_range("a/b/data.bin", 3, 4) == b"3456"
    assert storage.size("a/b/data.bin") == 10
    assert storage.child("a").exists("b/data.bin")
    with storage.open_input("a/b/data.bin") as file:
        assert file.seek(-2, os.SEEK_END) == 8
        assert file.read() == b"89"


def test_a_taken_name_keeps_its_first_bytes(storage: Storage):
    assert storage.create("name", b"first")
    assert not storage.create("name", b"second")
    assert storage.read("name") == b"first"


def test_eight_writers_have_one_winner(storage: Storage):
    for turn in range(3):
        barrier = threading.Barrier(8)

        def write(number: int, barrier: threading.Barrier = barrier, turn: int = turn) -> bool:
            own = pickle.loads(pickle.dumps(storage))
            barrier.wait()
            return own.create(f"race-{turn}", b"%d" % number * 1000)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(write, range(8)))
        assert sum(won) == 1
        assert storage.read(f"race-{turn}") == b"%d" % won.index(True) * 1000


def test_large_objects_are_committed_in_one_step(storage: Storage):
    data = os.urandom(PART) * 2 + b"the rest"
    pieces = [data[i : i + 2**20] for i in range(0, len(data), 2**20)]

    def write(file) -> None:  # the way a block is sealed: the end is changed when all the rest is written
        file.writelines(pieces[:-1] + [b"the seal"])
        file.seek(-4, 2)
        assert file.read() == b"seal"
        file.seek(-4, 2)
        file.write(b"rest")

    assert storage.create_from("large", write)
    assert storage.read("large") == data
    assert not storage.create("large", data[::-1])
    assert storage.read_range("large", len(data) - 4, 4) == b"rest"
    assert storage.sweep(min_age=0) == []


@pytest.mark.parametrize("size", [4, 3 * PART])
def test_a_writer_that_fails_leaves_nothing(storage: Storage, size: int):
    def write(file):
        file.write(bytes(size))
        raise ValueError("on the way")

    with pytest.raises(ValueError, match="on the way"):
        storage.create_from("name", write)
    assert storage.list() == []
    assert storage.sweep(min_age=0) == []
    assert storage.create("name", b"whole")


def test_listing_is_paged_sorted_and_filtered(storage: Storage):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: storage.create(f"many/{n:05d}.x", b""), range(1100)))
    storage.create("many/other.y", b"12")
    storage.create("manyfold.x", b"")
    assert [entry.path for entry in storage.list("many", ".x")] == [f"many/{n:05d}.x" for n in range(1100)]
    assert [(entry.path, entry.size) for entry in storage.list("many", ".y")] == [("many/other.y", 2)]
    assert storage.list("nowhere") == []


def test_replace_and_delete(storage: Storage):
    storage.replace_json("value.json", {"b": 1, "a": [2.5]})
    storage.replace_json("value.json", {"a": 3})
    assert storage.read_json("value.json") == {"a": 3}
    storage.delete("value.json")
    storage.delete("value.json")
    assert not storage.exists("value.json")
    with pytest.raises(FileNotFoundError):
        storage.read("value.json")
    with pytest.raises(FileNotFoundError):
        storage.open_input("value.json")


def test_a_json_object_that_is_not_json_is_named(storage: Storage):
    storage.create("plan.json", b"{")
    with pytest.raises(RunError, match=r"plan\.json is damaged: it is not JSON"):
        storage.read_json("plan.json")


def test_a_json_object_of_which_any_byte_changed_is_refused(tmp_path: Path):
    storage = Storage.open(str(tmp_path))
    value = {"b": [1.5, None, {"10": 1, "2": "two"}], "a": 1e-9}
    storage.create_json("value.json", value)
    data = storage.read("value.json")
    assert storage.read_json("value.json") == value
    for place in range(len(data)):
        for changed in (data[:place], data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]):
            storage.replace("value.json", changed)
            with pytest.raises(RunError, match="is damaged"):
                storage.read_json("value.json")


def test_stored_json_is_the_same_text_for_the_same_value(tmp_path: Path):
    storage = Storage.open(str(tmp_path))
    storage.create_json("a", {"x": 1, "y": 2})
    storage.create_json("b", {"y": 2, "x": 1})
    assert storage.read("a") == storage.read("b")
    assert json.loads(storage.read("a")).items() >= {"x": 1, "y": 2}.items()
    with pytest.raises(ValueError, match="JSON"):
        storage.create_json("c", {"x": float("nan")})


def test_check_writable_leaves_no_trace(storage: Storage):
    storage.check_writable()
    assert storage.list() == []
    if storage.protocol == "file":
        assert not Path(storage.uri).exists()


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a//b", "", ".", "a\\b", "a/./b", "x\0"])
def test_names_cannot_leave_the_root(tmp_path: Path, path: str):
    storage = Storage.open(str(tmp_path))
    for call in (storage.read, storage.exists, storage.delete, storage.child, lambda p: storage.create(p, b"")):
        with pytest.raises(InputError):
            call(path)


def test_a_symbolic_link_cannot_lead_out_of_the_root(tmp_path: Path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="symbolic link"):
        Storage.open(str(tmp_path / "root")).create("link/x", b"")
    assert list((tmp_path / "outside").iterdir()) == []


def test_any_fsspec_place_works():
    storage = Storage.open(f"memory://{os.urandom(4).hex()}/x")
    storage.check_writable()
    assert storage.create("a", b"1")
    assert not storage.create("a", b"2")
    assert storage.read_range("a", 0, 1) == b"1"
    assert [entry.path for entry in storage.list()] == ["a"]
    storage.delete("a")
    assert not storage.exists("a")


def test_left_over_files_of_dead_writers_are_swept_and_live_ones_are_not(tmp_path: Path):
    storage = Storage.open(str(tmp_path))
    storage.create("walks/block", b"whole")
    host = socket.gethostname().replace(".", "-")
    dead, live, foreign = (tmp_path / "walks" / f".block.{name}.0123abcd.tmp" for name in
                           (f"{host}.4194304", f"{host}.{os.getpid()}", "elsewhere.17"))  # fmt: skip
    for path in (dead, live, foreign):
        path.write_bytes(b"half")
    assert [entry.path for entry in storage.list()] == ["walks/block"]
    assert storage.sweep() == [str(dead.relative_to(tmp_path))]
    assert live.exists()
    assert foreign.exists()
    assert sorted(storage.sweep(min_age=-1)) == sorted(str(path.relative_to(tmp_path)) for path in (live, foreign))
