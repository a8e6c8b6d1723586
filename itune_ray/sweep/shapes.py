"""[Ray] The distinct models of a sweep: each compressed once and served by one engine pool, however many trials use it.

A compressed model is an artifact of the run like any other: trials, other sweeps and other steps with the same
compress job share it.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from itune_ray.benchmarks.base import Item
from itune_ray.compress.run import run as compress
from itune_ray.compress.run import version as compress_version
from itune_ray.compress.speed import compare_speed
from itune_ray.config.axes import of_section, told
from itune_ray.config.compress import CompressJob
from itune_ray.config.shared import ServedModel, VllmEngineConfig
from itune_ray.config.sweep import Point, SweepJob
from itune_ray.data.artifact import RunStore
from itune_ray.data.hub import local_model_folder
from itune_ray.data.records import Record
from itune_ray.engine.host import EngineHost
from itune_ray.engine.pool import Pool, pool_key
from itune_ray.errors import CompressError
from itune_ray.observe.progress import Progress

SPEED_PROMPTS, SPEED_TOKENS, SPEED_ROUNDS = 64, 32, 3
"""Each model answers so many prompts of the first benchmark, greedily, so long and so often; the median counts."""

COMPRESSED_STAGE = "compressed"
"""First part of the artifact names of models that a sweep compresses."""


@dataclass
class Shapes:
    """The models of a sweep."""

    served: dict[str, ServedModel]
    """Shape -> its model with room for the trials' adapters."""
    of_trial: dict[str, str]
    """Trial -> shape."""
    pools: dict[str, Pool] = field(default_factory=dict[str, Pool])


def check_compressible(points: Iterable[Point]) -> None:
    """Refuse what a model's head or channel counts do not allow, by its config alone.

    Raises:
        CompressError: In one line that names the values of the axes.
    """
    from transformers import AutoConfig

    from itune_ray.compress.blocks import config_shape
    from itune_ray.compress.methods.structured import kept_counts

    for job, values in {_identity(p.compress): (p.compress, p.axes) for p in points if p.compress}.values():
        config = AutoConfig.from_pretrained(
            local_model_folder(job.model).path, trust_remote_code=job.model.trust_remote_code
        )
        try:
            kept_counts(job.method, config_shape(config))
        except CompressError as error:
            where = told(of_section(values, "compress")) or "compress"
            what = f"{where}: {error.what}"
            raise CompressError(what, got=error.got, allowed=error.allowed, knob=error.knob) from None


def on_compressed_models(
    points: Sequence[Point], runs: RunStore, engines: EngineHost, progress: Progress
) -> list[Point]:
    """The points with the model to train on in place of its stand-in; each distinct one is compressed now or found."""
    models: dict[str, str] = {}
    made: list[Point] = []
    for point in points:
        if point.compress is None:
            made.append(point)
            continue
        key = _identity(point.compress)
        if key not in models:
            found = runs.find("compress", point.compress, compress_version(point.compress))
            artifact = found or compress(point.compress, runs, COMPRESSED_STAGE, engines, progress)
            models[key] = artifact.path("model")
        made.append(_with_model(point, models[key]))
    return made


def shapes_of(job: SweepJob, points: Sequence[Point]) -> Shapes:
    """The distinct models that trials are served on, with room for as many adapters as trials run at once."""
    ranks = [max(p.train.model.peft.rank, len(p.train.model.peft.train_tokens)) for p in points]  # pyright: ignore
    served: dict[str, ServedModel] = {}
    of_trial: dict[str, str] = {}
    for point in points:
        model = _with_room(point.evaluate.served(point.train), job.max_concurrent, max(ranks))
        of_trial[point.key] = pool_key(model)
        served.setdefault(of_trial[point.key], model)
    return Shapes(served, of_trial)


def start_pools(shapes: Shapes, engines: EngineHost) -> None:
    """One pool per shape; they load side by side, since starting an engine is mostly waiting for one core."""
    with ThreadPoolExecutor(len(shapes.served)) as threads:
        shapes.pools = dict(zip(shapes.served, threads.map(engines.pool, shapes.served.values()), strict=True))


def speeds(shapes: Shapes, items: Sequence[Item]) -> dict[str, float | None]:
    """Generated tokens per second of every shape without an adapter, taking turns on the same prompts.

    None for all where the benchmark asks no chats.
    """
    asked = [_record(i, item) for i, item in enumerate(items) if item.messages][:SPEED_PROMPTS]
    if not asked:
        return dict.fromkeys(shapes.served)
    clients = {name: pool.client for name, pool in shapes.pools.items()}
    measured = compare_speed(clients, asked, SPEED_TOKENS, SPEED_ROUNDS)
    return {name: float(measured[name]) for name in shapes.served}


def _identity(job: CompressJob) -> str:
    return str(sorted(job.identity().items(), key=str))


def _with_model(point: Point, path: str) -> Point:
    model = point.train.model.model_copy(update={"path": path})
    return dataclasses.replace(point, train=point.train.model_copy(update={"model": model}))


def _with_room(served: ServedModel, adapters: int, rank: int) -> ServedModel:
    if not isinstance(served.engine, VllmEngineConfig):
        return served
    room = {
        "max_adapters": max(adapters, served.engine.max_adapters),
        "max_adapter_rank": rank,
    }
    return served.model_copy(update={"engine": served.engine.model_copy(update=room)})


def _record(position: int, item: Item) -> Record:
    messages = (*(item.messages or ()), {"role": "assistant", "content": item.reference})
    return Record(source="sweep.speed", position=position, messages=messages)
