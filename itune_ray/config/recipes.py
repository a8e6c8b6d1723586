"""Schemas of the recipes of `itune generate`, one per `type`."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from itune_ray.config.base import Schema
from itune_ray.config.shared import FileSource, Fraction, Positive, SamplingConfig, ServedModel


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
    logprobs: Positive = 20
    """First tokens that the engine lists; at most `engine.max_logprobs`."""

    @model_validator(mode="after")
    def _not_all_ties(self) -> "PreferenceLabelConfig":
        if self.reasons_first and self.tie >= self.clamp - 0.5:
            raise ValueError(f"tie {self.tie} leaves no label: with reasons_first it must be below clamp - 0.5")
        return self


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


class RedTeamConfig(RecipeBase):
    """Test questions on the prompts' topics, a target's replies and their harm (Perez et al. 2022, methods D17). For
    evaluation: rows are tagged `unsafe` in their meta. `teacher` writes the questions, `sampling` is theirs."""

    type: Literal["red_team"] = "red_team"
    samples: Positive = 8
    """Questions per topic. A prompt names its topic as the title of a list: "questions to ask someone about ..."."""
    examples: FileSource | None = None
    """accepted/ of an earlier run: its questions are shown, the harmful ones more often (stochastic few-shot). Default:
    none are (zero-shot)."""
    num_examples: Positive = 5
    example_temperature: Annotated[float, Field(gt=0)] = 0.1
    """T of the weights exp(harm / T) that examples are drawn with."""
    harm: Literal["judge", "contact"] = "judge"
    """`judge`: a model scores the reply; `contact`: 1 where it holds an e-mail address, phone or social security
    number."""
    target: ServedModel | None = None
    """Who is tested; default: the teacher."""
    judge: ServedModel | None = None
    """Who scores; default: the teacher."""
    answer: SamplingConfig = SamplingConfig(max_tokens=256)
    """How the target's replies are sampled."""

    def served(self) -> dict[str, ServedModel]:
        """The target and the judge, where they are models of their own."""
        models = {"target": self.target, "judge": self.judge}
        return {name: model for name, model in models.items() if model is not None}


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
    | ConstitutionalConfig
    | PreferenceLabelConfig
    | DialogueConfig
    | ReflectionConfig
    | RedTeamConfig
    | CustomRecipeConfig,
    Field(discriminator="type"),
]
