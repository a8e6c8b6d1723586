"""The errors a user can cause, and one root class to catch them all.

Every message says what happened, the value received, what is allowed and which knob to turn. The command line prints
that one line and exits with status 2; the traceback goes to the log file. All of them pickle, so they cross Ray
process boundaries unchanged.
"""

import difflib
from collections.abc import Iterable

SHOWN = 300
"""Characters of a value that a message repeats."""


class ITuneError(Exception):
    """Root of every error that itune-ray raises on purpose.

    Args:
        what: What happened, as a full clause ("the prompt is longer than the context").
        got: The offending value, shown with `repr`-like brevity; leave it out where there is none.
        allowed: What would have been accepted.
        knob: The config path, flag or environment variable that changes it.
    """

    def __init__(self, what: str, *, got: object = None, allowed: object = None, knob: str | None = None):
        self.what, self.got, self.allowed, self.knob = what, got, allowed, knob
        parts = [what]
        if got is not None:
            parts.append(f"got {brief(got)}")
        if allowed is not None:
            parts.append(f"allowed: {allowed}")
        if knob is not None:
            parts.append(f"set by `{knob}`")
        super().__init__("; ".join(parts))

    def __reduce__(self):
        return _rebuild, (type(self), self.what, self.got, self.allowed, self.knob)


def _rebuild(kind: type[ITuneError], what: str, got: object, allowed: object, knob: str | None) -> ITuneError:
    return kind(what, got=got, allowed=allowed, knob=knob)


class ConfigError(ITuneError):
    """A job file, an override or a flag is wrong."""


class DataError(ITuneError):
    """An input table, file or row cannot be used."""


class StorageError(ITuneError):
    """An artifact or output root cannot be read, written or locked."""


class UnreachableError(StorageError):
    """A storage does not answer now, which says nothing of what it holds; another attempt may reach it."""


class ClusterError(ITuneError):
    """Ray cannot be reached, or cannot hold what the job asks for."""


class BudgetError(ITuneError):
    """The run has spent the tokens or the money it was given."""


class ModelError(ITuneError):
    """A model path, tokenizer or checkpoint cannot be used."""


class GenerationError(ITuneError):
    """An engine failed in a way that retrying elsewhere does not mend."""


class TrainError(ITuneError):
    """Training cannot start or go on."""


class CompressError(ITuneError):
    """A model cannot be made smaller as asked."""


class EvalError(ITuneError):
    """An evaluation cannot be run or scored."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message that says something; its class if none does."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def brief(value: object) -> str:
    """A value as a message shows it: its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """The `; did you mean 'x'?` tail for an unknown word, or an empty string when nothing is close."""
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
