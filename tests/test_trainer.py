"""Ray Train: two workers fit what one process fits for all starts, and a worker that is killed changes nothing."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from pipeline.config import parse_config
from pipeline.errors import RunError
from pipeline.fitting.job import facts_path, weights_path
from pipeline.plan import BlockKey
from pipeline.progress import LogProgress
from pipeline.run import Run
from pipeline.stages.deform import deform, train_in_process
from pipeline.stages.select import select
from tests.runs import damage, moved, walked
from tests.small_run import TRAINED

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> Run:
    starts = {"map": TRAINED["map"] | {"starts": 2}, "walk": TRAINED["walk"] | {"walks": 80}}
    starts |= {"cluster": {"max_restarts": 1}}  # for the kill
    run = walked(parse_config({**TRAINED, **starts, "storage": str(tmp_path_factory.mktemp("walks"))}))
    select(run, LogProgress())
    return run


def weights(run: Run, start: int) -> dict[str, torch.Tensor]:
    return load(run.storage.read(weights_path(start)))


def facts(run: Run, start: int) -> dict[str, Any]:
    return run.storage.read_json(facts_path(start))


def killing_once(marks: Path) -> Callable[[dict[str, Any]], str | None]:
    """A worker function whose second worker dies by SIGKILL after its first checkpoint of the second start, once."""

    def worker(config: dict[str, Any]) -> str | None:
        from workers import trainer

        class Watched(trainer.RayTeam):
            saves = 0

            def save(self, step: int, tensors: dict, facts: dict) -> None:
                super().save(step, tensors, facts)
                self.saves += 1
                if (self.rank, self._job.start, self.saves) == (1, 1, 1) and not (marks / "killed").exists():
                    time.sleep(1)  # Ray Train hears of a checkpoint when it next asks its workers
                    (marks / "killed").touch()
                    os.kill(os.getpid(), signal.SIGKILL)

            def restore(self) -> tuple[dict, dict] | None:
                found = super().restore()
                done = len(found[1]["squares"]) + found[1]["step"] if found else 0
                (marks / f"restored-{self.rank}-{self._job.start}-{done}").touch()
                return found

        trainer.RayTeam = Watched
        return trainer.train_worker(config)

    return worker


@pytest.fixture(scope="module")
def disturbed(ray_cluster: None, walks: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    import workers.trainer

    folder = tmp_path_factory.mktemp("disturbed")
    run, marks = moved(walks, folder / "runs"), folder / "marks"
    marks.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers.trainer, "_WORKER", killing_once(marks))
        deform(run, workers.trainer.train, LogProgress())
    assert (marks / "killed").exists()
    steps = {int(mark.name.rsplit("-", 1)[1]) for mark in marks.glob("restored-1-1-*")}
    assert min(steps) == 0, "it went on from a checkpoint of the first start"
    assert max(steps) > 0, "the second attempt began from scratch"
    return run


def test_two_workers_one_of_them_killed_learn_what_one_process_learns(
    walks: Run, disturbed: Run, tmp_path: Path
) -> None:
    """The linear cores are the same sums but for rounding; the remainder depends on the number of workers."""
    serial = moved(walks, tmp_path)
    deform(serial, train_in_process, LogProgress())
    for start in (0, 1):
        found, expected = facts(disturbed, start), facts(serial, start)
        for name in ("heldout_error_linear", "heldout_error_outside_basis", "basis_captures", "walk_potential_rise"):
            assert found[name] == pytest.approx(expected[name], rel=1e-2), (start, name)
        assert found["workers"] == 2
    assert not disturbed.storage.list("deformation/train"), "checkpoints are removed after success"


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(walks: Run, disturbed: Run, tmp_path: Path) -> None:
    import workers.trainer

    calm = moved(walks, tmp_path)
    deform(calm, workers.trainer.train, LogProgress())
    for start in (0, 1):
        before, after = weights(calm, start), weights(disturbed, start)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_broken_block_is_told_of_at_once_and_in_the_words_of_the_store(
    ray_cluster: None, walks: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the second worker reads it: the first must not wait, and nobody tries again."""
    import workers.trainer

    run = moved(walks, tmp_path)
    damage(run.uri, BlockKey(1, 0))
    with pytest.raises(RunError, match="shard=00001/block=00000.* corrupted"):
        deform(run, workers.trainer.train, LogProgress())
    monkeypatch.setattr("pipeline.store._WHOLE_BYTES", 0)  # of this process, which is the first to open a small block
    with pytest.raises(RunError, match=r"^The deformation of start 0 failed: .*shard=00001/block=00000") as caught:
        deform(run, workers.trainer.train, LogProgress())
    assert "fiberwalk verify" in str(caught.value) and "\n" not in str(caught.value)
