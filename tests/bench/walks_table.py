"""What more walks buy: quality of the deformation against the number of walks, from the same MAP estimate.

    python -m tests.bench.walks_table [--case banana-weak] [--seeds 0 1] [--walks 256 1024 4096 16384] [--work DIR]
        [--json PATH] [--plot PATH.svg]

One process, a run for each number and seed; finished runs are not repeated. Errors are standard errors over seeds, with
one seed those over test rows. Without data (--data or FIBERWALK_DATA) it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import parse_config
from pipeline.main_job import execute, in_this_process
from pipeline.progress import LogProgress
from pipeline.run import claim, prepare
from tests.bench.study import settings_of
from tests.bench.study_cases import CASES, Case

METHODS = ("walk", "deformation", "gaussian")
Row = dict[str, Any]


def run_one(case: Case, seed: int, walks: int, data: Path, work: Path) -> Row:
    """Carry a run to its end and take what the table shows."""
    changed = {"walk.walks": walks, "evaluation.baselines": ["gaussian"]}
    values = settings_of(case, seed, data, work, changed)
    values["name"] = f"{case.name}-{seed}-{walks}"
    run = prepare(parse_config(values))
    claim(run)
    estimates = work / "maps" / f"{case.name}-{seed}"
    target = Path(run.uri, "map")
    if estimates.exists() and not target.exists():
        shutil.copytree(estimates, target)
    execute(run, LogProgress(), in_this_process())
    if not estimates.exists():
        shutil.copytree(target, estimates)
    found, facts = run.storage.read_json("evaluation.json"), run.storage.read_json("deformation/deformation.json")
    gap = found["difference"]["deformation-walk"]["nll"]
    return {
        "case": case.name,
        "seed": seed,
        "walks": walks,
        **{method: found["methods"][method]["nll"]["value"] for method in METHODS},
        "gap": gap["value"],
        "gap_se": gap["se"],
        "heldout_error": facts["heldout_error"],
        "rise_ratio": facts["potential_rise"] / facts["walk_potential_rise"],
    }


def spread(rows: list[Row], name: str) -> tuple[float, float]:
    """Mean over seeds and its standard error; NaN with one seed."""
    values = np.array([row[name] for row in rows])
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def table(rows: list[Row]) -> str:
    """A Markdown table, a line for each number of walks."""
    lines = [
        "| walks | seeds | walk, NLL | deformation | gaussian | deformation − walk | held-out error | rise / walks' |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for walks in sorted({row["walks"] for row in rows}):
        mine = [row for row in rows if row["walks"] == walks]
        cells = []
        for name in (*METHODS, "gap", "heldout_error", "rise_ratio"):
            mean, error = spread(mine, name)
            error = mine[0]["gap_se"] if name == "gap" and len(mine) == 1 else error
            cells.append(f"{mean:{'+' if name == 'gap' else ''}.3f}" + (f" ± {error:.3f}" if error == error else ""))
        lines.append(f"| {walks:,} | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """NLL and held-out error against the number of walks."""
    import matplotlib.pyplot as plt

    counts = sorted({row["walks"] for row in rows})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, names in ((left, METHODS), (right, ("heldout_error",))):
        for name in names:
            pairs = [spread([row for row in rows if row["walks"] == count], name) for count in counts]
            means, errors = zip(*pairs, strict=True)
            axis.errorbar(counts, means, yerr=np.nan_to_num(errors), marker="o", label=name.replace("_", " "))
        axis.set(xscale="log", xlabel="walks", xticks=counts, xticklabels=[f"{count:,}" for count in counts])
        axis.minorticks_off()
    left.set(ylabel="test NLL, nats a row")
    left.legend()
    right.set(ylabel="relative error on held-out walks", ylim=(0, None))
    figure.savefig(path)


def main() -> int:
    """Run what is missing, print the table, write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("FIBERWALK_DATA"), help="folder of the data sets")
    parser.add_argument("--case", default="banana-weak", choices=[case.name for case in CASES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--walks", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--work", type=Path, default=Path("runs/walks_table"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if not options.data or not Path(options.data).is_dir():
        print("walks_table: no data. Give --data DIR or set FIBERWALK_DATA.", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    case, rows = next(case for case in CASES if case.name == options.case), []
    for walks in options.walks:
        for seed in options.seeds:
            rows.append(run_one(case, seed, walks, Path(options.data), options.work))
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
