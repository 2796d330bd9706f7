"""Drivers that tests may kill: the command line in a process of its own, forked from one that has imported everything.

Importing torch and Ray takes seconds; forking takes milliseconds. The mother process never uses either.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

PRELOADED = [
    "pipeline.cli",
    "pipeline.main_job",
    "pipeline.posterior",
    "workers.cluster",
    "workers.hands",
    "workers.trainer",
    "workers.walker",
]
PRELOADED += ["jinja2", "matplotlib.backends.backend_svg", "sklearn.datasets", "torch._dynamo"]  # late, half of a run
PRELOADED += [f"pipeline.stages.{name}" for name in ("deform", "estimate", "evaluate", "report", "sample", "select")]


class Driver:
    """One run of the command line."""

    def __init__(self, pid: int, log: Path):
        self.pid, self.log = pid, log
        self.status: int | None = None
        self.ended = threading.Event()

    def wait(self, seconds: float = 120) -> int | None:
        """Return the exit status, negative for a signal; None if it still runs after `seconds`."""
        return self.status if self.ended.wait(seconds) else None

    def send(self, number: signal.Signals) -> bool:
        """Send a signal; False if the driver has ended."""
        if self.ended.is_set():
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def output(self) -> str:
        return self.log.read_text(errors="replace")


class Drivers:
    """Starts drivers. A context manager; ends those that still run."""

    def __init__(self, folder: Path):
        self._folder, self._drivers, self._count = folder, {}, 0
        self._answers: dict[int, Driver] = {}
        self._started = threading.Condition()

    def __enter__(self) -> Drivers:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        command = [sys.executable, "-W", "ignore", "-m", "tests.drivers"]
        self._mother = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[1],
        )
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for driver in list(self._answers.values()):
            driver.send(signal.SIGKILL)
        assert self._mother.stdin is not None
        self._mother.stdin.close()
        try:
            self._mother.wait(20)
        except subprocess.TimeoutExpired:
            self._mother.kill()
            self._mother.wait()

    def _listen(self) -> None:
        assert self._mother.stdout is not None
        for line in self._mother.stdout:
            answer = json.loads(line)
            with self._started:
                if "log" in answer:
                    self._answers[answer["pid"]] = Driver(answer["pid"], Path(answer["log"]))
                    self._started.notify_all()
                else:
                    driver = self._answers[answer["pid"]]
                    driver.status = answer["status"]
                    driver.ended.set()

    def start(
        self, arguments: Sequence[str], *, environment: dict[str, str] | None = None, file_limit: int | None = None
    ) -> Driver:
        """Start ``fiberwalk ARGUMENTS``; a file limit in bytes plays a disk that is full."""
        self._count += 1
        log = self._folder / f"driver-{self._count}.log"
        request = {"arguments": list(arguments), "environment": environment or {}, "log": str(log), "limit": file_limit}
        assert self._mother.stdin is not None
        self._mother.stdin.write(json.dumps(request) + "\n")
        self._mother.stdin.flush()
        with self._started:
            self._started.wait_for(lambda: any(driver.log == log for driver in self._answers.values()), 120)
            return next(driver for driver in self._answers.values() if driver.log == log)

    def run(self, arguments: Sequence[str], seconds: float = 200, **settings) -> Driver:
        """Start a driver and wait for its end."""
        driver = self.start(arguments, **settings)
        if driver.wait(seconds) is None:
            driver.send(signal.SIGKILL)
            raise TimeoutError(f"fiberwalk {' '.join(arguments)} did not end; {driver.output()[-2000:]}")
        return driver


def _mother() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    running: set[int] = set()
    buffer, opened = b"", True
    while opened or running:
        if opened and select.select([0], [], [], 0.02)[0]:
            read = os.read(0, 65536)
            opened = bool(read)
            *lines, buffer = (buffer + read).split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = _fork(request)
                running.add(pid)
                _say({"pid": pid, "log": request["log"]})
        if not opened:
            time.sleep(0.02)
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.discard(pid)
                _say({"pid": pid, "status": os.waitstatus_to_exitcode(status)})


def _say(answer: dict) -> None:
    os.write(1, (json.dumps(answer) + "\n").encode())


def _fork(request: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.setpgid(0, 0)
        os.environ.update(request["environment"])
        if request["limit"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], resource.RLIM_INFINITY))
        from pipeline.cli import main

        status = main(request["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    _mother()
