"""Mixing: the weights by which an epoch of the kept rows holds planned shares of the inputs (methods D38)."""

import math
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction

from itune_ray.config.curate import CappedMixing, ManualMixing, Mixing, ReplayMixing, TemperatureMixing
from itune_ray.curate.board import Board
from itune_ray.data.mixture import capped_rates, mixture_weights, normalised, temperature_rates
from itune_ray.data.records import row_seed
from itune_ray.errors import ConfigError, did_you_mean


def mix(mixing: Mixing, board: Board, max_repeats: float, seed: int) -> list[float]:
    """Multiply the weights of kept rows so that their sums per input are as planned; returns the planned shares.

    The sum of all weights stays what it was, unless `max_repeats` holds an input back: no row gets a larger weight.
    Under `replay` the weights stay, and what is not drawn of old inputs is rejected as `not_replayed`.
    """
    if isinstance(mixing, ReplayMixing):
        return replay(mixing, board, seed)
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


def replay(mixing: ReplayMixing, board: Board, seed: int) -> list[float]:
    """Keep the rows of each old task that have the smallest hashes, as many as its quota; returns the planned shares.

    A larger quota holds a smaller one, so a memory of the M smallest hashes serves every quota up to M.
    """
    names = board.mixture.names
    tasks: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
    mass = [0.0] * len(names)
    num_new = 0
    for row in board.alive():
        part, record = board.part(row), board.record(row)
        if names[part] in mixing.old:
            name = "" if mixing.by is None else str(record.meta.get(mixing.by.removeprefix("meta."), ""))
            tasks[part, name].append(row)
        else:
            mass[part] += record.weight
            num_new += 1
    quota = max(1, math.floor(Fraction(str(mixing.rate)) * num_new))
    drawn_from = quota if mixing.memory is None else min(quota, mixing.memory)
    for (part, _), rows in sorted(tasks.items()):
        ranked = sorted(rows, key=lambda row: (row_seed(seed, "curate.replay", board.record(row).key), row))
        mass[part] += quota * math.fsum(board.record(row).weight for row in rows) / len(rows)
        for row in ranked[drawn_from:]:
            board.reject(row, "not_replayed", "mixing")
    return normalised(mass) if any(mass) else mass


def rates(mixing: Mixing, sizes: Sequence[float], names: Sequence[str]) -> list[float]:
    """Planned share of each input; raises `ConfigError` where given shares do not name the inputs."""
    check_mixing(mixing, names)
    if isinstance(mixing, ManualMixing):
        return normalised([mixing.rates[name] for name in names])
    if isinstance(mixing, CappedMixing):
        return capped_rates(sizes, mixing.cap)
    return temperature_rates(sizes, mixing.temperature if isinstance(mixing, TemperatureMixing) else math.inf)


def check_mixing(mixing: Mixing | None, names: Sequence[str]) -> None:
    """Given shares are for the inputs, each of them, and old inputs are some of them; raises `ConfigError`."""
    if isinstance(mixing, ReplayMixing):
        for name in mixing.old:
            if name not in names:
                what = f"mixing.old names no input{did_you_mean(name, names)}"
                raise ConfigError(what, got=name, allowed=", ".join(names), knob="mixing.old")
        if set(mixing.old) == set(names):
            what = "every input is old: there is nothing new to rehearse beside"
            raise ConfigError(what, got=", ".join(names), knob="mixing.old")
    if not isinstance(mixing, ManualMixing):
        return
    for name in mixing.rates:
        if name not in names:
            what = f"mixing.rates names no input{did_you_mean(name, names)}"
            raise ConfigError(what, got=name, allowed=", ".join(names), knob="mixing.rates")
    missing = [name for name in names if name not in mixing.rates]
    if missing:
        raise ConfigError("mixing.rates leaves out an input", got=missing[0], allowed="0 too", knob="mixing.rates")
