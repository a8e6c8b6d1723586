"""[Ray] The evaluate stage: every model answers every item of every benchmark once, whatever interrupts it."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from itune_ray.benchmarks import benchmarks
from itune_ray.benchmarks.base import Benchmark, Item
from itune_ray.cluster import connect
from itune_ray.config.evaluate import EvaluatedModel, EvaluateJob
from itune_ray.data.artifact import Artifact, RunStore
from itune_ray.data.ledger import Committer, Funnel, Ledger, funnel_of
from itune_ray.engine.host import EngineHost
from itune_ray.engine.pool import Pool, pool_key, scaled
from itune_ray.errors import EvalError
from itune_ray.evaluate.actor import SHARD, AskerArguments, EvalActors
from itune_ray.evaluate.answers import answers_table, check_answered, is_settled, outcome_of
from itune_ray.evaluate.ask import Asked, Question
from itune_ray.evaluate.score import score_benchmark
from itune_ray.observe.progress import Progress
from itune_ray.room import require


def run(job: EvaluateJob, runs: RunStore, stage: str, engines: EngineHost, progress: Progress) -> Artifact:
    """Score every model on every benchmark.

    Writes answers.parquet (`ANSWERS_SCHEMA`) and scores.json: model -> benchmark -> value, interval, n, failed,
    categories, groups, settings. Answered items never reach an engine again; items that no model answer exists for
    are counted, stored with their cause, and enter the score as the benchmark says.

    Raises:
        EvalError: A model answered no item of a benchmark, so there is nothing to score.
    """
    measures = benchmarks(job.benchmarks)
    versions = {measure.name: measure.version for measure in measures}
    artifact = runs.artifact(stage, "evaluate", job, {"benchmarks": versions})
    if artifact.complete:
        return artifact
    items = {measure.name: list(measure.items()) for measure in measures}
    _check_items(items)
    questions = _questions(job.models, items)
    ledger = Ledger(artifact.folder / "ledger")
    _answer_all(job, questions, measures, ledger, engines, progress)
    _publish(job, artifact, measures, items, ledger)
    return artifact


def _check_items(items: Mapping[str, Sequence[Item]]) -> None:
    for name, made in items.items():
        if not made:
            raise EvalError(f"benchmark {name} has no item", knob="benchmarks.N.source")
        twice = [key for key, count in Counter(item.key for item in made).items() if count > 1]
        if twice:
            raise EvalError(f"benchmark {name} has two items of one key", got=twice[0])


def _questions(models: Iterable[EvaluatedModel], items: Mapping[str, Sequence[Item]]) -> list[Question]:
    """Every item put to every model, model by model."""
    return [
        Question(model=model.name, benchmark=name, position=position, item=item)
        for model in models
        for name, made in items.items()
        for position, item in enumerate(made)
    ]


def _answer_all(
    job: EvaluateJob,
    questions: Sequence[Question],
    measures: Sequence[Benchmark],
    ledger: Ledger,
    engines: EngineHost,
    progress: Progress,
) -> None:
    """Ask what is not settled, pass by pass, until nothing is left that another attempt may mend."""
    todo = _unsettled(questions, ledger)
    if not todo:
        return
    connect(job.run.ray, progress.say)
    arguments = AskerArguments(
        models=_clients(job, todo, engines),
        benchmarks={measure.name: measure for measure in measures},
        sampling=job.sampling,
        seed=job.seed,
    )
    with EvalActors(arguments, job.workers) as actors:
        while todo:
            _answer_once(job, questions, todo, actors, ledger, progress)
            todo = _unsettled(questions, ledger)


def _unsettled(questions: Sequence[Question], ledger: Ledger) -> list[Question]:
    rows = ledger.table().select(["input_key", "status", "attempts", "meta"]).to_pylist()
    settled = {row["input_key"] for row in rows if is_settled(row)}
    return [question for question in questions if question.key not in settled]


def _clients(job: EvaluateJob, todo: Sequence[Question], engines: EngineHost) -> dict[str, Asked]:
    """Clients of the models that still have something to answer, their pools all asked for before any is awaited."""
    wanted = {question.model for question in todo}
    models = [model for model in job.models if model.name in wanted]
    bases = {pool_key(model): model for model in models}
    _require_room(job, list(bases.values()), engines)
    pools = _started(bases, engines)
    return {model.name: Asked(pools[pool_key(model)].client, model.model) for model in models}


def _require_room(job: EvaluateJob, models: Sequence[EvaluatedModel], engines: EngineHost) -> None:
    """Engines, old and new, and eval actors hold their CPUs together."""
    held, workers = Counter(engines.held), job.workers
    for model in models:
        held.update(Counter(engines.held_with(model)) - Counter(engines.held))
    own = scaled(workers.each, workers.num)
    held.update(own)
    require(
        held,
        f"{len(models)} engine pools and {job.workers.num} eval actors beside what the job holds already",
        "workers.num, workers.cpus_each, models.N.pool.cpus_each or run.ray.num_cpus",
        workers.each,
        workers.num,
    )
    engines.leave(own, models)


def _started(bases: Mapping[str, EvaluatedModel], engines: EngineHost) -> dict[str, Pool]:
    """One pool per base model. They load side by side: starting an engine is mostly waiting for one core."""
    with ThreadPoolExecutor(len(bases)) as threads:
        return dict(zip(bases, threads.map(engines.pool, bases.values()), strict=True))


def _answer_once(
    job: EvaluateJob,
    questions: Sequence[Question],
    todo: Sequence[Question],
    actors: EvalActors,
    ledger: Ledger,
    progress: Progress,
) -> None:
    attempts = ledger.attempts()
    done, tokens, failed = len(questions) - len(todo), 0, 0
    with (
        Committer(ledger, job.commit.rows, job.commit.seconds) as committer,
        progress.task("evaluate", len(questions), "items") as task,
    ):
        task.update(done)
        for answers in actors.stream(_shards(todo)):
            committer.add(outcome_of(a, attempts.get(a.question.key, 0) + 1) for a in answers)
            done += len(answers)
            tokens += sum(a.num_prompt_tokens + a.num_tokens for a in answers)
            failed += sum(a.grade is None for a in answers)
            task.update(done, tokens, **({"failed": failed} if failed else {}))


def _shards(todo: Sequence[Question]) -> list[list[Question]]:
    """Shards of one model each, the models taking turns, so that every engine is busy from the start."""
    per_model: dict[str, list[Question]] = defaultdict(list)
    for question in todo:
        per_model[question.model].append(question)
    queues = [[part[i : i + SHARD] for i in range(0, len(part), SHARD)] for part in per_model.values()]
    return [shard for turn in itertools.zip_longest(*queues) for shard in turn if shard]


def _publish(
    job: EvaluateJob,
    artifact: Artifact,
    measures: Sequence[Benchmark],
    items: Mapping[str, Sequence[Item]],
    ledger: Ledger,
) -> None:
    table = answers_table(ledger.table())
    rows: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in table.to_pylist():
        rows[row["model"], row["benchmark"]].append(row)
    scores: dict[str, dict[str, Any]] = {}
    for model in job.models:
        scores[model.name] = {}
        for measure in measures:
            answered = rows[model.name, measure.name]
            check_answered(model.name, measure.name, answered)
            scores[model.name] |= score_benchmark(
                measure, items[measure.name], answered, job.bootstrap, job.seed, _settings(job, measure)
            )
    artifact.folder.write_table("answers.parquet", table)
    artifact.folder.write_json("scores.json", scores)
    funnel = _funnel(job, measures, ledger)
    prompt, generated = (int(table[name].to_numpy().sum()) for name in ("prompt_tokens", "tokens"))
    artifact.finish(
        scores=_brief(scores),
        rows=table.num_rows,
        tokens=prompt + generated,
        prompt_tokens=prompt,
        generated_tokens=generated,
        funnel=funnel.to_json(),
    )


def _settings(job: EvaluateJob, measure: Benchmark) -> dict[str, Any]:
    """What of the job a reader must know; scored documents are not sampled."""
    return {"job_seed": job.seed} | ({} if measure.wants_texts else {"sampling": job.sampling.model_dump(mode="json")})


def _funnel(job: EvaluateJob, measures: Sequence[Benchmark], ledger: Ledger) -> Funnel:
    """The ledger's counts, and the benchmark rows that could not become items, once per model."""
    counted = funnel_of(ledger.table())
    rejected = Counter(counted.rejected)
    for measure in measures:
        for reason, count in measure.rejected.items():
            rejected[reason] += count * len(job.models)
    rows_in = counted.rows_in + sum(rejected.values()) - sum(counted.rejected.values())
    return Funnel(rows_in, counted.accepted, dict(sorted(rejected.items())), counted.failed)


def _brief(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    kept = ("value", "low", "high", "n", "failed")
    return {m: {b: {k: s[k] for k in kept} for b, s in per.items()} for m, per in scores.items()}
