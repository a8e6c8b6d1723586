"""The one training loop. It runs alone, under torchrun and inside Ray workers, and knows none of them.

The order of documents is read from disk, learning rate and randomness are functions of (seed, step), and all state is
in the checkpoint, so that stopping anywhere and starting again, on any number of ranks, continues the same run.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from itune_ray.config.adaptation import SUPPORT
from itune_ray.config.train import TrainJob
from itune_ray.data.ahead import Ahead
from itune_ray.data.batches import Batch, collate
from itune_ray.data.order import PackedRow, PackedTable
from itune_ray.data.records import Record, row_seed
from itune_ray.data.storage import Folder
from itune_ray.errors import TrainError
from itune_ray.model.costs import ParameterReport
from itune_ray.model.cpu import keep_memory
from itune_ray.model.export import export_trained, write_adapter
from itune_ray.model.load import pad_id
from itune_ray.train.build import Built, build_model, scalar
from itune_ray.train.checkpoint import Checkpoints
from itune_ray.train.compiling import compile_ahead
from itune_ray.train.divergence import Divergence
from itune_ray.train.gate import check_written, gate_documents, trained_twin
from itune_ray.train.metrics import MetricsLog
from itune_ray.train.objectives import build_objective
from itune_ray.train.optimizer import Optimizers
from itune_ray.train.outcome import TrainOutcome, pause_folder
from itune_ray.train.pictured import shown_for, write_processor
from itune_ray.train.prepare import PreparedData, prepare_locally
from itune_ray.train.randomness import draws, seeded
from itune_ray.train.reference import Reference, measure_for, model_at_start, reference_of
from itune_ray.train.renderer import load_renderer
from itune_ray.train.reptile import OuterSteps
from itune_ray.train.rows import VALIDATION, validation_job
from itune_ray.train.schedule import lr_factor
from itune_ray.train.statistic import step_batches
from itune_ray.train.step import Leaving, Stepper, StepResult
from itune_ray.train.strategies import build_strategy
from itune_ray.train.validation import Validation
from itune_ray.train.world import World, current_world, start_from_environment

DIVERGENCE = "divergence"
"""What the checkpoints' notes have of the watch over it."""
Row = dict[str, Any]
OnProgress = Callable[[int, int, Row], None]
"""(steps done, total steps, the step's row of metrics.jsonl and beside it `held_out_loss`, the newest of
validation.jsonl, `checkpoint_seconds`, `packing_efficiency` and `flops_per_s`); called on rank 0 only."""

OnPlace = Callable[[int, str], None]
"""(step, `prepares` its batches | `computes` with the other ranks | `saves`), called before a rank does it: when a
collective times out, the rank that never came to where the others wait can be named."""


def train_local(
    job: TrainJob,
    records: Iterable[Record],
    out_dir: str,
    on_progress: OnProgress | None = None,
    *,
    held_out: Iterable[Record] = (),
    stop_at: int | None = None,
) -> TrainOutcome:
    """Train without Ray, alone or as one rank of torchrun; asking again continues from the last checkpoint.

    Args:
        held_out: Rows of `job.validation`.
        stop_at: See `train_rank`.
    """
    torch.set_num_threads(job.workers.torch_threads or 1)
    world = start_from_environment(job.workers.collective_timeout_s)
    if world.is_main:
        prepare_locally(job, records, out_dir)
        if job.validation is not None:
            prepare_locally(validation_job(job), held_out, (Folder.at(out_dir) / VALIDATION).uri)
    world.barrier()
    prepared = prepare_locally(job, [], out_dir)
    return train_rank(job, prepared, out_dir, world, on_progress, stop_at=stop_at)


def train_rank(
    job: TrainJob,
    prepared: PreparedData,
    stage_dir: str,
    world: World | None = None,
    on_progress: OnProgress | None = None,
    *,
    stop_at: int | None = None,
    on_place: OnPlace | None = None,
    leaving: Leaving | None = None,
    references: str | None = None,
) -> TrainOutcome:
    """One rank's whole run: build, resume, step to the end, export. Collective over all ranks.

    Args:
        on_place: Told on every rank where it is, see `OnPlace`.
        leaving: See `itune_ray.train.step.Leaving`; the first time any rank says so, all save a checkpoint, and go on.
        references: Folder by which jobs of a run find each other's reference passes.
        stop_at: Pause once so many steps are done: checkpoint, and export to `pause_folder` what can be served, the
            adapter alone where there is one. A later call goes on as if there had been no pause.

    Raises:
        TrainError: `stop_at` lies outside the run, or the run has gone past it.
    """
    world = world or current_world()
    tokenizer = load_renderer(job.model).tokenizer
    strategy = build_strategy(job.strategy, world, job.precision)
    built = build_model(job, tokenizer, strategy, world)
    if world.device.type == "cpu":
        keep_memory()  # from here on, since what loading frees is not needed again
    model, optimizers = strategy.optimise(built.model, job.optimizer)
    built, budget = dataclasses.replace(built, model=model), built.budget
    stepper = Stepper(
        built.model,
        build_objective(job.objective),
        strategy,
        optimizers,
        world,
        built.masking,
        built.dtype,
        job.clip_norm,
        None if budget is None else budget.penalty,
        shown_for(job, world.device, built.dtype),
        built.router_weight,
    )
    if built.compiled:
        flat = built.masking == "varlen"
        widest = job.pass_tokens if flat else job.pack_capacity
        compile_ahead(stepper, collate([], pad_id(tokenizer), flat, at_least=widest))
    kept = (Folder.at(stage_dir) / "checkpoint").uri
    origin = world.gather(built.origin if world.is_main else None)[0]  # nodes may hold other files beside the weights
    checkpoints = Checkpoints(kept, job.checkpoint, world, origin, job.workers.collective_timeout_s)
    asking = _Asking(stepper, pad_id(tokenizer), model_at_start(job, built.origin), references)
    rows = _rows(job, prepared.folder, stage_dir, asking)
    held_out = None
    if job.validation is not None:
        apart = Folder.at(stage_dir) / VALIDATION
        held_out = _rows(job, (apart / "order").uri, apart.uri, asking)
    loop = Loop(job, rows, stepper, checkpoints, stage_dir, held_out, on_place, leaving)
    if budget is not None:
        optimizers.after_update.append(lambda: budget.allocate(loop.step, prepared.plan.steps))
    if job.reptile is not None:
        OuterSteps(optimizers, job.reptile, lambda: loop.step, prepared.plan.steps)
    metrics = loop.run(on_progress and _with_flops(on_progress, built.report), stop_at)
    gated = job.gate if stop_at is None and not scalar(job) else None
    twin = None if gated is None else trained_twin(job, built.model, tokenizer, world)
    model_path, adapter_path = _export(job, built, tokenizer, stage_dir, world, stop_at)
    if job.images is not None and world.is_main:
        for path in filter(None, (model_path, adapter_path)):
            write_processor(job, path)
    if gated is not None and twin is not None:
        documents = gate_documents(rows.table, gated)
        trained, twin = twin.scores(documents), None  # its memory is given up before the next model is opened
        check_written(job, documents, trained, (model_path, adapter_path), stage_dir)
    steps = stop_at or prepared.plan.steps
    return TrainOutcome(
        model_path,
        adapter_path,
        steps,
        metrics,
        built.report,
        prepared.accepted,
        prepared.rejected,
        checkpoints.at(steps).uri,
    )


def _with_flops(on_progress: OnProgress, report: ParameterReport) -> OnProgress:
    """Adds the model's FLOPs: 2 per parameter and token forward, 2 for activation and 2 for weight gradients."""
    per_token = 4 * report.total + 2 * report.trainable

    def told(step: int, total: int, row: Row) -> None:
        on_progress(step, total, {**row, "flops_per_s": per_token * row["tokens_per_s"]})

    return told


def _export(
    job: TrainJob,
    built: Built,
    tokenizer: PreTrainedTokenizerBase,
    stage_dir: str,
    world: World,
    stop_at: int | None,
) -> tuple[str | None, str | None]:
    out = stage_dir if stop_at is None else pause_folder(stage_dir, stop_at)
    if stop_at is not None and SUPPORT[job.model.peft.name].route == "adapter":
        adapter = (Folder.at(out) / "adapter").uri
        write_adapter(built.model, tokenizer, adapter, is_main=world.is_main, base_path=job.model.path)
        return None, adapter
    return export_trained(
        built.model, tokenizer, out, dtype=built.dtype, is_main=world.is_main, base_path=job.model.path
    )


@dataclass(frozen=True)
class Rows:
    """Packed rows with what their objective needs beside the ids."""

    table: PackedTable
    reference: Reference | None
    pad: int

    def attached(self, rows: Sequence[PackedRow]) -> list[PackedRow]:
        """The rows with their further columns."""
        return list(rows) if self.reference is None else self.reference.attached(rows)


class _Asking(NamedTuple):
    """What a reference pass takes beside the rows."""

    stepper: Stepper
    pad: int
    model: str
    references: str | None


def _rows(job: TrainJob, order: str, stage_dir: str, asking: _Asking) -> Rows:
    """The rows of an order; where the objective compares with a reference, its pass is made first. Collective."""
    stepper, pad, model, references = asking
    table, measure = PackedTable(order), measure_for(stepper.objective.needs)
    if measure is None:
        return Rows(table, None, pad)
    folder = (Folder.at(stage_dir) / "reference").uri
    return Rows(table, reference_of(folder, table, measure, model, stepper, job.micro_batch, pad, references), pad)


class Loop:
    """Steps over packed rows from wherever the newest checkpoint stands."""

    def __init__(
        self,
        job: TrainJob,
        rows: Rows,
        stepper: Stepper,
        checkpoints: Checkpoints,
        stage_dir: str,
        held_out: Rows | None = None,
        on_place: OnPlace | None = None,
        leaving: Leaving | None = None,
    ):
        self._on_place = on_place or (lambda step, place: None)
        self._leaving, self._left = leaving or (lambda: False), False
        self._job, self._rows, self._stepper, self._checkpoints = job, rows, stepper, checkpoints
        self._table, self._held_out = rows.table, held_out
        self._ahead = Ahead(self._share, rows.table.plan.steps)
        self._stage_dir, self._world = stage_dir, stepper.world
        self._optimizers: Optimizers = stepper.optimizers
        self._total = rows.table.plan.steps
        self._draws = draws(stepper.model)
        self.step = 0
        """The step that is being taken, counted from 1."""

    def run(self, on_progress: OnProgress | None = None, stop_at: int | None = None) -> Row:
        """Train to the end, or until `stop_at` steps are done, and return the last metrics row."""
        end = self._total if stop_at is None else stop_at
        if not 0 < end <= self._total:
            raise TrainError(
                "the run has no such step to stop at", got=end, allowed=f"1 to {self._total}", knob="stop_at"
            )
        try:
            row = self._run(end, on_progress)
            self._checkpoints.wait()
        except BaseException:
            self._checkpoints.settle()
            raise
        if (done := self._checkpoints.latest()) != end:
            raise TrainError("the run ended with another number of steps than planned", got=done, allowed=end)
        return row

    def _run(self, end: int, on_progress: OnProgress | None) -> Row:
        start = self._resume(end)
        log = MetricsLog(self._stage_dir, start) if self._world.is_main else None
        watch = self._watch(start)
        validation, held_out = self._validation(start)
        row: Row = {}
        saved: Row = {}
        for step in range(start, end):
            row, leaves = self._step(step)
            if validation is not None and validation.due(step + 1, self._total):
                held_out = {"held_out_loss": validation.run(step + 1)["loss"]}
            if log is not None and ((step + 1) % self._job.log_every == 0 or step + 1 == self._total):
                log.write(row)
                if on_progress is not None:
                    on_progress(step + 1, self._total, {**row, **held_out, **saved, **self._filled(step)})
            if watch is not None:
                watch.see(step + 1, row["loss"])
            if (step + 1) % self._job.checkpoint.every_steps == 0 or step + 1 == end or leaves:
                began = time.perf_counter()
                self._on_place(step + 1, "saves")
                notes = {} if watch is None else {DIVERGENCE: watch.state}
                self._checkpoints.save(step + 1, self._stepper.model, self._optimizers, self._stepper.strategy, notes)
                if leaves:
                    self._checkpoints.wait()
                saved = {"checkpoint_seconds": time.perf_counter() - began}
                if log is not None:
                    log.flush()
        return row or (log.last() if log is not None else {})

    def _watch(self, start: int) -> Divergence | None:
        """On every rank, which all see the same loss, so that none is left waiting; it goes on from the checkpoint. Not
        where the order itself makes the loss rise: easy rows or one task first."""
        job = self._job
        rises = job.curriculum is not None or job.reptile is not None
        if job.divergence is None or rises:
            return None
        return Divergence(job.divergence, self._checkpoints.notes(start).get(DIVERGENCE))

    def _filled(self, step: int) -> Row:
        """Share of the packed rows' places that hold a token."""
        if not self._job.packing:
            return {}
        places = self._table.num_rows(step) * self._job.pack_capacity
        return {"packing_efficiency": self._table.tokens(step) / places}

    def _validation(self, start: int) -> tuple[Validation | None, Row]:
        """The held-out rows and what is known of them: a fresh run scores them first."""
        held_out = self._held_out
        if held_out is None:
            return None, {}
        validation = Validation(
            self._job, held_out.table, self._stepper, held_out.pad, held_out.attached, self._stage_dir, start
        )
        return validation, ({"held_out_loss": validation.run(0)["loss"]} if start == 0 else {})

    def _resume(self, end: int) -> int:
        step = self._checkpoints.newest_whole()
        if step > end:
            raise TrainError("the checkpoint is beyond the end of this run", got=step, allowed=f"{end} steps")
        if step:
            self._checkpoints.load(step, self._stepper.model, self._optimizers, self._stepper.strategy)
        return step

    def _step(self, step: int) -> tuple[Row, bool]:
        """The step's row of metrics, and whether it is the first after which a rank is about to go."""
        began = time.perf_counter()
        lr = self._optimizers.set_lr(lr_factor(self._job.schedule, step, self._total))
        self._seed(step)
        self.step = step + 1
        self._on_place(step + 1, "prepares")
        batches = self._micro_batches(step)
        self._on_place(step + 1, "computes")
        result = self._stepper(batches, self._leaving)
        seconds = time.perf_counter() - began
        if not _finite(result):
            raise TrainError(
                f"the loss or its gradient is not finite at step {step + 1}",
                got=f"loss {result.loss}, grad_norm {result.grad_norm}",
                allowed="finite numbers",
                knob="optimizer.lr",
            )
        first, self._left = result.leaving and not self._left, self._left or result.leaving
        return self._row(step, result, lr, seconds), first

    def _row(self, step: int, result: StepResult, lr: float, seconds: float) -> Row:
        tokens = self._table.tokens(step)
        return {
            "step": step + 1,
            "epoch": round(self._table.epoch(step), 6),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens": tokens,
            "ranks": self._world.size,
            "units": result.units,
            **result.metrics,
            "seconds": round(seconds, 6),
            "tokens_per_s": round(tokens / seconds, 1),
        }

    def _seed(self, step: int) -> None:
        """For what may draw beside the model; seeding per step and rank leaves no state to save."""
        torch.manual_seed(row_seed(self._job.seed, "train.rank", str(self._world.rank), step))

    def _micro_batches(self, step: int) -> list[Batch]:
        """This rank's share of a step; every rank makes as many micro-batches as the fullest."""
        rows = self._ahead(step)
        most = -(-self._table.num_rows(step) // self._world.size)
        if not self._draws:
            return step_batches(rows, most, self._job.micro_batch, self._rows.pad, self._stepper)
        return seeded(step_batches(rows, most, 1, self._rows.pad, self._stepper), rows, self._job.seed, step)

    def _share(self, step: int) -> list[PackedRow]:
        return self._rows.attached(self._table.rows(step, self._world.rank, self._world.size))


def _finite(result: StepResult) -> bool:
    return bool(torch.isfinite(torch.tensor([result.loss, result.grad_norm])).all())
