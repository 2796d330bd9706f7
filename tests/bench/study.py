"""The study: every method on every data set, and the tables of the README.

    python tests/bench/study.py --data DIR [--only NAME ...] [--work DIR] [--json PATH] [--readme PATH] [--serial]

Resumable: a run that is finished is read, not repeated. Without data (--data or FIBERWALK_DATA) it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipeline.config import parse_config
from pipeline.errors import InputError, RunError
from pipeline.main_job import execute, in_this_process
from pipeline.progress import LogProgress
from pipeline.run import claim, prepare, versions
from pipeline.stages.table import ARROWS, METRICS, TITLES, title
from tests.bench.study_cases import CASES, Case
from workers.hands import on_ray

SHOWN = {"classification": ("nll", "accuracy", "ece", "brier"), "regression": ("nll", "rmse", "crps", "coverage")}


def run_case(case: Case, seed: int, root: Path, work: Path, settings: dict[str, Any], serial: bool) -> dict[str, Any]:
    """Carry one run to its end and return its evaluation."""
    values = {
        "deformation": {"hidden": [256, 256], "steps": 1000},
        **case.configure(root, work / "data" / f"{case.name}-{seed}", seed),
    }
    values |= {"name": f"{case.name}-{seed}", "seed": seed, "storage": str(work / "runs")}
    for path, value in settings.items():
        section, _, key = path.rpartition(".")
        target = values.setdefault(section, {}) if section else values
        target[key] = value
    run = prepare(parse_config(values))
    claim(run)
    execute(run, LogProgress(), in_this_process() if serial else on_ray(run.config))
    evaluation = run.storage.read_json("evaluation.json")
    return {
        "case": case.name,
        "seed": seed,
        "config": values,
        "versions": versions(),
        "machine": machine(),
        "evaluation": evaluation,
    }


def machine() -> str:
    """Processor kind and count."""
    return f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}"


def pooled(rows: list[dict[str, Any]], method: str, metric: str) -> tuple[float, float] | None:
    """Mean over seeds and its standard error: over seeds where there are several, else over test rows."""
    scores = [r["evaluation"]["methods"][method][metric] for r in rows if method in r["evaluation"]["methods"]]
    if not scores or any(s["value"] is None for s in scores):
        return None
    values = np.array([s["value"] for s in scores])
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else scores[0]["se"]
    return float(values.mean()), float(error)


def table(case: Case, rows: list[dict[str, Any]]) -> list[str]:
    """Markdown of one data set."""
    first = rows[0]["evaluation"]
    metrics = SHOWN[first["task"]]
    names = [m for m in TITLES if any(m in r["evaluation"]["methods"] for r in rows)]
    size = first["rows"]
    seeds = [r["seed"] for r in rows]
    lines = [f"**{case.title}** ({size['train']} / {size['validation']} / {size['test']} rows; seeds {seeds}; "
             f"radius {', '.join(format(r['evaluation']['radius'], '.3g') for r in rows)})", ""]  # fmt: skip
    heads = [f"{METRICS[first['task']][m]} {ARROWS.get(m, '↓')}".strip() for m in metrics]
    sets = list(first["ood"]) if case.images else []
    lines += [
        f"| | {' | '.join([*heads, *(f'AUROC {s} ↑' for s in sets)])} |",
        "|---" * (1 + len(metrics) + len(sets)) + "|",
    ]
    for name in names:
        cells = [_cell(pooled(rows, name, metric)) for metric in metrics]
        cells += [_cell(tuple(first["ood"][s][name]["auroc"].values())) for s in sets]  # type: ignore[arg-type]
        lines.append(f"| {title(name)} | {' | '.join(cells)} |")
    for pair in ("walk-ensemble_temperature", "walk-temperature", "walk-map"):
        if pair in first["difference"]:
            found = [r["evaluation"]["difference"][pair]["nll"] for r in rows]
            words = ", ".join(f"{f['value']:+.3f} ± {f['se']:.3f}" for f in found)
            lines += ["", f"NLL of {title('walk')} minus {title(pair.split('-')[1])}, paired, a seed each: {words}."]
            break
    lines += [f"\nPublished by others, under their own protocol: {line}." for line in case.published]
    return [*lines, ""]


def _cell(score: tuple[float, float] | None) -> str:
    return "–" if score is None else f"{score[0]:.3f} ± {score[1]:.3f}".replace("-", "−")


def write_readme(path: Path, text: str) -> None:
    """Put the tables between the markers; without markers nothing is written."""
    start, end = "<!-- study -->", "<!-- /study -->"
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    if start not in page or end not in page:
        logging.warning("%s has no markers %s and %s: tables not written there.", path, start, end)
        return
    before, rest = page.split(start, 1)
    path.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("FIBERWALK_DATA"), help="folder of the data sets")
    parser.add_argument("--only", nargs="*", choices=[case.name for case in CASES], help="these data sets")
    parser.add_argument("--seeds", type=int, help="at most so many seeds a data set")
    parser.add_argument("--work", default="study", help="folder of runs; finished ones are not repeated")
    parser.add_argument("--json", help="where all rows go")
    parser.add_argument("--readme", help="file whose tables are replaced")
    parser.add_argument("--set", nargs="*", default=[], help="a.b=VALUE (JSON) for every run, for short trials")
    parser.add_argument("--serial", action="store_true", help="one process instead of an embedded Ray")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if not options.data or not Path(options.data).is_dir():
        print("study: skipped, because there is no data. Give --data DIR or set FIBERWALK_DATA.")
        return 0
    settings = {pair.split("=", 1)[0]: json.loads(pair.split("=", 1)[1]) for pair in options.set}
    root, work = Path(options.data).resolve(), Path(options.work).resolve()
    results: list[dict[str, Any]] = []
    text: list[str] = []
    failed = 0
    for case in CASES:
        if options.only and case.name not in options.only:
            continue
        rows: list[dict[str, Any]] = []
        for seed in range(min(case.seeds, options.seeds or case.seeds)):
            logging.info("%s, seed %d", case.name, seed)
            try:
                rows.append(run_case(case, seed, root, work, settings, options.serial))
            except (InputError, RunError) as error:
                failed += 1
                logging.error("%s, seed %d failed: %s", case.name, seed, error)
        results += rows
        if rows:
            text += table(case, rows)
            print("\n".join(table(case, rows)), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(results, indent=1), encoding="utf-8")
    if options.readme and text:
        text.append(f"{machine()}; {', '.join(f'{k} {v}' for k, v in versions().items() if v != 'not installed')}.")
        write_readme(Path(options.readme), "\n".join(text))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
