"""Mixing: the weights by which an epoch of the kept rows holds planned shares of the inputs (methods D38)."""

import math
from collections import defaultdict
from collections.abc import Sequence

from itune_ray.config.curate import CappedMixing, ManualMixing, Mixing, TemperatureMixing
from itune_ray.curate.board import Board
from itune_ray.data.mixture import capped_rates, mixture_weights, normalised, temperature_rates
from itune_ray.errors import ConfigError, did_you_mean


def mix(mixing: Mixing, board: Board, max_repeats: float) -> list[float]:
    """Multiply the weights of kept rows so that their sums per input are as planned; returns the planned shares.

    The sum of all weights stays what it was, unless `max_repeats` holds an input back: no row gets a larger weight.
    """
    mass, heaviest = defaultdict[int, float](float), defaultdict[int, float](float)
    rows, names = board.alive(), board.mixture.names
    for row in rows:
        part, weight = board.part(row), board.record(row).weight
        mass[part] += weight
        heaviest[part] = max(heaviest[part], weight)
    if not rows:
        return [0.0] * len(names)
    sizes = [mass[part] for part in range(len(names))]
    planned = rates(mixing, sizes, names)
    factors = mixture_weights(sizes, planned)
    for row in rows:
        part = board.part(row)
        board.reweigh(row, min(factors[part], max_repeats / heaviest[part]))
    return planned


def rates(mixing: Mixing, sizes: Sequence[float], names: Sequence[str]) -> list[float]:
    """Planned share of each input; raises `ConfigError` where given shares do not name the inputs."""
    check_mixing(mixing, names)
    if isinstance(mixing, ManualMixing):
        return normalised([mixing.rates[name] for name in names])
    if isinstance(mixing, CappedMixing):
        return capped_rates(sizes, mixing.cap)
    return temperature_rates(sizes, mixing.temperature if isinstance(mixing, TemperatureMixing) else math.inf)


def check_mixing(mixing: Mixing | None, names: Sequence[str]) -> None:
    """Given shares are for the inputs, each of them; raises `ConfigError`."""
    if not isinstance(mixing, ManualMixing):
        return
    for name in mixing.rates:
        if name not in names:
            what = f"mixing.rates names no input{did_you_mean(name, names)}"
            raise ConfigError(what, got=name, allowed=", ".join(names), knob="mixing.rates")
    missing = [name for name in names if name not in mixing.rates]
    if missing:
        raise ConfigError("mixing.rates leaves out an input", got=missing[0], allowed="0 too", knob="mixing.rates")
