"""Corrections against each other at equal gradient evaluations: test NLL of self-tuned walks on the study's data sets.

    python tests/bench/correction_table.py --data DIR [--only NAME ...] [--seeds N] [--work DIR] [--json PATH]

Each cell is a run of the product with `walk.correction` set and everything else left to itself; "auto" also tells what
it chose. Resumable: a run that is finished is read, not repeated. Prints a Markdown table with the mean over seeds and
its standard error.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipeline.config import parse_config
from pipeline.errors import InputError, RunError
from pipeline.main_job import execute, finished, in_this_process
from pipeline.progress import LogProgress
from pipeline.run import claim, prepare
from tests.bench.study_cases import CASES, Case

CORRECTIONS = ("plain", "momentum", "deflated", "deflated-momentum", "auto")
NAMES = (
    *("banana-weak", "australian", "breast_cancer_categorical", "ionosphere", "waveform"),
    *("snelson-gap", "fashion_mnist"),
)


def run_cell(case: Case, seed: int, correction: str, root: Path, work: Path, walks: int) -> dict[str, Any]:
    """Carry one run to its end; returns its test NLL and what was chosen."""
    values = case.configure(root, work / "data" / f"{case.name}-{seed}", seed)
    walk = {**values.get("walk", {}), "walks": walks, "correction": correction}
    walk["walks_per_shard"] = min(walks, walk.get("walks_per_shard", walks))
    values |= {
        **{"name": f"{case.name}-{seed}-{correction}", "seed": seed, "storage": str(work / "runs")},
        **{"walk": walk, "map": {**values.get("map", {}), "starts": 1}, "deformation": {"kind": "none"}},
        "evaluation": {"draws": walks, "baselines": ["map"]},
    }
    run = prepare(parse_config(values))
    if not finished(run):
        claim(run)
        execute(run, LogProgress(), in_this_process())
    evaluation, plan = (run.storage.read_json(name) for name in ("evaluation.json", "plan.json"))
    scores = {name: evaluation["methods"][name]["nll"]["value"] for name in ("map", "walk")}
    return {
        **{"case": case.name, "seed": seed, "correction": correction, "chosen": plan["correction"]},
        **{"length": plan["length"], "radius": evaluation["radius"], "diverged": evaluation["walk"]["diverged"]},
        **{"gradients_of_a_walk": plan["steps"] * plan["corrections"], **scores},
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: a line a data set, a column a correction."""
    lines = [f"| test NLL | MAP | {' | '.join(CORRECTIONS)} |", "|---" * (2 + len(CORRECTIONS)) + "|"]
    for name in dict.fromkeys(row["case"] for row in rows):
        here = [row for row in rows if row["case"] == name]
        cells = [_cell([row["map"] for row in here if row["correction"] == here[0]["correction"]])]
        for correction in CORRECTIONS:
            found = [row for row in here if row["correction"] == correction]
            chosen = f" ({', '.join(sorted({row['chosen'] for row in found}))})" if correction == "auto" else ""
            cells.append(_cell([row["walk"] for row in found]) + chosen if found else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}"


def main() -> int:
    """Run what is missing and print the table; exit status 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("FIBERWALK_DATA"), help="folder with the data sets")
    parser.add_argument("--only", nargs="*", default=NAMES, choices=[case.name for case in CASES])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--walks", type=int, default=64)
    parser.add_argument("--work", default="corrections", help="folder of runs; finished ones are not repeated")
    parser.add_argument("--json", help="where all rows go")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if not options.data or not Path(options.data).is_dir():
        print("correction_table: skipped, because there is no data. Give --data DIR or set FIBERWALK_DATA.")
        return 0
    root, work = Path(options.data).resolve(), Path(options.work).resolve()
    rows: list[dict[str, Any]] = []
    failed = 0
    for case in (case for case in CASES if case.name in options.only):
        for seed in range(options.seeds):
            for correction in CORRECTIONS:
                try:
                    rows.append(run_cell(case, seed, correction, root, work, options.walks))
                except (InputError, RunError) as error:
                    failed += 1
                    logging.error("%s, seed %d, %s failed: %s", case.name, seed, correction, error)
                if options.json:
                    Path(options.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print("\n".join(table(rows)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
