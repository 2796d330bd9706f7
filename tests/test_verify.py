"""verify names everything that is wrong with a store, repair removes exactly that, and status asks only for names."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest

from pipeline.documents import sealed_text
from pipeline.errors import InputError, RunError
from pipeline.plan import BlockKey
from pipeline.stages.status import status, status_table
from pipeline.stages.verify import repair, verify
from pipeline.store import SampleBlock, SampleStore
from tests.blocks import keys, make_block, make_plan, make_store


def kinds(findings) -> dict[str, str]:
    return {finding.path: finding.kind for finding in findings.findings}


def test_a_sound_store_is_sound(root: str):
    plan = make_plan()
    make_store(root, plan)
    found = verify(root)
    assert found.sound
    assert found.complete
    assert found.findings == []
    assert (found.blocks, found.rows) == (len(keys(plan)), plan.rows)
    assert "sound" in str(found)
    assert found.to_json()["complete"] is True


def test_blocks_that_are_not_computed_yet_are_not_wrong(tmp_path: Path):
    plan = make_plan()
    store = make_store(str(tmp_path), plan, fill=False)
    store.commit(make_block(plan, BlockKey(0, 0)))
    found = verify(str(tmp_path))
    assert found.sound
    assert not found.complete
    assert found.blocks == 1


def test_gaps_are_named(tmp_path: Path):
    plan = make_plan()
    store = make_store(str(tmp_path), plan)
    store.storage.delete(BlockKey(1, 1).path)
    store.storage.delete(BlockKey(2, 3).path)
    assert kinds(verify(str(tmp_path))) == {BlockKey(1, 1).path: "gap"}
    store.storage.create_json("radius.json", {"blocks": "", "noise_factor": 1.0})  # sampling was finished once
    assert kinds(verify(str(tmp_path))) == {BlockKey(1, 1).path: "gap", BlockKey(2, 3).path: "gap"}
    assert repair(str(tmp_path)).removed == []


def damage(data: bytes, rng: random.Random) -> bytes:
    """Flip one to three bits, cut the end off, or put something else in place of a stretch."""
    way = rng.randrange(3)
    if way == 0:
        flipped = bytearray(data)
        for place in rng.sample(range(len(data)), rng.randint(1, 3)):
            flipped[place] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if way == 1:
        return data[: rng.randrange(len(data))]
    low = rng.randrange(len(data) - 1)
    high = min(len(data), low + rng.randint(1, 64))
    return data[:low] + bytes(255 - byte for byte in data[low:high]) + data[high:]


def damage_and_repair(uri: str, blocks: int, seed: int) -> None:
    plan = make_plan(walks=4 * -(-blocks // 4), walks_per_shard=4, starts=1)
    store = make_store(uri, plan)
    original = {key: store.storage.read(key.path) for key in keys(plan)}
    rng = random.Random(seed)
    broken = sorted(rng.sample(keys(plan), blocks))
    for key in broken:
        store.storage.replace(key.path, damage(original[key], rng))
    found = repair(uri)
    assert {path for path, kind in kinds(found).items() if kind != "gap"} == {key.path for key in broken}
    assert sorted(found.removed) == [key.path for key in broken]
    assert sorted(store.entries()) == [key for key in keys(plan) if key not in broken]
    for key in broken:
        store.commit(make_block(plan, key))
    assert verify(uri).sound
    assert all(store.storage.read(key.path) == data for key, data in original.items())


def test_every_damaged_block_is_found_removed_and_equal_after_the_redo(root: str):
    damage_and_repair(root, 20, seed=1)


@pytest.mark.slow
def test_two_hundred_damaged_blocks_are_found_removed_and_equal_after_the_redo(root: str):
    damage_and_repair(root, 200, seed=2)


def test_foreign_files_and_copies_are_named_and_removed_from_among_the_blocks(root: str):
    plan = make_plan()
    store = make_store(root, plan)
    digest, rows = store.digest(), store.dataset().count_rows()
    copies = [f"walks/{name}.parquet" for name in ("shard=00000/block=00000 copy", "shard=00099/block=00000", "x")]
    foreign = ["walks/shard=00000/junk.parquet", "walks/notes.txt"]
    for path in copies:
        store.storage.create(path, store.storage.read(BlockKey(1, 1).path))
    for path in foreign:
        store.storage.create(path, b"mine")
    assert (store.digest(), store.dataset().count_rows()) == (digest, rows)  # our own readers never see them
    found = repair(root)
    assert kinds(found) == {**dict.fromkeys(copies, "duplicate"), **dict.fromkeys(foreign, "foreign")}
    assert f"it holds the rows of {BlockKey(1, 1).path}" in str(found)
    assert sorted(found.removed) == sorted([*copies, *foreign])
    assert verify(root).findings == []


def test_a_sound_block_under_another_name_is_wrong(tmp_path: Path):
    plan = make_plan(starts=1, walks=8)
    store = make_store(str(tmp_path), plan)
    store.storage.replace(BlockKey(0, 0).path, store.storage.read(BlockKey(1, 0).path))
    store.storage.replace(BlockKey(0, 1).path, store.storage.read(BlockKey(0, 2).path))
    found = verify(str(tmp_path))
    assert kinds(found) == {BlockKey(0, 0).path: "wrong", BlockKey(0, 1).path: "wrong"}
    assert "walk 4 in row 0, planned is 0" in str(found)


@pytest.mark.parametrize("change", ["run", "layout", "length"])
def test_a_block_of_another_run_is_wrong(tmp_path: Path, change: str):
    plan = make_plan()
    store = make_store(str(tmp_path), plan)
    other = {
        "run": plan,
        "layout": make_plan(parameters=[{"name": "v", "shape": [7]}]),
        "length": make_plan(length=2.0),
    }
    store.storage.delete(BlockKey(1, 2).path)
    run_id = "other" if change == "run" else store.run_id
    SampleStore(store.storage, other[change], run_id).commit(make_block(other[change], BlockKey(1, 2)))
    assert kinds(repair(str(tmp_path))) == {BlockKey(1, 2).path: "wrong"}
    assert not store.storage.exists(BlockKey(1, 2).path)


@pytest.mark.parametrize("status_of_row", ["ok", "diverged"])
def test_positions_that_are_not_finite_belong_to_diverged_walks(tmp_path: Path, status_of_row: str):
    plan = make_plan()
    store = make_store(str(tmp_path), plan)
    block = make_block(plan, BlockKey(1, 1))
    block.theta[2, 3] = np.nan
    block.potential[2] = np.inf
    status_column = [status_of_row if row == 2 else "ok" for row in range(len(block.walk))]
    store.storage.delete(BlockKey(1, 1).path)
    store.commit(SampleBlock(**{**vars(block), "status": status_column}))
    expected = {BlockKey(1, 1).path: "values"} if status_of_row == "ok" else {}
    assert kinds(verify(str(tmp_path))) == expected


def test_results_of_other_blocks_are_stale_and_removed_together(tmp_path: Path):
    store = make_store(str(tmp_path), make_plan(starts=1))
    for path, field in (("radius.json", "noise_factor"), ("evaluation.json", "methods")):
        store.storage.create_json(path, {"blocks": store.digest(), field: 1.0})
    store.storage.create_json("deformation/deformation.json", {"trained_on": "another store", "kind": "residual"})
    store.storage.create("deformation/weights.safetensors", b"")
    facts = {"weights_sha256": hashlib.sha256(b"").hexdigest()}
    store.storage.create_json("deformation/start=0/fit.json", facts)
    store.storage.create("report.html", sealed_text(b"<!doctype html>\n"))
    found = repair(str(tmp_path))
    assert kinds(found) == {"deformation/deformation.json": "stale"}
    names = ("deformation.json", "weights.safetensors", "start=0/fit.json")
    assert set(found.removed) == {"report.html", *(f"deformation/{name}" for name in names)}
    assert verify(str(tmp_path)).sound


def test_a_damaged_map_estimate_is_found(tmp_path: Path):
    store = make_store(str(tmp_path), make_plan())
    store.storage.create("map/start=0/theta.safetensors", b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    store.storage.replace_json("map/start=0/map.json", {"files": {"theta.safetensors": digest}, "lambda_max": 1.0})
    assert verify(str(tmp_path)).sound
    store.storage.replace("map/start=0/theta.safetensors", b"weighty")
    assert kinds(verify(str(tmp_path))) == {"map/start=0/theta.safetensors": "damaged"}


def test_what_killed_writers_left_is_never_counted_and_is_swept(tmp_path: Path):
    plan = make_plan()
    make_store(str(tmp_path), plan)
    left = tmp_path / "walks" / "shard=00000" / ".block=00000.parquet.elsewhere.17.0123abcd.tmp"
    left.write_bytes(b"half")
    import os

    os.utime(left, (0, 0))
    assert verify(str(tmp_path)).findings == []
    assert repair(str(tmp_path)).removed == [str(left.relative_to(tmp_path))]
    assert not left.exists()


def test_status_counts_names(root: str):
    plan = make_plan()
    store = make_store(root, plan, fill=False)
    assert status(root)["rows"] == {"done": 0, "planned": plan.rows}
    for key in keys(plan)[:6]:
        store.commit(make_block(plan, key))
    found = status(root)
    assert found["blocks"] == {"done": 6, "planned": len(keys(plan))}
    assert found["walks"] == {"done": 4, "planned": 10}
    assert found["rows"]["done"] == sum(len(make_block(plan, key).walk) for key in keys(plan)[:6])
    assert not found["stages"]["sample"]
    assert not found["finished"]
    assert found["bytes"] > 0
    assert status_table(found).row_count > 6


def test_status_and_verify_of_nothing_are_input_errors(tmp_path: Path):
    for command in (status, verify, repair):
        with pytest.raises(InputError, match="Give the address"):
            command(str(tmp_path / "nothing"))
    assert list(tmp_path.iterdir()) == []


def test_a_document_under_the_name_of_another_is_damaged(tmp_path: Path):
    """Its own seal fits, so that only its fields tell."""
    store = make_store(str(tmp_path), make_plan())
    store.storage.replace("plan.json", store.storage.read("map/start=0/map.json"))
    store.storage.replace("config.yaml", sealed_text(b"<!doctype html>\n"))
    assert kinds(verify(str(tmp_path))) == {"plan.json": "damaged", "config.yaml": "damaged"}
    with pytest.raises(RunError, match=r"plan.json is damaged: it is another document.*--repair"):
        SampleStore.open(str(tmp_path))


@pytest.mark.parametrize("other", [BlockKey(1, 0), BlockKey(0, 1)])
def test_a_block_under_the_name_of_another_is_not_read(tmp_path: Path, other: BlockKey):
    store = make_store(str(tmp_path), make_plan())
    store.storage.replace(BlockKey(0, 0).path, store.storage.read(other.path))
    with pytest.raises(RunError, match=r"holds .* its name says .*--repair"):
        store.read_columns(BlockKey(0, 0), ["theta"])


def test_before_the_first_walk_nothing_is_wrong_and_damage_is_found(tmp_path: Path):
    """As a driver leaves it that was killed during the MAP estimate."""
    store = make_store(str(tmp_path), make_plan(starts=1), fill=False)
    store.storage.delete("plan.json")
    found = verify(str(tmp_path))
    assert found.sound and not found.complete
    assert "No walk has begun" in str(found)
    store.storage.replace("map/start=0/map.json", b"{")
    assert kinds(repair(str(tmp_path))) == {"map/start=0/map.json": "damaged"}
    assert verify(str(tmp_path)).sound
