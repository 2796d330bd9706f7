"""The sample store: what is committed is read back bit for bit, by us and by others, and nothing else is."""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path

import duckdb
import numpy as np
import pandas
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from pipeline.blocks import rows_per_group, write_block
from pipeline.errors import InputError, RunError
from pipeline.plan import BlockKey
from pipeline.seal import BrokenBlock, check_seal
from pipeline.store import SampleBlock, SampleStore, parse_path
from tests.blocks import keys, make_block, make_plan, make_store

COLUMNS = [
    "walk",
    "start",
    "step",
    "radius",
    "potential",
    "nll",
    "grad_norm",
    "distance",
    "step_size",
    "status",
    "theta",
]


def assert_equal(one: SampleBlock, other: SampleBlock) -> None:
    for name in COLUMNS:
        left, right = np.asarray(getattr(one, name)), np.asarray(getattr(other, name))
        assert left.dtype == right.dtype or name == "status"
        np.testing.assert_array_equal(left, right, err_msg=name)
    assert (one.momentum is None) == (other.momentum is None)
    if one.momentum is not None:
        np.testing.assert_array_equal(one.momentum, other.momentum)


def encoded(block: SampleBlock, plan) -> bytes:
    file = io.BytesIO()
    write_block(file, block, plan, "made-0123abcd")
    return file.getvalue()


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_committed_block_is_read_back_bit_for_bit(root: str, dtype: str, momentum: bool):
    plan = make_plan(dtype=dtype)
    store = make_store(root, plan, momentum=momentum)
    for key in keys(plan):
        assert_equal(store.read_block(key), make_block(plan, key, momentum=momentum))


def test_the_second_writer_of_a_block_loses_and_changes_nothing(root: str):
    plan = make_plan()
    store = make_store(root, plan)
    before = store.storage.read(keys(plan)[0].path)
    assert not store.commit(make_block(plan, keys(plan)[0], seed=1))
    assert store.storage.read(keys(plan)[0].path) == before


def test_committed_blocks_are_known_by_their_names(root: str):
    plan = make_plan()
    store = make_store(root, plan, fill=False)
    assert store.committed_all() == {}
    for key in (BlockKey(2, 1), BlockKey(0, 3), BlockKey(0, 0)):
        store.commit(make_block(plan, key))
    store.storage.create("walks/shard=00000/block=1.parquet", b"")
    store.storage.create("walks/shard=00000/notes.txt", b"")
    assert store.committed(0) == [0, 3]
    assert store.committed(1) == []
    assert pickle.loads(pickle.dumps(store)).committed_all() == {0: [0, 3], 2: [1]}


def test_a_shard_goes_on_from_its_last_record(root: str):
    plan = make_plan()
    store = make_store(root, plan, momentum=True)
    for key in keys(plan):
        whole, last = store.read_block(key), store.read_last(key)
        walks = plan.shards()[key.shard].walks
        np.testing.assert_array_equal(last.theta, whole.theta[-walks:])
        np.testing.assert_array_equal(last.step, whole.step[-walks:])
        assert last.momentum is not None
        np.testing.assert_array_equal(last.momentum, make_block(plan, key, momentum=True).momentum)


def test_the_digest_is_that_of_the_contents_and_not_of_the_place(tmp_path: Path):
    plan = make_plan()
    one, other = make_store(str(tmp_path / "one"), plan), make_store(str(tmp_path / "other"), plan)
    assert one.digest() == other.digest()
    other.storage.delete(keys(plan)[3].path)
    assert one.digest() != other.digest()
    other.commit(make_block(plan, keys(plan)[3], seed=1))
    assert one.digest() != other.digest()


def test_points_are_one_a_walk_at_the_nearest_record(root: str):
    plan = make_plan()
    store = make_store(root, plan)
    radii = plan.radii()
    for wanted, record in ((0.0, 0), (float(radii[4]) + 0.01, 4), (9.0, len(radii) - 1)):
        points = list(store.points(wanted, batch=3))
        assert [len(batch) for batch in points if len(batch) > 3] == []
        assert np.concatenate([batch.walk for batch in points]).tolist() == list(range(plan.walks))
        theta = np.concatenate([batch.theta for batch in points])
        for shard in plan.shards():
            block, within = divmod(record, plan.records_per_block)
            rows = slice(within * shard.walks, (within + 1) * shard.walks)
            expected = make_block(plan, BlockKey(shard.index, block)).theta[rows]
            np.testing.assert_array_equal(theta[shard.first_walk : shard.first_walk + shard.walks], expected)


def test_points_keep_to_a_start_and_to_a_limit(tmp_path: Path):
    plan = make_plan()
    store = make_store(str(tmp_path), plan)
    assert np.concatenate([p.walk for p in store.points(0.5, start=1)]).tolist() == [5, 6, 7, 8, 9]
    assert np.concatenate([p.walk for p in store.points(0.5, limit=6)]).tolist() == [0, 1, 2, 3, 4, 5]
    assert np.concatenate([p.start for p in store.points(0.5)]).tolist() == [0] * 5 + [1] * 5


def test_walks_that_diverged_give_no_points(tmp_path: Path):
    plan = make_plan()
    store = make_store(str(tmp_path), plan, fill=False)
    for key in keys(plan):
        block = make_block(plan, key)
        status = [
            "diverged" if walk == 2 and step > 10 else "ok" for walk, step in zip(block.walk, block.step, strict=True)
        ]
        fields = {**vars(block), "status": status}
        store.commit(SampleBlock(**fields))
    assert np.concatenate([p.walk for p in store.points(0.2)]).tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9]


def test_only_the_needed_row_groups_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = make_plan(dim=2**19, walks=4, starts=1)
    assert rows_per_group(plan) == 8
    store = make_store(str(tmp_path), plan, fill=False)
    key = BlockKey(0, 0)
    block = make_block(plan, key)
    store.commit(block)
    file = pq.ParquetFile(tmp_path / key.path)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [8, 4]
    read = []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, i, **k: (read.append(i), real(self, i, **k))[1])
    np.testing.assert_array_equal(store.read_last(key).theta, block.theta[8:])
    assert read == [1]


def test_a_block_is_ordinary_parquet_for_other_readers(tmp_path: Path):
    plan = make_plan()
    store = make_store(str(tmp_path), plan, momentum=True)
    walks = str(tmp_path / "walks")
    table = store.dataset().to_table()
    assert table.num_rows == plan.rows
    assert pyarrow.dataset.dataset(walks, partitioning="hive").to_table().num_rows == plan.rows
    query = (
        "select count(*), count(distinct walk * 1000 + step), typeof(any_value(theta)), sum(list_sum(theta)) "
        f"from read_parquet('{walks}/**/*.parquet', hive_partitioning = true)"
    )
    row = duckdb.connect().execute(query).fetchone()
    assert row is not None
    count, distinct, kind, total = row
    assert (count, distinct, kind) == (plan.rows, plan.rows, "FLOAT[]")
    theta = table.column("theta").combine_chunks().to_numpy_ndarray()
    assert total == pytest.approx(theta.astype(np.float64).sum(), rel=1e-4)
    frame = pandas.read_parquet(walks)
    np.testing.assert_array_equal(np.stack(frame.theta.to_list()), theta)
    assert set(frame.columns) == {*COLUMNS, "momentum", "shard"}


def test_metadata_says_what_the_contract_promises(tmp_path: Path):
    plan = make_plan()
    make_store(str(tmp_path), plan)
    metadata = pq.read_metadata(tmp_path / keys(plan)[0].path)
    assert {b"fiberwalk.schema", b"fiberwalk.run_id", b"fiberwalk.digest", b"fiberwalk.parameters"} <= set(
        metadata.metadata
    )
    theta = metadata.row_group(0).column(metadata.num_columns - 1)
    assert theta.path_in_schema.startswith("theta")
    assert not theta.is_stats_set
    assert "DICTIONARY" not in str(theta.encodings)


def test_the_same_block_gives_the_same_bytes():
    plan = make_plan()
    key = keys(plan)[1]
    assert encoded(make_block(plan, key), plan) == encoded(make_block(plan, key), plan)


@pytest.mark.parametrize("momentum", [False, True])
def test_a_flip_of_any_byte_and_any_truncation_is_found(momentum: bool):
    plan = make_plan()
    data = encoded(make_block(plan, keys(plan)[0], momentum=momentum), plan)
    check_seal(io.BytesIO(data))
    rng = random.Random(0)
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        with pytest.raises(BrokenBlock):
            check_seal(io.BytesIO(bytes(flipped)))
        with pytest.raises(BrokenBlock):
            check_seal(io.BytesIO(data[:place]))


def test_a_flip_in_theta_is_found_while_reading(tmp_path: Path):
    plan = make_plan()
    store = make_store(str(tmp_path), plan)
    path = tmp_path / keys(plan)[0].path
    data = bytearray(path.read_bytes())
    place = data.find(make_block(plan, keys(plan)[0]).theta[5].tobytes())
    data[place + 3] ^= 4
    path.write_bytes(data)
    with pytest.raises(RunError, match="--repair"):
        store.read_block(keys(plan)[0])


@pytest.mark.parametrize("change", ["run", "layout", "plan"])
def test_a_block_of_another_run_is_refused_by_name(tmp_path: Path, change: str):
    plan = make_plan()
    store = make_store(str(tmp_path), plan, fill=False)
    other = make_plan(parameters=[{"name": "other", "shape": [7]}]) if change == "layout" else plan
    other = make_plan(length=2.0) if change == "plan" else other
    foreign = SampleStore(store.storage, other, "other-run" if change == "run" else store.run_id)
    foreign.commit(make_block(other, keys(plan)[0]))
    message = {"run": "belongs to run other-run", "layout": "another parameter layout", "plan": "another plan"}[change]
    with pytest.raises(RunError, match=message):
        store.read_block(keys(plan)[0])


def test_a_block_that_does_not_fit_the_plan_is_never_stored(tmp_path: Path):
    plan = make_plan()
    store = make_store(str(tmp_path), plan, fill=False)
    block = make_block(plan, keys(plan)[0])
    for changes in (
        {"theta": block.theta[:, 1:]},
        {"status": ["ok"]},
        {"walk": block.walk[:-1]},
        {"momentum": block.theta},
    ):
        with pytest.raises(ValueError, match=r"block=00000\.parquet"):
            store.commit(SampleBlock(**{**vars(block), **changes}))
    assert store.committed_all() == {}


def test_no_store_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match="No sample store"):
        SampleStore.open(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("walks/shard=00012/block=00003.parquet", BlockKey(12, 3)),
        ("walks/shard=100000/block=00003.parquet", BlockKey(100000, 3)),
        ("walks/shard=012/block=00003.parquet", None),
        ("walks/shard=000012/block=00003.parquet", None),
        ("walks/shard=00012/block=00003.parquet.tmp", None),
        ("walks/block=00003.parquet", None),
    ],
)
def test_paths_and_keys_are_one_to_one(path: str, key: BlockKey | None):
    assert parse_path(path) == key
