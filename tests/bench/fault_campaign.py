"""Rounds of a small run with random faults, each compared with the undisturbed run.

    python -m tests.bench.fault_campaign --rounds 100 --seed 1 --json campaign.json --log campaign.jsonl

A round is replayed by ``--only ROUND`` with the same seed. It passes if every block, the plan, the choice of the radius
and the evaluation have the bytes of the undisturbed run, and `verify` finds nothing wrong. Rounds that are in the log
already are not played again, so that a long campaign can be run in pieces.

Three kinds of rounds: *serial*, one process; *ray*, walkers on a cluster of two nodes, held against the serial run; and
*train*, the same with the deformation through Ray Train on two workers, held against an undisturbed run on the cluster,
since the number of workers is part of what is fitted.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.stages.verify import verify
from pipeline.storage import Storage
from tests.bench.fault_kinds import Disk, Fault, Stage, apply, kinds_for
from tests.drivers import Driver, Drivers
from tests.proxy import Proxy
from tests.s3server import S3Server
from tests.small_run import SETTINGS, contents

ATTEMPTS = 12
ATTEMPT_SECONDS = 400.0


@dataclass
class Round:
    """What happened in one round."""

    number: int
    place: str
    mode: str
    injected: list[str] = field(default_factory=list)
    statuses: list[int | None] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    rows: int = 0
    seconds: float = 0.0
    requests: dict[str, int] = field(default_factory=dict)
    """Spoiled requests by kind."""


MODES = (*["serial"] * 7, *["ray"] * 2, "train")


class Campaign:
    """The servers and the undisturbed runs that all rounds share."""

    def __init__(self, folder: Path, seed: int, modes: tuple[str, ...] = MODES):
        self.folder, self.seed, self.modes = folder, seed, modes
        self.places: tuple[str, ...] = ("disk", "s3")
        self.faults: tuple[int, int] = (4, 7)
        self.cluster: Any = None
        self.references: dict[str, tuple[dict[str, str], float]] = {}

    def config(self, mode: str, variant: int) -> str:
        """The small run; its deformation is fitted by one process, by none (gaussian), or by two workers."""
        kind = {
            "serial": SETTINGS["deformation"],
            "ray": {"kind": "gaussian", "workers": 1},
            "train": SETTINGS["deformation"] | {"workers": 2, "steps": 60},
        }[mode]
        walk = SETTINGS["walk"] | {"walks": 48, "steps": 80}
        path = self.folder / f"{mode}-{variant}.yaml"
        path.write_text(yaml.safe_dump(SETTINGS | {"seed": variant, "deformation": kind, "walk": walk}))
        return str(path)

    def reference(self, drivers: Drivers, mode: str, variant: int) -> tuple[dict[str, str], float]:
        """What the undisturbed run wrote, and its seconds."""
        key = f"{mode}-{variant}"
        kept = self.folder / f"reference-{key}.json"
        if key not in self.references and not kept.exists():
            place = self.folder / f"reference-{key}"
            began = time.monotonic()
            command = ["run", self.config(mode, variant), "--storage", str(place), "--quiet"]
            driver = drivers.run([*command, *(self.where("serial" if mode == "ray" else mode))], 500)
            if driver.status:
                raise RuntimeError(driver.output())
            (run,) = place.iterdir()
            connecting = 10 if mode == "ray" else 0  # which the serial run has no part of
            kept.write_text(json.dumps([contents(Storage.open(str(run))), time.monotonic() - began + connecting]))
        if key not in self.references:
            expected, seconds = json.loads(kept.read_text())
            self.references[key] = expected, seconds
        return self.references[key]

    def where(self, mode: str) -> list[str]:
        """Arguments that say where a run is done."""
        if mode == "serial":
            return ["--serial"]
        return ["--address", self.ray_cluster().address, "--set", "cluster.actors=2"]

    def ray_cluster(self) -> Any:
        """A head without CPUs and two nodes, started when first needed."""
        if self.cluster is None:
            from ray.cluster_utils import Cluster

            # Short, since Ray puts sockets there.
            head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": tempfile.mkdtemp(prefix="fwcr-")}
            self.cluster = Cluster(initialize_head=True, head_node_args=head)
            for _ in range(2):
                self.cluster.add_node(num_cpus=2)
        return self.cluster

    def close(self) -> None:
        if self.cluster is not None:
            self.cluster.shutdown()


def play(campaign: Campaign, number: int, drivers: Drivers, server: S3Server, proxy: Proxy) -> Round:
    """Play one round."""
    rng = random.Random(f"{campaign.seed}-{number}")
    mode, place = rng.choice(campaign.modes), rng.choice(campaign.places)
    variant = rng.randrange(2)
    result = Round(number, place, mode)
    expected, horizon = campaign.reference(drivers, mode, variant)
    folder = campaign.folder / f"round-{number}"
    disk = Disk(folder) if place == "disk" else None
    uri = str(folder) if place == "disk" else f"s3://{server.bucket}/{campaign.seed}-{number}"
    cluster = None if mode == "serial" else campaign.ray_cluster()
    command = ["run", campaign.config(mode, variant), "--storage", uri, "--quiet", *campaign.where(mode)]
    spoiled = proxy.counts.copy()
    faults = [
        Fault(rng.choice(kinds_for(place, mode)), rng.uniform(0.0, 0.7) * horizon, rng.random())
        for _ in range(rng.randint(*campaign.faults))
    ]
    began = time.monotonic()
    proxy.seed(number)
    while len(result.statuses) < ATTEMPTS + len(faults):
        taken, faults = faults[:2], faults[2:]
        driver = drivers.start(command)
        stage = Stage(driver, server, proxy, cluster, disk)
        injected = disturb(stage, taken)
        result.injected += injected
        status = driver.wait(ATTEMPT_SECONDS)
        stage.calm()
        result.statuses.append(status)
        judge(result, driver, injected)
        if status == 0 or status is None:
            break
    compare(result, uri, expected)
    result.requests = dict(proxy.counts - spoiled)
    result.seconds = round(time.monotonic() - began, 1)
    if disk is not None:
        disk.close()
    return result


def disturb(stage: Stage, faults: list[Fault]) -> list[str]:
    """Apply each fault at its moment unless the driver has ended; return the kinds that were applied."""
    injected, began = [], time.monotonic()
    before = sum(stage.proxy.counts.values())
    for fault in sorted(faults, key=lambda fault: fault.moment):
        stage.driver.ended.wait(max(0.0, began + fault.moment - time.monotonic()))
        if stage.driver.ended.is_set():
            break
        if apply(fault, stage):
            injected.append(fault.kind)
    stage.driver.ended.wait(ATTEMPT_SECONDS)
    injected = [kind for kind in injected if kind != "requests"]
    return injected + ["request"] * (sum(stage.proxy.counts.values()) - before)


def judge(result: Round, driver: Driver, injected: list[str]) -> None:
    """Note what no fault excuses: a hang, an unknown exit status, a traceback, half a message."""
    if driver.status is None:
        result.problems.append("hang")
        driver.send(signal.SIGKILL)
    elif driver.status not in (0, 1, 2, -9):
        result.problems.append(f"exit status {driver.status}: {driver.output()[-300:]}")
    elif driver.status in (1, 2) and not injected:
        result.problems.append(f"failed without a fault: {driver.output()[-300:]}")
    if "Traceback" in driver.output():
        result.problems.append(f"traceback: {driver.output()[-600:]}")


def compare(result: Round, place: str, expected: dict[str, str]) -> None:
    """Compare with the undisturbed run, object by object."""
    if place.startswith("s3://"):
        found = {entry.path.split("/")[0] for entry in Storage.open(place).list()}
    else:
        found = {item.name for item in Path(place).iterdir() if not item.name.startswith(".")}
    if len(found) != 1:
        result.problems.append(f"there are {len(found)} runs, not one: {sorted(found)}")
        return
    run = Storage.open(f"{place}/{found.pop()}")
    there = contents(run)
    for path in sorted(expected.keys() | there.keys()):
        if expected.get(path) != there.get(path):
            kind = "lost" if path not in there else "too many" if path not in expected else "different"
            result.problems.append(f"{kind}: {path}")
    report = verify(run.uri)
    result.rows = report.rows
    if not (report.sound and report.complete):
        result.problems.append(str(report))


def summary(rounds: list[Round]) -> dict[str, Any]:
    """Count rounds, faults and problems."""
    faults = collections.Counter(kind for item in rounds for kind in item.injected if kind != "request")
    for item in rounds:
        faults.update({f"request: {kind}": count for kind, count in item.requests.items()})
    return {
        "rounds": dict(collections.Counter(f"{item.place}, {item.mode}" for item in rounds)),
        "faults": dict(faults.most_common()),
        "faults_total": sum(faults.values()),
        "attempts": sum(len(item.statuses) for item in rounds),
        "rows_compared": sum(item.rows for item in rounds),
        "seconds": round(sum(item.seconds for item in rounds)),
        "rounds_with_problems": [item.number for item in rounds if item.problems],
    }


def read_log(path: Path | None) -> list[Round]:
    """Rounds that were played before."""
    lines = path.read_text().splitlines() if path is not None and path.exists() else []
    return sorted((Round(**json.loads(line)) for line in lines), key=lambda item: item.number)


def play_all(given: argparse.Namespace, folder: Path) -> None:
    """Play the rounds that are asked for and not in the log, and add them to it."""
    began, done = time.monotonic(), {item.number for item in read_log(given.log)}
    asked = [given.only] if given.only is not None else range(getattr(given, "from"), given.rounds)
    with S3Server(folder / f"s3-{os.getpid()}") as server, Proxy(server.port) as proxy:
        os.environ.update(server.environment | {"AWS_ENDPOINT_URL": proxy.endpoint})
        campaign = Campaign(folder, given.seed, tuple(given.modes.split(",")) if given.modes else MODES)
        try:
            with Drivers(folder) as drivers:
                for number in asked:
                    if number in done or number % given.of != given.part:
                        continue
                    if time.monotonic() - began > 60 * given.minutes:
                        break
                    line = json.dumps(asdict(play(campaign, number, drivers, server, proxy)))
                    print(line, flush=True)
                    with given.log.open("a") as log:
                        log.write(line + "\n")
        finally:
            campaign.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--from", type=int, default=0, help="first round")
    parser.add_argument("--part", type=int, default=0, help="with --of N: every Nth round, beginning with this one")
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--modes", default="", help="serial, ray or train, separated by commas; drawn for each round")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="replay this round alone")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no round after so many minutes")
    parser.add_argument("--log", type=Path, help="lines of JSON, one a round; what is there is not played again")
    parser.add_argument("--folder", type=Path, help="where servers and runs live; keeps the undisturbed runs")
    parser.add_argument("--json", type=Path, help="the summary of all rounds of the log")
    given = parser.parse_args()
    os.environ["FIBERWALK_STORAGE_PATIENCE"] = "60"
    folder = given.folder or Path(tempfile.mkdtemp(prefix="fwcampaign-"))
    folder.mkdir(parents=True, exist_ok=True)
    given.log = given.log or folder / "rounds.jsonl"
    play_all(given, folder)
    found = summary(read_log(given.log)) | {"seed": given.seed}
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))
    if not found["rounds_with_problems"] and given.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if found["rounds_with_problems"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
