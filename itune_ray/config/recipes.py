"""Schemas of the recipes of `itune generate`, one per `type`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from itune_ray.config.base import Schema
from itune_ray.config.shared import Fraction, Positive, SamplingConfig, ServedModel


class RecipeBase(Schema):
    """What every built-in recipe has."""

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


class TeacherTopkConfig(RecipeBase):
    """A teacher's next-token distributions over given answers, cut to the likeliest k, for objective `kd` (survey
    eq. 3, methods D05)."""

    type: Literal["teacher_topk"] = "teacher_topk"
    k: Positive = 20
    """Tokens kept per position; at most `engine.max_logprobs`."""


ANSWERS = SamplingConfig(temperature=0.7, top_p=0.95, max_tokens=1024)


UNWRITABLE = (
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


class RoundsConfig(RecipeBase):
    """What recipes that propose in rounds have: D_t+1 = D_t and what is new (survey eq. 4, methods D06). `prompts` are
    the seeds; `sampling` is that of the proposals."""

    rounds: Positive = 1
    """Against what the rounds before it accepted a candidate of a round must be new."""
    calls: Positive = 100
    """Proposals asked for per round."""
    novelty: Fraction = 0.7
    """A candidate whose ROUGE-L F with an instruction of the pool is above this is not new."""
    min_words: Positive = 4
    max_words: Positive = 150
    """Bounds on the words of an instruction."""
    blocked: tuple[str, ...] = UNWRITABLE
    """Whole words or phrases that ask for what text cannot give."""
    blocked_starts: tuple[str, ...] = ("write a program",)
    """Openings of an instruction that are refused; letter case does not count."""
    target: Positive | None = None
    """Stop proposing once so many are accepted."""
    min_acceptance: Fraction = 0.0
    """Stop after a round that accepts a smaller share of its candidates."""


class SelfInstructConfig(RoundsConfig):
    """New instructions from old ones, then their answers, in rounds (Wang et al. 2023, methods D08). Each round shows
    instructions that the rounds before it accepted."""

    type: Literal["self_instruct"] = "self_instruct"
    examples: Positive = 8
    """Instructions shown per call."""
    machine_examples: Annotated[int, Field(ge=0)] = 2
    """How many of them are the machine's own, as soon as there are so many."""
    style: Literal["list", "single"] = "list"
    """`list`: the model goes on with a numbered list; `single`: it replies with one instruction and nothing else."""
    template: str | None = None
    """A Jinja file over {{ examples }}, a list of instructions; default: the built-in one of the style."""
    answer: SamplingConfig = ANSWERS
    """How the answers to accepted instructions are sampled."""


class AlpacaConfig(RoundsConfig):
    """Whole (instruction, input, output) triples from one call, shown seeds only (Taori et al. 2023, methods D09).
    Seeds are rows with an answer; the first paragraph of the user turn is the instruction, the rest its input."""

    machine_examples: ClassVar[int] = 0
    """Seeds only: what the model made is never shown to it."""

    type: Literal["alpaca"] = "alpaca"
    examples: Positive = 3
    """Triples shown per call."""
    list_length: Positive = 20
    """The number that the list is to end with."""
    template: str | None = None
    """A Jinja file over {{ examples }} (each with instruction, input and output) and {{ list_length }}. It must end
    where the next item begins; default: the built-in one."""
    blocked: tuple[str, ...] = (*UNWRITABLE, "video", "audio", "music", "flowchart", "diagram")

    @model_validator(mode="after")
    def _asks_for_some(self) -> "AlpacaConfig":
        if self.list_length <= self.examples:
            raise ValueError(f"list_length {self.list_length} leaves no task to write after {self.examples} examples")
        return self


class SelfInstructInstancesConfig(RecipeBase):
    """Inputs and outputs for instructions: classification tasks by label first, others by input first (Wang et al.
    2023, methods D08 steps 2 to 4). `sampling` is that of the instances."""

    type: Literal["self_instruct_instances"] = "self_instruct_instances"
    instances: Positive = 5
    """Rows per instruction at most; more are drawn from."""


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


JUDGING = SamplingConfig(temperature=0.0, max_tokens=2048)


class BacktranslationConfig(RecipeBase):
    """The instruction that a text answers, the pair kept where it is good (Li et al. 2023, arXiv 2308.06259).
    Inputs are texts, or rows with an answer; `sampling` is that of the instruction."""

    type: Literal["backtranslation"] = "backtranslation"
    min_score: Annotated[float, Field(ge=1, le=5)] = 4.0
    """Pairs that are rated lower, from 1 to 5, are rejected."""
    max_words: Positive = 2000
    """Longer texts are rejected."""
    system: str | None = None
    """System message of the rows, to tell them from others in training."""
    judge: ServedModel | None = None
    """Who rates the pairs; default: the teacher."""
    curation: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=512)
    """How the ratings are sampled."""

    def served(self) -> dict[str, ServedModel]:
        """The judge, where there is one."""
        return {} if self.judge is None else {"judge": self.judge}


class GroundedConfig(RecipeBase):
    """Tasks from documents, answered in new words from the document's facts (methods D18). Inputs are texts, or rows
    with an answer."""

    type: Literal["grounded"] = "grounded"
    piece_words: Positive = 1000
    """A longer document is cut between paragraphs."""
    pieces: Positive = 1
    """Pieces of a document, from its start, that a task is made of; each is a row."""
    min_recall: Fraction = 0.6
    """Least share of the answer's content words that the document must have."""
    max_copied: Annotated[float, Field(gt=0, le=1)] = 0.8
    """An answer with so large a share of its words in one run of the document is a copy."""


class MultiDocumentConfig(RecipeBase):
    """Tasks that need several related documents (Liu et al. 2025, methods D19). Inputs are rows of layout
    `documents`."""

    type: Literal["multi_document"] = "multi_document"
    samples: Positive = 1
    """Tasks per cluster of documents."""
    families: Annotated[tuple[Literal["general", "style", "snippets"], ...], Field(min_length=1)] = (
        "general",
        "style",
        "snippets",
    )
    """Kinds of task, drawn with equal chances: over whole documents, in one of 384 styles, or over two related
    passages."""
    documents: Annotated[int, Field(ge=2)] = 10
    """Documents of a cluster that are shown at most, drawn anew per task."""
    leave_one_out: bool = False
    """Ask whether all documents together answer the task and none can be left out; costs a call more per document, and
    one."""
    judge: ServedModel | None = None
    """Who says so; default: the teacher."""

    def served(self) -> dict[str, ServedModel]:
        """The judge, where there is one."""
        return {} if self.judge is None else {"judge": self.judge}


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

    def served(self) -> dict[str, ServedModel]:
        """The judge, where there is one."""
        return {} if self.judge is None else {"judge": self.judge}


class CustomRecipeConfig(RecipeBase):
    """Your own recipe: a class like those of `itune_ray.generate.recipes`."""

    type: Literal["custom"] = "custom"
    import_path: str
    """`package.module:Class`; its source code is part of the artifact's identity."""
    args: dict[str, Any] = {}


RecipeConfig = Annotated[
    RespondConfig
    | PreferenceConfig
    | BestOfNConfig
    | SelfInstructConfig
    | AlpacaConfig
    | SelfInstructInstancesConfig
    | TeacherTopkConfig
    | EvolInstructConfig
    | CompareConfig
    | BacktranslationConfig
    | GroundedConfig
    | MultiDocumentConfig
    | CustomRecipeConfig,
    Field(discriminator="type"),
]
