"""Particle-steps a second (a drift and a gradient correction): the walk, what one would write instead, and limits.

    python tests/bench/bench_walk.py [--only banana] [--json PATH] [--clock cpu] [--rounds 5]

All implementations of a case are held ready in processes of their own and take turns, so that a burst of foreign load
meets all of them; each number is the best of its rounds. "one core" is one process with one thread; "all cores" is the
better of one process with a thread for each core and one single-threaded process for each core (as Ray actors run).
A peer that is not installed is left out with the reason. `--clock cpu` counts the processor's seconds of one core in
place of the wall's, and leaves out "all cores": for a machine that others use at the same time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.walk_cases import CASES, IMPLEMENTATIONS, Case
from tests.bench.walk_workers import Worker

console = Console(width=140)
WALKS = {"banana": (8, 32, 128, 512), "wide": (16,), "lenet": (8,)}
Row = dict[str, Any]


class Bench:
    """The processes and how long each measurement takes."""

    def __init__(self, seconds: float, rounds: int, clock: str):
        cores = sorted(os.sched_getaffinity(0))
        self.seconds, self.rounds = seconds, rounds
        self.singles = [Worker([core], 1) for core in (cores if clock == "wall" else cores[-1:])]
        self.whole = Worker(cores, len(cores)) if clock == "wall" else None
        self.workers = [*self.singles, *([self.whole] if self.whole else [])]

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.close()

    def case(self, key: str, walks: int) -> list[Row]:
        """All implementations of a case at one number of walks, in alternation."""
        rows: list[Row] = []
        for name, (title, _) in IMPLEMENTATIONS.items():
            row: Row = {"case": key, "walks": walks, "name": name, "title": title}
            try:
                times = [worker.call("prepare", name, CASES[key], name, walks) for worker in self.workers]
                row["steps"] = max(1, round(self.seconds / max(times[0], 1e-4)))
            except RuntimeError as error:
                row["skipped"] = str(error)
            rows.append(row)
        running = [row for row in rows if "skipped" not in row]
        for _ in range(self.rounds):
            for row in running:
                self._round(row)
        for row in running:
            row["all"] = max(row["processes"], row["threads"]) if self.whole else None
            for worker in self.workers:
                worker.call("forget", row["name"])
        return rows

    def _round(self, row: Row) -> None:
        walks, steps = row["walks"], row["steps"]
        kinds = {"one": self.singles[:1]}
        if self.whole:
            kinds |= {"processes": self.singles, "threads": [self.whole]}
        for kind, workers in kinds.items():
            for worker in workers:
                worker.ask("steps", row["name"], steps)
            spans = [worker.answer() for worker in workers]
            taken = max(end for _, end, _ in spans) - min(begin for begin, _, _ in spans)
            taken = taken if self.whole else spans[0][2]
            row[kind] = max(row.get(kind, 0.0), walks * steps * len(workers) / taken)

    def rates(self, key: str, walks: int, before: Row | None = None) -> Row:
        """The machine's limits on one core: the best of what was measured before and now."""
        now = self.singles[0].call("rates", CASES[key], walks)
        return {n: (min if n.startswith("seconds") else max)(v, (before or now)[n]) for n, v in now.items()}

    def pair(self) -> dict[str, float]:
        """What one process for each core gives over one process, for a loop of tanh and nothing else.

        `near` stays in the nearest cache of a core, `shared` is as large as a chunk of walks and lies in a shared one.
        """
        found = {}
        for name, elements in {"near": 1 << 12, "shared": 1 << 20}.items():
            alone = together = 0.0
            for _ in range(self.rounds):
                alone = max(alone, self.singles[0].call("spin", elements, self.seconds))
                for worker in self.singles:
                    worker.ask("spin", elements, self.seconds)
                together = max(together, sum(worker.answer() for worker in self.singles))
            found[name] = together / alone
        return found

    def scaling(self) -> list[Row]:
        """Seconds of ours against walks, steps and parameters, and the exponent of a straight line in logarithms."""
        worker, banana, lines = self.singles[0], CASES["banana"], []
        wide = [replace(banana, rows=512, widths=(128, h, h, 10)) for h in (64, 176, 400)]
        dims = [c.widths[0] * c.widths[1] + c.widths[1] ** 2 + 12 * c.widths[1] + 10 for c in wide]
        for title, sizes, cases, walks, steps in (
            ("walks", (32, 128, 512), [banana] * 3, (32, 128, 512), (20, 20, 20)),
            ("steps", (25, 100, 400), [banana] * 3, (64, 64, 64), (25, 100, 400)),
            ("parameters", dims, wide, (8, 8, 8), (4, 4, 4)),
        ):
            keys = [f"{title}{i}" for i in range(3)]
            for key, case, count in zip(keys, cases, walks, strict=True):
                worker.call("prepare", key, case, "ours", count)
            times = [float("inf")] * 3
            for _ in range(2 * self.rounds):
                for i, key in enumerate(keys):
                    times[i] = min(times[i], worker.call("steps", key, steps[i])[2])
            exponent = float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
            lines.append({"against": title, "sizes": list(sizes), "seconds": times, "exponent": exponent})
        return lines


def peak_memory(key: str, rows: list[Row]) -> None:
    """Memory of each implementation in a fresh process, MiB above the imported libraries."""
    for row in rows:
        if "skipped" not in row:
            worker = Worker(sorted(os.sched_getaffinity(0))[:1], 1)
            row["memory_mib"] = worker.call("peak_memory", key, row["name"])
            worker.close()


def show_case(case: Case, rows: list[Row], limits: Row) -> None:
    """One table: rates, ratios to ours, memory."""
    table = Table(title=f"{case.name}, {case.rows} rows, {rows[0]['walks']} walks: particle-steps a second")
    for column in ("", "one core", "all cores", "as", "ours / this", "peak MiB"):
        table.add_column(column, justify="left" if column in ("", "as") else "right")
    own = next(row for row in rows if row["name"] == "ours")
    for row in rows:
        if "skipped" in row:
            table.add_row(row["title"], "left out:", row["skipped"][:60])
            continue
        kind = "" if not row["all"] else "processes" if row["processes"] >= row["threads"] else "threads"
        memory = f"{row['memory_mib']:.0f}" if "memory_mib" in row else ""
        ratio = f"{own['all'] / row['all'] if row['all'] else own['one'] / row['one']:.2f}"
        table.add_row(row["title"], number(row["one"]), number(row["all"]) if row["all"] else "", kind, ratio, memory)
    for title, key in (("limit: tanh, matrix peak", "seconds_tanh"), ("limit: each operation alone", "seconds_shapes")):
        table.add_row(title, number(1 / limits[key]), "", "", f"{own['one'] * limits[key]:.2f} of it", "")
    console.print(table)


def number(rate: float) -> str:
    """A rate for people."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def targets(results: dict[str, Any]) -> list[Row]:
    """What the project set itself, and what this run reached."""
    found: list[Row] = []

    def add(title: str, value: float | None, least: float) -> None:
        if value is not None:
            found.append({"target": title, "least": least, "reached": value, "met": value >= least})

    for key, limits in results["limits"].items():
        rows = {r["name"]: r for r in results["rows"] if r["case"] == key and r["walks"] == CASES[key].walks}
        own = rows["ours"]
        wall = own["all"] is not None
        column, where = ("all", "all cores") if wall else ("one", "one core")
        if key == "banana":
            jax = rows["jax"].get(column)
            add(f"banana, {where}: ours / JAX loop", own[column] / jax if jax else None, 1.5)
            add("banana, one core: share of tanh and matrix limit", own["one"] * limits["seconds_tanh"], 0.75)
        if key == "wide":
            add("wide, one core: share of the matrix peak", own["one"] * limits["seconds_products"], 0.6)
        if key == "lenet":
            other = max(rows[n][column] for n in ("loop", "vmap"))
            add(f"LeNet, {where}: ours / best of loop and vmap", own[column] / other, 1.5)
        cores = results["settings"]["cores"]
        if cores > 1 and wall:
            add(f"{key}: {cores} processes / one", own["processes"] / own["one"], 0.9 * cores)
    return found


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions and settings."""
    model = next((line.split(":")[1].strip() for line in cpu_lines() if line.startswith("model name")), "")
    versions = {}
    for package in ("torch", "numpy", "jax", "posteriors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    machine = {"processor": model or platform.processor(), "system": platform.platform(), "load": os.getloadavg()}
    cores = len(os.sched_getaffinity(0))
    return {**machine, "cores": cores, "python": platform.python_version(), **versions, **vars(arguments)}


def cpu_lines() -> list[str]:
    """Lines of the system's description of its processors, where there is one."""
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    """Run the cases, print the tables, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*CASES, "scaling"], action="append")
    parser.add_argument("--json", type=str)
    parser.add_argument("--seconds", type=float, default=0.4, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--all-walks", action="store_true", help="banana at 8, 32 and 512 walks, too")
    arguments = parser.parse_args()
    chosen = arguments.only or [*CASES, "scaling"]
    results: dict[str, Any] = {"settings": settings(arguments), "rows": [], "limits": {}}
    bench = Bench(arguments.seconds, arguments.rounds, arguments.clock)
    try:
        for key in [key for key in CASES if key in chosen]:
            usual = CASES[key].walks
            for walks in WALKS[key] if arguments.all_walks else (usual,):
                before = bench.rates(key, walks)
                rows = bench.case(key, walks)
                limits = bench.rates(key, walks, before)
                if walks == usual:
                    peak_memory(key, rows)
                    results["limits"][key] = limits
                results["rows"] += rows
                show_case(CASES[key], rows, limits)
        results["scaling"] = bench.scaling() if "scaling" in chosen else []
        results["pair"] = bench.pair() if arguments.clock == "wall" and len(bench.singles) > 1 else {}
    finally:
        bench.close()
    results["targets"] = targets(results)
    show_rest(results)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))


def show_rest(results: dict[str, Any]) -> None:
    """Scaling and targets."""
    if results["scaling"]:
        table = Table("time against", "sizes", "seconds", "exponent", title="Cost")
        for line in results["scaling"]:
            seconds = ", ".join(f"{t:.3f}" for t in line["seconds"])
            table.add_row(line["against"], ", ".join(map(str, line["sizes"])), seconds, f"{line['exponent']:.2f}")
        console.print(table)
    table = Table("target", "at least", "reached", "", title="Targets")
    for line in results["targets"]:
        met = "met" if line["met"] else "not met"
        table.add_row(line["target"], f"{line['least']:.2f}", f"{line['reached']:.2f}", met)
    for name, ratio in results["pair"].items():
        title = f"what the machine gives: {results['settings']['cores']} loops of tanh / one, {name} cache"
        table.add_row(title, "", f"{ratio:.2f}", "")
    console.print(table)
    told = results["settings"]
    versions = f"torch {told['torch']}, JAX {told['jax']}, posteriors {told['posteriors']}"
    console.print(
        f"{told['processor']}, {told['cores']} cores, {versions}; {told['system']}; load {told['load'][0]:.1f}"
    )


if __name__ == "__main__":
    main()
