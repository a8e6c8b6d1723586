"""Custom: a filter of the user's own, and how code of theirs is found."""

import functools
import importlib
import json
from functools import cached_property
from typing import Any

from itune_ray.config.curate import CustomFilterConfig
from itune_ray.curate.filters.base import RowFilter, Verdict
from itune_ray.data.records import Record
from itune_ray.errors import ConfigError


def load(location: str, knob: str) -> Any:
    """The object at `package.module:name`; raises `ConfigError` when it cannot be imported."""
    module, _, name = location.partition(":")
    try:
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"cannot import it: {error}", got=location, allowed="package.module:name, importable from here", knob=knob
        ) from None


def without_cache(instance: object, name: str) -> dict[str, Any]:
    """Pickle state without a cached property: each process loads the user's code itself."""
    return {key: value for key, value in vars(instance).items() if key != name}


class Custom(RowFilter):
    """Wraps the user's class: made with `args`, it has `keep(record)` that returns a `Verdict` or a bool.

    A row on which it raises, or returns something else, has failed with that as its cause. Its source code is part of
    the artifact's identity; a `version` of its own is not needed.
    """

    def __init__(self, config: CustomFilterConfig):
        self._location, self._args = config.import_path, dict(config.args)
        _ = self._user  # a wrong path or wrong arguments must be known before any row is read

    def __getstate__(self) -> dict[str, Any]:
        return without_cache(self, "_user")

    @cached_property
    def _user(self) -> Any:
        made = load(self._location, "filters.N.import_path")
        try:
            user = made(**self._args)
        except TypeError as error:
            raise ConfigError(f"the arguments do not fit {self._location}: {error}", knob="filters.N.args") from None
        if not callable(getattr(user, "keep", None)):
            raise ConfigError("the filter has no method keep(record)", got=self._location, knob="filters.N.import_path")
        return user

    def keep(self, record: Record) -> Verdict:
        user = self._user
        try:
            verdict = user.keep(record)
        except Exception as error:  # noqa: BLE001  a filter is the user's code; one odd row must not end the job
            return Verdict(False, failure=f"{type(error).__name__}: {' '.join(str(error).split())}"[:200])
        if isinstance(verdict, bool):
            return Verdict(verdict, None if verdict else self._location.partition(":")[2].lower())
        if not isinstance(verdict, Verdict):
            return Verdict(False, failure=f"keep returned {type(verdict).__name__}, not a Verdict or a bool")
        try:
            json.dumps(dict(verdict.meta or {}))
        except (TypeError, ValueError) as error:
            return Verdict(False, failure=f"the meta of its verdict is no JSON: {error}"[:200])
        return verdict
