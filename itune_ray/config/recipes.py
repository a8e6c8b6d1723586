"""Schemas of the recipes of `itune generate`, one per `type`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from itune_ray.config.base import Schema
from itune_ray.config.shared import Fraction, Positive, SamplingConfig, ServedModel


class RecipeBase(Schema):
    """What every built-in recipe has."""

    asks_teacher: ClassVar[bool] = True
    """Whether the job's `teacher` is asked; without, no engine starts for it."""

    def served(self) -> dict[str, ServedModel]:
        """Further models that the recipe asks, by the name it knows them under."""
        return {}


class RespondConfig(RecipeBase):
    """Distillation: the teacher answers each prompt, D = {(x, M_teacher(x))} (survey eq. 2)."""

    type: Literal["respond"] = "respond"
    samples: Positive = 1
    """Answers per prompt; all are kept, each as a row of its own."""
    system: str | None = None
    """System message put before prompts that have none."""
    template: str | None = None
    """A Jinja file that renders the last user turn from {{ prompt }} and {{ meta }}; default: the prompt as it is."""


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


class TeacherTopkConfig(RecipeBase):
    """A teacher's next-token distributions over given answers, cut to the likeliest k, for objective `kd` (survey
    eq. 3, methods D05)."""

    type: Literal["teacher_topk"] = "teacher_topk"
    k: Positive = 20
    """Tokens kept per position; at most `engine.max_logprobs`."""


ANSWERS = SamplingConfig(temperature=0.7, top_p=0.95, max_tokens=1024)


class SelfInstructConfig(RecipeBase):
    """New instructions from old ones, then their answers, in rounds: D_t+1 = D_t and what is new (survey eq. 4; Wang et
    al. 2023, methods D06 and D08). `prompts` are the seeds; `sampling` is that of the proposals."""

    type: Literal["self_instruct"] = "self_instruct"
    rounds: Positive = 1
    """Each round shows instructions that the rounds before it accepted."""
    calls: Positive = 100
    """Proposals asked for per round."""
    examples: Positive = 8
    """Instructions shown per call."""
    machine_examples: Annotated[int, Field(ge=0)] = 2
    """How many of them are the machine's own, as soon as there are so many."""
    style: Literal["list", "single"] = "list"
    """`list`: the model goes on with a numbered list; `single`: it replies with one instruction and nothing else."""
    template: str | None = None
    """A Jinja file over {{ examples }}, a list of instructions; default: the built-in one of the style."""
    novelty: Fraction = 0.7
    """A candidate whose ROUGE-L F with an instruction of the pool is above this is not new."""
    min_words: Positive = 4
    max_words: Positive = 150
    blocked: tuple[str, ...] = (
        "image",
        "images",
        "graph",
        "graphs",
        "picture",
        "pictures",
        "file",
        "files",
        "map",
        "maps",
        "draw",
        "plot",
        "go to",
    )
    """Whole words or phrases that ask for what text cannot give."""
    target: Positive | None = None
    """Stop proposing once so many are accepted."""
    min_acceptance: Fraction = 0.0
    """Stop after a round that accepts a smaller share of its candidates."""
    answer: SamplingConfig = ANSWERS
    """How the answers to accepted instructions are sampled."""


EVOLVING = SamplingConfig(temperature=1.0, top_p=0.9, max_tokens=2048)


class EvolInstructConfig(RecipeBase):
    """Instructions made harder or rarer over rounds, each answered, failures eliminated (Xu et al. 2023, methods D10).
    Rows are the rewrites of all rounds; `sampling` is that of the rewrites."""

    type: Literal["evol_instruct"] = "evol_instruct"
    rounds: Positive = 4
    operators: Annotated[
        tuple[Literal["constraint", "deepen", "concretise", "reasoning", "complicate", "breadth"], ...],
        Field(min_length=1),
    ] = ("constraint", "deepen", "concretise", "reasoning", "complicate", "breadth")
    """Drawn with equal chances per row and round; one named twice is drawn twice as often."""
    answer: SamplingConfig = EVOLVING
    """How the answers are sampled."""
    judge: ServedModel | None = None
    """Who says whether a rewrite asks for more than its parent; default: the teacher."""

    def served(self) -> dict[str, ServedModel]:
        """The judge, where there is one."""
        return {} if self.judge is None else {"judge": self.judge}


TemplateTask = Literal["task", "pair", "choice", "classify", "question", "inverted"]
OptionStyle = Literal["list", "letters", "none"]


class TemplatesConfig(RecipeBase):
    """Labelled rows and tasks with definitions as instruction rows, by templates and without a model (FLAN, P3,
    Tk-Instruct; methods D40). The job has no `teacher`."""

    asks_teacher: ClassVar[bool] = False

    type: Literal["templates"] = "templates"
    task: Literal["auto"] | TemplateTask = "auto"
    """task: a definition, an input, references (format `superni`); pair: two texts and a label; choice: a question with
    options; classify: a text and a label; question: a question and its answer; inverted: the answer is given and the
    question asked for. auto: the first of these, but for inverted, that the row has the columns for."""
    columns: dict[str, tuple[str, ...]] = {}
    """Slot (question, context, options, label, text, first, second, answer, ...) -> the columns of the row that fill
    it, several as a list: {options: [choice0, choice1]}; default: the usual names."""
    options: tuple[str, ...] = ()
    """Names of the labels, for rows that bring no options of their own."""
    label: Literal["auto", "index", "text"] = "auto"
    """How rows say which option is right; auto refuses a text that is one option and the index of another."""
    option_styles: Annotated[tuple[OptionStyle, ...], Field(min_length=1)] = ("list", "letters", "none")
    """Drawn with equal chances per row made."""
    samples: Positive = 1
    """Templates per row, drawn without repetition while there are enough."""
    positive: Annotated[int, Field(ge=0)] = 2
    """Examples of a task that are shown at most."""
    negative: Annotated[int, Field(ge=0)] = 2
    max_chars: Positive = 4096
    """A longer field is cut; examples of a task are shown while all together is shorter."""
    templates: dict[TemplateTask, str] = {}
    """Your own Jinja files per task, instead of the built-in ten: templates that begin with a line `{# name #}`."""


class CustomRecipeConfig(RecipeBase):
    """Your own recipe: a class like those of `itune_ray.generate.recipes`."""

    type: Literal["custom"] = "custom"
    import_path: str
    """`package.module:Class`; its source code is part of the artifact's identity."""
    args: dict[str, Any] = {}


RecipeConfig = Annotated[
    RespondConfig
    | PreferenceConfig
    | SelfInstructConfig
    | TeacherTopkConfig
    | EvolInstructConfig
    | TemplatesConfig
    | CustomRecipeConfig,
    Field(discriminator="type"),
]
