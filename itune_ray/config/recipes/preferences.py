"""Recipes that compare answers: pairs, labels and the best of several."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from itune_ray.config.base import Schema
from itune_ray.config.recipes.base import JUDGING, RecipeBase
from itune_ray.config.shared import SamplingConfig, ServedModel


class GraderScorer(Schema):
    """Scores answers by an exact check."""

    type: Literal["grader"] = "grader"
    grader: str = "playground"
    """A built-in grader, or `package.module:function` of (prompt, answer, meta) that returns a score in [0, 1]."""


class JudgeScorer(Schema):
    """Scores answers by asking a model (methods D16, D30)."""

    type: Literal["judge"] = "judge"
    judge: ServedModel
    dimension: str = "accuracy"
    scale: tuple[float, float] = (0, 5)
    template: str | None = None
    """See the judge filter of `curate`."""
    reference: str | None = None
    """Key of `meta` with a right answer that the judge measures by; its template then has {{ reference }} too."""


Scorer = Annotated[GraderScorer | JudgeScorer, Field(discriminator="type")]


class PreferenceConfig(RecipeBase):
    """Preference pairs from the model's own samples: the best against the worst by a grader or a judge."""

    type: Literal["preference"] = "preference"
    samples: Annotated[int, Field(ge=2)] = 4
    """Answers drawn per prompt; `sampling.temperature` must be above 0."""
    scorer: Scorer = GraderScorer()
    margin: Annotated[float, Field(ge=0)] = 0.0
    """Scores must differ by more than this."""
    chosen: Literal["sample", "reference"] = "sample"
    """`reference`: where no sample is right, the row's own answer is chosen, so that hard prompts are not lost."""

    def served(self) -> dict[str, ServedModel]:
        """The judge, where there is one."""
        return {"judge": self.scorer.judge} if isinstance(self.scorer, JudgeScorer) else {}


class BestOfNConfig(RecipeBase):
    """Rejection sampling: of n answers to a prompt the best by a grader or a judge is kept (Touvron et al. 2023)."""

    type: Literal["best_of_n"] = "best_of_n"
    samples: Annotated[int, Field(ge=2)] = 8
    """Answers drawn per prompt; `sampling.temperature` must be above 0."""
    scorer: Scorer = GraderScorer()
    min_score: float | None = None
    """A prompt whose best answer is scored lower gives no row."""

    def served(self) -> dict[str, ServedModel]:
        """The judge, where there is one."""
        return {"judge": self.scorer.judge} if isinstance(self.scorer, JudgeScorer) else {}


class CompareConfig(RecipeBase):
    """A row's answer judged against its `rejected` one in both orders (Zheng et al. 2023, methods D16)."""

    type: Literal["compare"] = "compare"
    judge: ServedModel | None = None
    """Default: the teacher."""
    judging: SamplingConfig = JUDGING
    """How the judge's words are sampled."""
    rule: Literal["conservative", "lenient"] = "conservative"
    """What two orders come to. conservative: a win only where both name the same answer. lenient: also where one order
    names it and the other calls a tie."""
    keep: Annotated[tuple[Literal["win", "tie", "lose"], ...], Field(min_length=1)] = ("win", "tie", "lose")
    """Results of the rows that are accepted; others are rejected with their result as the reason."""
    reference: str | None = None
    """Key of `meta` with a right answer, shown to the judge."""
    template: str | None = None
    """A Jinja file over {{ prompt }}, {{ first }}, {{ second }}, {{ reference }} and {{ fence }}; default: the built-in
    one."""


class PreferenceLabelConfig(RecipeBase):
    """Which of a row's two answers is better, as a model sees it in both orders (Bai et al. 2022, Lee et al. 2023,
    methods D14 and D15). `teacher` is the labeler; it is greedy, whatever `sampling` says."""

    type: Literal["preference_label"] = "preference_label"
    criterion: Literal["principles", "general"] = "principles"
    """`principles`: a question drawn per row from the file; `general`: one question about good answers for all."""
    principles: str | None = None
    """A YAML or JSON file, `{principles: [{id, question}, ...]}`; default: 16 of our own."""
    reasons_first: bool = False
    """The model argues before it chooses (chain of thought), and the label is clamped."""
    clamp: Annotated[float, Field(gt=0.5, le=1)] = 0.6
    """With reasons, labels are held in [1 - clamp, clamp]."""
    tie: Annotated[float, Field(ge=0, lt=0.5)] = 0.01
    """Rows with |p - 0.5| below this are rejected; at 0 an exact tie keeps the row's own order."""

    @model_validator(mode="after")
    def _not_all_ties(self) -> "PreferenceLabelConfig":
        if self.reasons_first and self.tie >= self.clamp - 0.5:
            raise ValueError(f"tie {self.tie} leaves no label: with reasons_first it must be below clamp - 0.5")
        return self
