"""[Ray] A trial as Tune sees it: one step of Tune trains to the next rung and has the adapter scored there.

All state is in the trial's own training artifact. A trial that begins again, on the same worker or another one, under
the same driver or the next, finds what is done and goes on from its checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from itune_ray.config.train import TrainJob
from itune_ray.data.storage import Folder
from itune_ray.errors import TrainError
from itune_ray.sweep.scorer import Scoring

if TYPE_CHECKING:
    from itune_ray.train.outcome import TrainOutcome
    from itune_ray.train.prepare import PreparedData


@dataclass(frozen=True)
class TrialPlan:
    """All a worker needs to run one trial."""

    train: TrainJob
    prepared: "PreparedData"
    """Shared by the trials that train on the same tokens."""
    stage_dir: str
    """The trial's training artifact."""
    rungs: tuple[int, ...]
    scoring: Scoring
    """Its folder is that of the whole trial."""
    metric: str

    def scored_at(self, rung: int) -> Folder:
        """Folder of the answers and scores of one rung."""
        return Folder.at(self.scoring.folder) / f"at-{rung:06d}"


class Trial(tune.Trainable):
    """One slot of the sweep: runs trials one after the other, so that imports are paid once."""

    def setup(self, config: dict[str, Any], plans: Mapping[str, TrialPlan], scorers: Sequence[Any]) -> None:
        """Tune's hook at the start of a worker."""
        self._plans, self._scorers = plans, scorers
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Tune's hook for the next trial on the same worker."""
        self._key: str = new_config["trial"]
        self._plan = self._plans[self._key]
        self._rungs = iter(self._plan.rungs)
        return True

    def step(self) -> dict[str, Any]:
        """Train to the next rung and score; `failed` is what no retry mends, e.g. a loss that is not finite."""
        rung = next(self._rungs)
        try:
            stored = self._stored_score(rung)
            score = self._new_score(rung) if stored is None else stored
        except TrainError as error:
            return {"steps": rung, "score": float("nan"), "failed": str(error)}
        return {"steps": rung, "score": score}

    def _stored_score(self, rung: int) -> float | None:
        folder = self._plan.scored_at(rung)
        return folder.read_json("scores.json")[self._plan.metric]["value"] if folder.exists("scores.json") else None

    def _new_score(self, rung: int) -> float:
        adapter = trained_to(self._plan, rung).adapter_path
        scorer = self._scorers[int(self._key, 16) % len(self._scorers)]
        asked = Scoring(**{**vars(self._plan.scoring), "folder": self._plan.scored_at(rung).uri})
        scores: Any = ray.get(scorer.score.remote(asked, adapter))
        return scores[self._plan.metric]["value"]


def trained_to(plan: TrialPlan, rung: int) -> "TrainOutcome":
    """Train to a rung, in this process where one worker is asked for, else by Ray Train beneath the trial."""
    import torch

    from itune_ray.train.loop import train_rank
    from itune_ray.train.outcome import pause_folder, read_outcome, references_beside, write_outcome
    from itune_ray.train.workers import fit

    job, out = plan.train, pause_folder(plan.stage_dir, rung)
    if (finished := read_outcome(out)) is not None:
        return finished
    if job.workers.most > 1:
        return fit(job, plan.prepared, plan.stage_dir, stop_at=rung)
    if not job.workers.gpus_each:
        torch.set_num_threads(job.workers.torch_threads or 1)
    references = references_beside(plan.stage_dir)
    outcome = train_rank(job, plan.prepared, plan.stage_dir, stop_at=rung, references=references)
    write_outcome(outcome, out)
    return outcome
