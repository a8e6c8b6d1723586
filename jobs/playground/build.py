"""Rebuild the shipped models: the base and the teacher by their train jobs, side by side, one core each.

`make playground`; the folders in `itune_ray/playground/models` are replaced when both jobs are done.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
MODELS = HERE.parents[1] / "itune_ray" / "playground" / "models"
NAMES = ("base", "teacher")


def main() -> int:
    """Build and install; returns 1 when a job failed, and then installs nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="runs", help="output root of the two train jobs")
    output = Path(parser.parse_args().output).absolute()
    itune = [sys.executable, "-m", "itune_ray", "train"]
    jobs = [
        subprocess.Popen([*itune, str(HERE / f"{name}.yaml"), f"output={output}", "run.ray.dashboard=false"])
        for name in NAMES
    ]
    codes = [job.wait() for job in jobs]
    if any(codes):
        return 1
    for name in NAMES:
        install(name, output / f"playground-{name}")
    return 0


def install(name: str, run: Path) -> None:
    """Put the newest model of a run in the package."""
    newest = max(run.glob("train-*/model"), key=lambda folder: folder.stat().st_mtime)
    shutil.rmtree(MODELS / name, ignore_errors=True)
    shutil.copytree(newest, MODELS / name)
    print(f"{name}: {newest} -> {MODELS / name}")


if __name__ == "__main__":
    raise SystemExit(main())
