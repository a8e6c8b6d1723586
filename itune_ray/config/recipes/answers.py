"""Recipes that answer, or make given answers better."""

from typing import Annotated, Literal

from pydantic import Field

from itune_ray.config.recipes.base import RecipeBase
from itune_ray.config.shared import Fraction, Positive, SamplingConfig, ServedModel


class RespondConfig(RecipeBase):
    """Distillation: the teacher answers each prompt, D = {(x, M_teacher(x))} (survey eq. 2)."""

    type: Literal["respond"] = "respond"
    samples: Positive = 1
    """Answers per prompt; all are kept, each as a row of its own."""
    system: str | None = None
    """System message put before prompts that have none."""
    template: str | None = None
    """A Jinja file that renders the last user turn from {{ prompt }} and {{ meta }}; default: the prompt as it is."""


class TeacherTopkConfig(RecipeBase):
    """A teacher's next-token distributions over given answers, cut to the likeliest k, for objective `kd` (survey
    eq. 3, methods D05)."""

    type: Literal["teacher_topk"] = "teacher_topk"
    k: Positive = 20
    """Tokens kept per position; at most `engine.max_logprobs`."""


class ReflectiveLearningConfig(RecipeBase):
    """A student answers from documents and revises by a teacher's questions until its replies settle (survey algorithm
    1, eq. 31-32, methods D23). The job's teacher is the teacher."""

    type: Literal["reflective_learning"] = "reflective_learning"
    documents: str | None = "documents"
    """Key of `meta` with the row's documents, a text or a list of texts; null: no documents."""
    levels: Annotated[tuple[Literal["easy", "medium", "hard", "expert"], ...], Field(min_length=1)] = (
        "easy",
        "medium",
        "hard",
        "expert",
    )
    """Of the questions: recall, relate passages, apply, criticise edge cases."""
    steps: Positive = 5
    epsilon: Annotated[float, Field(gt=0)] = 0.05
    """Two columns of the alignment matrix that differ by less (Euclidean) are equal."""
    patience: Positive = 2
    """Steps in a row that must be equal: the change is not monotone, so one may be so by chance."""
    passages: Positive = 4
    """Passages shown, those likest the instruction."""
    reretrieve: bool = False
    """Choose them anew each step, by the instruction and the teacher's comments."""
    bins: Positive = 1024
    """Dimensions of the hashed bag-of-words embedding."""
    trace: bool = True
    """Give the student's replies as rows too, scored by the teacher."""
    trace_min_score: Fraction = 0.5
    """Replies below are rejected as `low_score`."""
    student: ServedModel | None = None
    """Default: the teacher."""

    def served(self) -> dict[str, ServedModel]:
        """The student, where there is one."""
        return {} if self.student is None else {"student": self.student}


class ConstitutionalConfig(RecipeBase):
    """Answers criticised and revised under principles, a row per revision (Bai et al. 2022, methods D13). `sampling` is
    that of all calls; the paper's temperature is 1."""

    type: Literal["constitutional"] = "constitutional"
    revisions: Positive = 4
    """Under a principle each, drawn per row and revision."""
    direct_revision: bool = False
    """Revise without a critique first: half the calls; large models lose little."""
    principles: str | None = None
    """A YAML or JSON file, `{principles: [{id, critique, revision}, ...], examples: [...]}`; default: 16 of our own."""


class DialogueConfig(RecipeBase):
    """Dialogues of several turns whose assistant turns are all the teacher's (methods D04)."""

    type: Literal["dialogue"] = "dialogue"
    mode: Literal["replay", "self_chat"] = "replay"
    """`replay`: the rows are dialogues, and each of their answers is made anew after those made before it; `self_chat`:
    the rows open dialogues, and a simulated user goes on. What that user wants may stand in `meta.goal`."""
    turns: Positive = 4
    """Self-chat: answers at most."""
    end_marker: Annotated[str, Field(min_length=1)] = "[END]"
    """Self-chat: what the simulated user writes when it has got what it wanted."""
    user: ServedModel | None = None
    """Self-chat: who plays the user; default: the teacher."""
    user_sampling: SamplingConfig = SamplingConfig(max_tokens=256)

    def served(self) -> dict[str, ServedModel]:
        """The user, where it is a model of its own."""
        return {} if self.user is None else {"user": self.user}


class ReflectionConfig(RecipeBase):
    """Rows reviewed and rewritten, first the instruction and then the answer (Li et al. 2023, methods D11). `sampling`
    is that of the reviews; the paper's is greedy with 2048 tokens."""

    type: Literal["reflection"] = "reflection"
    passes: Annotated[tuple[Literal["instruction", "answer"], ...], Field(min_length=1)] = ("instruction", "answer")
    """What is rewritten, in this order; with one pass alone the row is a version of selective reflection (D12)."""
    retry: SamplingConfig = SamplingConfig(temperature=0.7, top_p=1.0, max_tokens=2048)
    """How the second try is sampled: a greedy one would repeat the first."""


class SelectiveReflectionConfig(RecipeBase):
    """Of a row, its reflected instruction, answer or both, the version that the student takes by its own difficulty (Li
    et al. 2024, methods D12). `teacher` reflects, `sampling` is that of its reviews; the paper's is greedy."""

    type: Literal["selective_reflection"] = "selective_reflection"
    student: ServedModel | None = None
    """The model to be trained; its engine must give log-probabilities of prompts. Default: the teacher."""
    mode: Literal["released", "full"] = "released"
    """released: only versions with a better answer are taken, as in the published data. full: all four."""
    retry: SamplingConfig = SamplingConfig(temperature=0.7, top_p=1.0, max_tokens=2048)
    """How the second try of a review is sampled."""

    def served(self) -> dict[str, ServedModel]:
        """The student, where it is a model of its own."""
        return {} if self.student is None else {"student": self.student}
