"""The command line. The one module that knows both stages and workers."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from pipeline.errors import InputError, RunError

app = typer.Typer(
    name="fiberwalk",
    help="How sure is your trained network? Walk along the fiber of solutions that fit the data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
INTERRUPTED = 130
out = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 120)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="Configuration file (YAML).")]
RunUri = Annotated[str, typer.Argument(metavar="RUN_URI", help="Address of a run: what 'fiberwalk run' prints first.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override one setting; repeatable.")
]
StoragePlace = Annotated[
    str | None, typer.Option("--storage", metavar="URI", help="Folder or s3://bucket/prefix for runs.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
TrustCode = Annotated[bool, typer.Option("--trust-code", help="Run Python code named by a stored configuration.")]
Out = Annotated[str, typer.Option("--out", metavar="URI", help="Where to write.")]
Radius = Annotated[float | None, typer.Option("--radius", help="Radius; by default the one that was chosen.")]


@app.command()
def run(
    config: ConfigPath,
    storage: StoragePlace = None,
    address: Annotated[str | None, typer.Option(metavar="ADDR", help="Ray cluster; default: an embedded one.")] = None,
    overrides: Overrides = None,
    serial: Annotated[bool, typer.Option("--serial", help="One process, without Ray; it fits as one worker.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Plain lines instead of a live bar.")] = False,
) -> None:
    """Do all stages of a run; running it again does only what is missing."""
    from pipeline.config import load_config
    from pipeline.main_job import execute, finished, in_this_process, show_result
    from pipeline.run import claim, prepare
    from pipeline.stages.check_weights import check_weights
    from pipeline.stages.cost import estimate_cost, refuse_what_does_not_fit
    from pipeline.terminal import shown_progress
    from workers.address import check_address

    job = prepare(load_config(config, _with_places(overrides, storage, address)))
    refuse_what_does_not_fit(estimate_cost(job))
    check_weights(job)
    if job.config.cluster.address and not serial and not job.storage.exists("run.json"):
        check_address(job.config.cluster.address)
    claim(job)
    out.print(job.uri)
    if finished(job):
        out.print("Everything is done already; nothing to do.")
    else:
        with shown_progress(out, quiet) as progress:
            execute(job, progress, in_this_process() if serial else _on_ray(job))
    show_result(job, out)


@app.command()
def plan(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show shards, steps, gradients, bytes and memory without running; refuse what cannot fit."""
    from pipeline.config import load_config
    from pipeline.run import prepare
    from pipeline.stages.cost import estimate_cost, refuse_what_does_not_fit

    cost = estimate_cost(prepare(load_config(config, overrides or [])))
    _show(cost.to_json(), as_json, cost.table())
    refuse_what_does_not_fit(cost)


@app.command()
def submit(
    config: ConfigPath,
    address: Annotated[str, typer.Option(metavar="http://HOST:8265", help="Dashboard of the Ray cluster.")],
    storage: StoragePlace = None,
    overrides: Overrides = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the log and return the job's exit status.")] = False,
) -> None:
    """Submit the same run as a Ray job; submitting again goes on where it was."""
    from workers import jobs

    job_id = jobs.submit(config, address, storage=storage, overrides=overrides or [])
    out.print(job_id)
    if wait:
        raise typer.Exit(jobs.follow(job_id, address, _write))
    sys.stderr.write(jobs.what_now(job_id, address))


@app.command()
def stop(
    job_id: Annotated[str, typer.Argument(help="Job id that 'fiberwalk submit' printed.")],
    address: Annotated[str, typer.Option(metavar="http://HOST:8265", help="Dashboard of the Ray cluster.")],
) -> None:
    """Stop a submitted job; what is committed stays."""
    from workers import jobs

    jobs.stop(job_id, address)
    out.print(f"{job_id} is stopped. Submit it again to go on.")


@app.command()
def logs(
    job_id: Annotated[str, typer.Argument(help="Job id that 'fiberwalk submit' printed.")],
    address: Annotated[str, typer.Option(metavar="http://HOST:8265", help="Dashboard of the Ray cluster.")],
) -> None:
    """Print the log of a submitted job."""
    from workers import jobs

    sys.stdout.write(jobs.logs(job_id, address))


@app.command()
def status(run_uri: RunUri, as_json: AsJson = False) -> None:
    """Show how far a run is, from the store alone, while it runs, from any machine."""
    from pipeline.stages.status import status as read_status
    from pipeline.stages.status import status_table

    found = read_status(run_uri)
    _show(found, as_json, None if as_json else status_table(found))


@app.command()
def verify(
    run_uri: RunUri,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove what is broken, so that the next run redoes it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read every block: checksums, counts, digests, gaps. Exit status 1 if anything is wrong."""
    from pipeline.stages import verify as checks

    findings = checks.repair(run_uri) if repair else checks.verify(run_uri)
    _show(findings.to_json(), as_json, str(findings))
    raise typer.Exit(0 if findings.sound else 1)


@app.command()
def sample(
    run_uri: RunUri,
    out_uri: Out,
    draws: Annotated[int, typer.Option("--draws", min=1, help="Number of posterior draws.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same draws.")] = 0,
    radius: Radius = None,
    potential: Annotated[bool, typer.Option("--potential", help="Add the potential of each draw.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Write posterior draws from the deformation model to a Parquet file."""
    from pipeline.stages.sample_draws import sample_draws

    sample_draws(run_uri, draws, out_uri, seed=seed, radius=radius, potential=potential, trust_code=trust_code)
    out.print(out_uri)


@app.command()
def export(
    run_uri: RunUri,
    out_uri: Out,
    format: Annotated[str, typer.Option("--format", help="arviz, safetensors, parquet or npz.")],
    radius: Radius = None,
    thin: Annotated[int, typer.Option("--thin", min=1, help="Keep every K-th recorded point.")] = 1,
    parameters: Annotated[
        str | None, typer.Option("--parameters", metavar="REGEX", help="Only these parameters.")
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Write the sample store for downstream analysis, in constant memory."""
    from pipeline.stages.export import export as write

    done = write(run_uri, format, out_uri, radius=radius, thin=thin, parameters=parameters, trust_code=trust_code)
    sys.stderr.write(done.left_out)
    out.print(out_uri)


@app.command()
def predict(
    run_uri: RunUri,
    out_uri: Out,
    data: Annotated[str, typer.Option("--data", metavar="SOURCE", help="csv:URI, parquet:URI, npz:URI ...")],
    draws_from: Annotated[str, typer.Option("--draws-from", metavar="walk|deformation", help="whose draws")] = "walk",
    trust_code: TrustCode = False,
) -> None:
    """Write predictive mean, aleatoric and epistemic uncertainty of each row."""
    from pipeline.stages.predict import predict as write_predictions

    write_predictions(run_uri, data, out_uri, draws_from=draws_from, trust_code=trust_code)
    out.print(out_uri)


@app.command()
def report(run_uri: RunUri) -> None:
    """Rebuild report.html, from the stored objects alone."""
    from pipeline.stages.report import rebuild

    out.print(rebuild(run_uri))


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="Name of the run; NAME.yaml is written here.")],
) -> None:
    """Write an example configuration to start from."""
    from pipeline.example import write_example

    out.print(f"Wrote {write_example(name)}. Edit data.source and data.target, then: fiberwalk run {name}.yaml")


@app.command()
def settings(as_json: AsJson = False) -> None:
    """Print every setting of a configuration: what it takes, its default and what it does."""
    from pipeline.config_reference import markdown, plain

    if as_json:
        _show(plain(), True, None)
    else:
        _write(markdown())


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 failed on the way, 2 wrong input, 130 interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        status = app(args=argv, standalone_mode=False, prog_name="fiberwalk")
        if status == INTERRUPTED:  # the library of the command line turns Ctrl-C into this status, without a word
            raise KeyboardInterrupt
        return int(status or 0)
    except InputError as error:
        return _say(error, 2)
    except RunError as error:
        return _say(error, 1)
    except (KeyboardInterrupt, typer.Abort):
        return _say("Interrupted. What is committed stays; the same command goes on from there.", INTERRUPTED)
    except typer.Exit as stop_request:
        return stop_request.exit_code
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the whole help, which must keep its lines
            sys.stderr.write(f"{error}\n")
            return 2
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # usage errors of the command line itself
            return _say(f"{error.format_message()} Try 'fiberwalk --help'.", 2)  # pyright: ignore[reportAttributeAccessIssue]
        if os.environ.get("FIBERWALK_DEBUG"):
            raise
        return _say(
            f"Failed on the way: {type(error).__name__}: {error}. What is committed stays; run the same command again. "
            "FIBERWALK_DEBUG=1 shows the traceback.",
            1,
        )


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _say(message: object, code: int) -> int:
    sys.stdout.flush()
    text = " ".join(str(message).split())
    sys.stderr.write(f"fiberwalk: {text}\n")
    return code


def _with_places(overrides: list[str] | None, storage: str | None, address: str | None) -> list[str]:
    places = {"storage": storage, "cluster.address": address}
    return [*(overrides or []), *(f"{key}={json.dumps(value)}" for key, value in places.items() if value is not None)]


def _write(text: str) -> None:
    sys.stdout.write(text)


def _show(data: Any, as_json: bool, readable: Any) -> None:
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
    else:
        out.print(readable)


def _on_ray(job: Any) -> Any:
    from workers.hands import on_ray  # late: Ray takes seconds to import, and a finished run needs none of it

    return on_ray(job.config)


if __name__ == "__main__":
    sys.exit(main())
