"""Where the chatter goes: this process's stdout and stderr into a log file, people's output on the real terminal.

Ray, vLLM and transformers print from C++, from threads and at import, so the file descriptors themselves are
redirected; `Output.terminal` is a copy of the stderr there was before.
"""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TextIO

QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Telemetry off and fewer messages, unless the user says otherwise; workers inherit it."""


def quiet_environment() -> None:
    """Set what `QUIET_ENVIRONMENT` names and the user has not. To be called before the libraries are imported."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


class Output:
    """The terminal for people, the log file for everything else."""

    def __init__(self, log_file: Path):
        self.log_file = log_file
        log_file.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        self.terminal: TextIO = os.fdopen(os.dup(2), "w", buffering=1)
        with open(log_file, "a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr, force=True
        )
        logging.captureWarnings(True)
        warnings.simplefilter("default")
