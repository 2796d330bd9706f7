"""The faults of the campaign: what each does, and how it is undone."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.drivers import Driver
from tests.proxy import Proxy
from tests.s3server import S3Server

_VICTIMS = ("ray::Walker", "ray::RayTrainWorker", "ray::TrainController")


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    kind: str
    moment: float
    """Seconds after the start of the driver."""
    chance: float
    """In [0, 1): which of several victims, or how bad."""


class Disk:
    """A folder that can be made full: a small file system of its own where that is allowed, or an ordinary folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
        self.own = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        self._ballast = folder / ".ballast"

    def fill(self, share: float) -> bool:
        """Leave room for a few objects at most. False if this folder has no file system of its own."""
        if not self.own:
            return False
        free = os.statvfs(self.folder)
        size = max(1, free.f_bavail * free.f_frsize - int(share * 60_000))
        with open(self._ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        return True

    def empty(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        if self.own:
            subprocess.run(["umount", "-l", str(self.folder)], capture_output=True, check=False)


@dataclass
class Stage:
    """Everything that can be hurt."""

    driver: Driver
    server: S3Server
    proxy: Proxy
    cluster: Any
    disk: Disk | None
    threads: list[threading.Thread] = field(default_factory=list)

    def later(self, seconds: float, call: Any) -> None:
        """Undo something after a while."""

        def run() -> None:
            time.sleep(seconds)
            call()

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def calm(self) -> None:
        """Undo everything, so that the next attempt starts in peace."""
        for thread in self.threads:
            thread.join()
        self.proxy.share = self.proxy.budget = 0
        if self.disk is not None:
            self.disk.empty()


def kinds_for(place: str, mode: str) -> list[str]:
    """Faults that can happen in such a round."""
    kinds = ["driver killed", "driver stopped"]
    kinds += ["disk full"] if place == "disk" else ["S3 server killed", "S3 server stopped", "requests", "requests"]
    return kinds + (["actor killed", "actor killed", "actor stopped", "node killed"] if mode != "serial" else [])


def apply(fault: Fault, stage: Stage) -> bool:
    """Do it; False if there was nothing to hurt."""
    return _ACTIONS[fault.kind](fault, stage)


def _driver_killed(fault: Fault, stage: Stage) -> bool:
    return stage.driver.send(signal.SIGKILL)


def _driver_stopped(fault: Fault, stage: Stage) -> bool:
    stage.later(0.5 + 2 * fault.chance, lambda: stage.driver.send(signal.SIGCONT))
    return stage.driver.send(signal.SIGSTOP)


def _disk_full(fault: Fault, stage: Stage) -> bool:
    return stage.disk is not None and stage.disk.fill(fault.chance)


def _server_killed(fault: Fault, stage: Stage) -> bool:
    stage.server.kill()
    time.sleep(2 * fault.chance)
    stage.server.start()
    return True


def _server_stopped(fault: Fault, stage: Stage) -> bool:
    process = stage.server.process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.5 + 3 * fault.chance)
    process.send_signal(signal.SIGCONT)
    return True


def _requests(fault: Fault, stage: Stage) -> bool:
    stage.proxy.budget += 8
    stage.proxy.share, stage.proxy.stall_seconds = 0.1 + 0.2 * fault.chance, 1.0
    return True


def _actors(stage: Stage) -> list[int]:
    """Processes of walkers and of Ray Train workers below the Ray nodes that we started."""
    found = []
    for node in stage.cluster.list_all_nodes():
        with contextlib.suppress(psutil.NoSuchProcess, KeyError):
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            for child in raylet.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if child.cmdline()[:1] and child.cmdline()[0].startswith(_VICTIMS):
                        found.append(child.pid)
    return found


def _hurt_actor(stage: Stage, number: signal.Signals, chance: float) -> int | None:
    victims = _actors(stage)
    for _ in range(20):  # wait a moment for one to be there
        if victims or stage.driver.ended.wait(0.5):
            break
        victims = _actors(stage)
    if not victims:
        return None
    victim = random.Random(chance).choice(victims)
    try:
        os.kill(victim, number)
    except ProcessLookupError:
        return None
    return victim


def _actor_killed(fault: Fault, stage: Stage) -> bool:
    return _hurt_actor(stage, signal.SIGKILL, fault.chance) is not None


def _actor_stopped(fault: Fault, stage: Stage) -> bool:
    victim = _hurt_actor(stage, signal.SIGSTOP, fault.chance)

    def go_on() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim or 0, signal.SIGCONT)

    if victim is not None:
        stage.later(0.5 + 2 * fault.chance, go_on)
    return victim is not None


def _node_killed(fault: Fault, stage: Stage) -> bool:
    nodes = sorted(stage.cluster.worker_nodes, key=lambda node: node.unique_id)
    stage.cluster.remove_node(nodes[int(fault.chance * len(nodes))], allow_graceful=False)
    stage.cluster.add_node(num_cpus=2)
    return True


_ACTIONS = {
    "driver killed": _driver_killed,
    "driver stopped": _driver_stopped,
    "disk full": _disk_full,
    "S3 server killed": _server_killed,
    "S3 server stopped": _server_stopped,
    "requests": _requests,
    "actor killed": _actor_killed,
    "actor stopped": _actor_stopped,
    "node killed": _node_killed,
}
