"""The command line: parse and validate first, import heavy things after.

`itune JOB FILE [a.b=c ...]` runs a job here; `itune submit JOB FILE [a.b=c ...] --address URL` runs the same on a
cluster; `itune export ARTIFACT TARGET` writes its rows for others; `itune doctor` says what works on this machine.
"""

import argparse
import contextlib
import gc
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from itune_ray import __version__
from itune_ray.errors import ITuneError
from itune_ray.jobs import JOBS, job_type

USER_ERROR, INTERRUPTED = 2, 130


def command() -> None:
    """The process: `main`, and an end that keeps its exit status.

    After an error or an interrupt, threads of Ray may still write while Python closes its streams, which aborts the
    process with another status: all is told by then, so it ends at once. Without one, Python's end would
    go through all that was imported, a second for torch and Ray; it leaves out what is frozen.
    """
    status = main()
    if (ray := sys.modules.get("ray")) is not None:
        with contextlib.suppress(KeyboardInterrupt):
            ray.shutdown()
        if status:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    gc.freeze()
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a fault of ours, 2 for an error the user can mend."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except BrokenPipeError:  # the reader of our output, e.g. `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ITuneError as error:
        print(f"itune: error: {error}", file=sys.stderr)
        return USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="itune", description="Instruction tuning on Ray, from prompts to a report.")
    parser.add_argument("--version", action="version", version=f"itune-ray {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, job in JOBS.items():
        command = commands.add_parser(name, help=job.help, description=job.help, epilog=f"Keys: itune keys {name}")
        _job_arguments(command)
        command.add_argument(
            "--dry-run", action="store_true", help="print the resolved config (and rows to train on) and stop"
        )
        command.add_argument("--quiet", action="store_true", help="print errors only")
        command.set_defaults(command=_run, job=name)
    submit = commands.add_parser("submit", help="run a job on a Ray cluster through its job server")
    submit.add_argument("job", choices=JOBS)
    _job_arguments(submit)
    submit.add_argument("--no-wait", action="store_true", help="return when the job is accepted")
    submit.add_argument("--driver", metavar="RESOURCE", help="nodes for the driver, e.g. cpu-data; default: the head")
    submit.set_defaults(command=_submit)
    status = commands.add_parser("status", help="submitted runs, or one run and its stages")
    status.add_argument("name", nargs="?", help="name of a run")
    status.set_defaults(command=_status)
    logs = commands.add_parser("logs", help="what a submitted run has said")
    logs.add_argument("name", help="name of a run")
    logs.add_argument("--follow", action="store_true", help="go on until it ends")
    logs.set_defaults(command=_logs)
    stop = commands.add_parser("stop", help="stop a submitted run; it can be resumed")
    stop.add_argument("name", help="name of a run")
    stop.set_defaults(command=_stop)
    for command in (submit, status, logs, stop):
        command.add_argument(
            "--address",
            default=os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"),
            help="the cluster's dashboard; default: $RAY_API_SERVER_ADDRESS, else this machine's",
        )
    export = commands.add_parser("export", help="write an artifact's good rows for others, with a data card")
    export.add_argument("artifact", metavar="ARTIFACT", help="folder of a finished generate or curate artifact")
    export.add_argument("target", metavar="TARGET", help="a new folder or URI")
    export.add_argument("--as", dest="form", choices=("parquet", "jsonl", "hf"), default="jsonl", help="default: jsonl")
    export.add_argument("--payload", help="the rows' folder in the artifact; default: kept or accepted")
    export.add_argument("--license", help="licence of the whole, as the Hub names it, e.g. cc-by-4.0")
    export.set_defaults(command=_export)
    keys = commands.add_parser("keys", help="list a job's config keys with their meaning")
    keys.add_argument("job", choices=JOBS)
    keys.set_defaults(command=_keys)
    dashboard = commands.add_parser("dashboard", help="run Prometheus beside the Ray of this machine, until Ctrl-C")
    dashboard.add_argument("--ray-folder", default="/tmp/ray", help="Ray's temporary folder on the head")
    dashboard.add_argument("--port", type=int, default=9090, help="of Prometheus; Ray's dashboard looks at 9090")
    dashboard.set_defaults(command=_dashboard)
    doctor = commands.add_parser("doctor", help="check versions, Ray, vLLM, memory and the loss on this machine")
    doctor.add_argument("--model", default="playground://base", help="model to check: Hub id, folder or URI")
    doctor.set_defaults(command=_doctor)
    return parser


def _job_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", help="job file (YAML)")
    command.add_argument("overrides", nargs="*", metavar="a.b=c", help="config overrides, e.g. output=/data/runs")


def _load(arguments: argparse.Namespace) -> Any:
    from itune_ray.config.base import load_job
    from itune_ray.jobs import resolve

    return load_job(resolve(job_type(arguments.job).schema), arguments.file, arguments.overrides)


def _run(arguments: argparse.Namespace) -> int:
    from itune_ray.config.base import to_yaml

    job = _load(arguments)
    if arguments.dry_run:
        return _dry_run(job, to_yaml(job))
    from itune_ray.observe.logs import Output, quiet_environment

    quiet_environment()
    output = Output(_log_file(job))
    return _guarded(arguments, job, output)


def _dry_run(job: Any, resolved: str) -> int:
    """Print the resolved config; a pipeline's steps are checked and resolved too, of a training job rows are shown."""
    from itune_ray.config.base import to_yaml
    from itune_ray.config.pipeline import PipelineJob
    from itune_ray.config.train import TrainJob
    from itune_ray.pipeline.output import receivers

    print(resolved, end="")
    for line in receivers(job) or ["rows go to no other host"]:
        print(f"# {line}")
    if isinstance(job, TrainJob):
        _show_rows(job)
    if isinstance(job, PipelineJob):
        from itune_ray.pipeline.step import plan

        for step in plan(job):
            full = step.resolve(lambda name, payload: f"step://{name}/{payload}".rstrip("/"))
            print(f"---\n# step {step.name}: itune {step.job}\n{to_yaml(full)}", end="")
    return 0


def _show_rows(job: Any) -> None:
    """A sample of what would be learned, as comments; why there is none, where the model or the rows are elsewhere."""
    from itune_ray.observe.logs import quiet_environment

    quiet_environment()
    from itune_ray.train.preview import preview

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    try:
        for line in preview(job, colour):
            print(f"# {line}")
    except ITuneError as error:
        print(f"# no sample of the rows: {' '.join(str(error).split())}")


def _log_file(job: Any) -> Path:
    """Beside the run where that is a local folder, else in the temporary folder."""
    from itune_ray.pipeline.output import output_root

    root = output_root(job.run)
    base = Path(root) / job.name if "://" not in root else Path(tempfile.gettempdir()) / "itune-logs" / job.name
    return base / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"


def _guarded(arguments: argparse.Namespace, job: Any, output: Any) -> int:
    """Run with every ending told in one line: done, a user's error, an interrupt, or a fault with its log."""
    from itune_ray.observe.progress import Progress

    signal.signal(signal.SIGTERM, _on_terminate)
    started = time.time()
    with Progress(quiet=arguments.quiet, stream=output.terminal) as progress:
        try:
            from itune_ray.pipeline.run import run

            store = run(arguments.job, job, progress)
            progress.say(f"finished in {time.time() - started:.1f} s  {(store.folder / 'summary.json').uri}")
            if (result := job_type(arguments.job).result) is not None:
                print(json.dumps(store.opened[-1].folder.read_json(result)), file=output.terminal)
            return 0
        except ITuneError as error:
            traceback.print_exc()
            print(f"itune: error: {error}", file=output.terminal)
            return USER_ERROR
        except (KeyboardInterrupt, SystemExit):  # Ray turns SIGTERM into the latter
            print("itune: interrupted; the same command goes on from here", file=output.terminal)
            return INTERRUPTED
        except Exception as error:  # noqa: BLE001  the last stop: everything is in the log, the terminal gets a line
            traceback.print_exc()
            summary = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            print(f"itune: failed: {summary}\nitune: details in {output.log_file}", file=output.terminal)
            return 1


def _on_terminate(*_: object) -> None:
    raise KeyboardInterrupt


def _submit(arguments: argparse.Namespace) -> int:
    job = _load(arguments)
    from itune_ray.submit import submit

    return submit(
        arguments.job,
        arguments.file,
        arguments.overrides,
        job,
        arguments.address,
        not arguments.no_wait,
        arguments.driver,
    )


def _status(arguments: argparse.Namespace) -> int:
    from itune_ray.submissions import show_status

    return show_status(arguments.name, arguments.address)


def _logs(arguments: argparse.Namespace) -> int:
    from itune_ray.submissions import show_logs

    return show_logs(arguments.name, arguments.address, arguments.follow)


def _stop(arguments: argparse.Namespace) -> int:
    from itune_ray.submissions import stop

    return stop(arguments.name, arguments.address)


def _export(arguments: argparse.Namespace) -> int:
    from itune_ray.data.export import export

    folder = export(
        arguments.artifact, arguments.target, arguments.form, payload=arguments.payload, license=arguments.license
    )
    print(folder.uri)
    return 0


def _keys(arguments: argparse.Namespace) -> int:
    from itune_ray.config.keys import describe
    from itune_ray.jobs import resolve

    print(describe(resolve(job_type(arguments.job).schema)))
    return 0


def _dashboard(arguments: argparse.Namespace) -> int:
    from itune_ray.dashboard import serve

    return serve(arguments.ray_folder, arguments.port)


def _doctor(arguments: argparse.Namespace) -> int:
    from itune_ray.doctor import examine

    return examine(arguments.model)
