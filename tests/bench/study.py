"""The study: every method on every data set, and the tables of the README.

    python tests/bench/study.py --data DIR [--only NAME ...] [--seeds K ...] [--work DIR] [--json PATH] [--readme PATH]

Resumable at any moment: a finished run leaves a row in WORK/rows and is not repeated, an interrupted one goes on.
Without data (--data or FIBERWALK_DATA) it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipeline.config import parse_config
from pipeline.errors import InputError, RunError
from pipeline.main_job import execute, in_this_process
from pipeline.progress import LogProgress
from pipeline.run import Run, claim, prepare
from pipeline.stages.estimate import estimate
from pipeline.stages.evaluate import evaluate
from pipeline.stages.sample import sample
from pipeline.stages.select import select
from tests.bench.study_cases import CASES, Case
from tests.bench.study_tables import Row, summary, table
from workers.hands import on_ray


def settings_of(case: Case, seed: int, root: Path, work: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration of one run: what the case says, and the product's defaults for everything else."""
    values = case.configure(root, work / "data" / f"{case.name}-{seed}", seed)
    values |= {"name": f"{case.name}-{seed}", "seed": seed, "storage": str(work / "runs")}
    for path, value in settings.items():
        section, _, key = path.rpartition(".")
        target = values.setdefault(section, {}) if section else values
        target[key] = value
    return values


def run_case(case: Case, seed: int, values: dict[str, Any], options: argparse.Namespace) -> Row:
    """Carry one run to its end, or with `--no-deformation` all but that; returns its row of the study."""
    run = prepare(parse_config(values))
    claim(run)
    began, progress = time.monotonic(), LogProgress()
    if options.no_deformation:
        without_deformation(run, progress)
    else:
        execute(run, progress, in_this_process() if options.serial else on_ray(run.config))
    about = run.storage.read_json("run.json")
    return {
        "case": case.name,
        "seed": seed,
        "run_id": run.config.run_id,
        "config": values,
        "plan": run.storage.read_json("plan.json"),
        "y_std": float(run.dataset.schema.y_std) if run.config.data.task == "regression" else 1.0,
        "versions": about["versions"],
        "code_digest": about["code_digest"],
        "machine": machine(),
        "seconds": time.monotonic() - began,
        "evaluation": run.storage.read_json("evaluation.json"),
    }


def without_deformation(run: Run, progress: LogProgress) -> None:
    """The stages that do not need it, in this process; a later run goes on from here."""
    torch.set_num_threads(1)
    with in_this_process() as (executor, _):
        estimate(run, executor, progress)
        sample(run, executor, progress)
    select(run, progress)
    evaluate(run, progress)


def complete(path: Path, values: dict[str, Any], options: argparse.Namespace) -> bool:
    """Whether a row of this configuration is there and has all that is asked for."""
    if not path.exists():
        return False
    row = json.loads(path.read_text(encoding="utf-8"))
    if row["config"] != json.loads(json.dumps(values)):
        return False
    return options.no_deformation or "deformation" in row["evaluation"]


def machine() -> str:
    """Processor kind and count."""
    return f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}"


def write_readme(path: Path, text: str) -> None:
    """Put the tables between the markers; without markers nothing is written."""
    start, end = "<!-- study -->", "<!-- /study -->"
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    if start not in page or end not in page:
        logging.warning("%s has no markers %s and %s: tables not written there.", path, start, end)
        return
    before, rest = page.split(start, 1)
    path.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def read_rows(work: Path, case: Case) -> list[Row]:
    """Rows of a case that are finished, by seed."""
    paths = (work / "rows" / f"{case.name}-{seed}.json" for seed in range(case.seeds))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def advance(case: Case, options: argparse.Namespace, root: Path, work: Path) -> list[str]:
    """Run the seeds of a case that are not finished; returns what failed."""
    settings = {pair.split("=", 1)[0]: json.loads(pair.split("=", 1)[1]) for pair in options.set}
    failed: list[str] = []
    for seed in range(case.seeds) if options.seeds is None else [s for s in options.seeds if s < case.seeds]:
        path = work / "rows" / f"{case.name}-{seed}.json"
        values = settings_of(case, seed, root, work, settings)
        if complete(path, values, options):
            continue
        logging.info("%s, seed %d", case.name, seed)
        try:
            row = run_case(case, seed, values, options)
        except (InputError, RunError) as error:
            failed.append(f"{case.title}, seed {seed}: {error}")
            logging.error("%s, seed %d failed: %s", case.name, seed, error)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row, indent=1), encoding="utf-8")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("FIBERWALK_DATA"), help="folder of the data sets")
    parser.add_argument("--only", nargs="*", choices=[case.name for case in CASES], help="these data sets")
    parser.add_argument("--seeds", nargs="*", type=int, help="these seeds (UCI regression: given splits)")
    parser.add_argument("--work", default="study", help="folder of runs; finished ones are not repeated")
    parser.add_argument("--json", help="where all rows go")
    parser.add_argument("--readme", help="file whose tables are replaced")
    parser.add_argument("--collect", action="store_true", help="run nothing: tables of what is finished")
    parser.add_argument("--set", nargs="*", default=[], help="a.b=VALUE (JSON) for every run, for short trials")
    parser.add_argument("--no-deformation", action="store_true", help="leave the deformation for a later run")
    parser.add_argument("--serial", action="store_true", help="one process instead of an embedded Ray")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if not options.collect and (not options.data or not Path(options.data).is_dir()):
        print("study: skipped, because there is no data. Give --data DIR or set FIBERWALK_DATA.")
        return 0
    work = Path(options.work).resolve()
    wanted = [case for case in CASES if not options.only or case.name in options.only]
    failed: list[str] = []
    results: list[tuple[Case, list[Row]]] = []
    for case in wanted:
        if not options.collect:
            failed += advance(case, options, Path(options.data).resolve(), work)
        rows = read_rows(work, case)
        if rows:
            results.append((case, rows))
            print("\n".join(table(case, rows)), flush=True)
    if results:
        present = {case.name for case, _ in results}
        head = summary(results, failed, [case.title for case in wanted if case.name not in present])
        lines = [*head, *(line for case, rows in results for line in table(case, rows))]
        print("\n".join(head), flush=True)
        if options.readme:
            write_readme(Path(options.readme), "\n".join([*lines, made_with([r for _, rows in results for r in rows])]))
    if options.json:
        Path(options.json).write_text(json.dumps([r for _, rows in results for r in rows], indent=1), encoding="utf-8")
    return 1 if failed else 0


def made_with(rows: list[Row]) -> str:
    """Machine, versions and the digest of the code, over all rows."""
    machines = sorted({r["machine"] for r in rows})
    found = sorted({", ".join(f"{k} {v}" for k, v in r["versions"].items() if v != "not installed") for r in rows})
    codes = sorted({r["code_digest"][:8] for r in rows})
    return f"{'; '.join(machines)}. {'; '.join(found)}. Code {', '.join(codes)}."


if __name__ == "__main__":
    sys.exit(main())
