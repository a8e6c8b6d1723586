"""Schemas of the recipes of `itune generate`, one per `type`."""

import typing
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from itune_ray.config.base import Schema
from itune_ray.config.shared import FileSource, Fraction, Positive, SamplingConfig, ServedModel
from itune_ray.config.techniques import ChainOfThought, Technique, TechniqueName, check_composition


class RecipeBase(Schema):
    """What every built-in recipe has."""

    @property
    def asks_teacher(self) -> bool:
        """Whether the job's `teacher` is asked; where not, no engine starts for it."""
        return True

    @property
    def needs_teacher(self) -> bool:
        """Whether the job must name a teacher; where not, it must not."""
        return self.asks_teacher

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


class MagpieConfig(RecipeBase):
    """Instructions that a tuned model writes where its template lets a user speak, then their answers (Xu et al. 2024,
    arXiv 2406.08464). Of an input only a system message counts, which steers; `sampling` is that of the
    instructions."""

    type: Literal["magpie"] = "magpie"
    samples: Positive = 1
    """Instructions per input."""
    min_words: Positive = 3
    max_words: Positive = 300
    answer: SamplingConfig = ANSWERS
    """How the answers are sampled."""


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


class MosaicConfig(RecipeBase):
    """Several rows as one, under rule-made meta-instructions on format, order and what to leave out; no model is asked
    (Li et al. 2024, survey eq. 28-30, methods D21). `prompts` are rows of one user turn with its answer; of `teacher`
    only the tokenizer is used, to count."""

    type: Literal["mosaic"] = "mosaic"
    epochs: Positive = 4
    """Passes over the rows, each shuffled and grouped anew."""
    grouping: Literal["uniform", "fixed", "fill", "exponential", "pareto", "log_normal", "logistic"] = "uniform"
    """How many rows k are put together: any of 1 to `max_rows`, always `max_rows`, as many as fit `max_tokens`, or
    `max_rows` - floor(Z) with Z of the named distribution."""
    max_rows: Positive = 10
    max_tokens: Positive = 2000
    """A composed row has fewer tokens than this, instruction and answer together."""
    strategies: Annotated[tuple[Literal["format", "order", "mask"], ...], Field(min_length=1)] = (
        "format",
        "order",
        "mask",
    )
    """Drawn with equal chances per row: answer all; answer in an order given by a rule; leave out what a rule names."""
    block_rows: Positive = 1000
    """Groups never cross blocks of so many rows."""

    @property
    def asks_teacher(self) -> bool:
        """No model is asked."""
        return False

    @property
    def needs_teacher(self) -> bool:
        """Its tokenizer counts."""
        return True


class TechniqueConfig(RecipeBase):
    """Prompt techniques applied to each prompt, whose answer is stored with the enhanced prompt or with the basic one
    (survey Table V, methods D42)."""

    type: Literal["technique"] = "technique"
    techniques: tuple[Technique, ...] = (ChainOfThought(),)
    """Applied in the order frame, context, task, demos, reasoning, format, whatever the order here."""
    filled: tuple[TechniqueName, ...] = ()
    """Further techniques, whose parameters the teacher gives for each prompt."""
    store: Literal["enhanced", "basic"] = "enhanced"
    """`basic`: context distillation, the student learns to answer so without being told."""

    @model_validator(mode="after")
    def _fit_together(self) -> "TechniqueConfig":
        if not self.techniques and not self.filled:
            raise ValueError("no technique is named: give techniques or filled")
        check_composition(self.techniques, self.filled)
        return self


class TokenAugment(Schema):
    """Words of the instruction changed by chance (Easy Data Augmentation, Wei and Zou 2019); no model is asked."""

    type: Literal["token"] = "token"
    ops: Annotated[tuple[Literal["synonym", "insert", "swap", "delete", "mask"], ...], Field(min_length=1)] = (
        "synonym",
        "insert",
        "swap",
        "delete",
    )
    share: Fraction = 0.1
    """Of the words: replaced, inserted or swapped; each is deleted with this probability."""
    mask_share: Fraction = 0.15
    """Probability that a word is masked; stop words never are."""
    mask_text: str | None = "___"
    """What stands for a masked word; null drops it."""


class ParaphraseAugment(Schema):
    """The instruction in the model's other words."""

    type: Literal["paraphrase"] = "paraphrase"


class BackTranslationAugment(Schema):
    """The instruction into another language and back."""

    type: Literal["back_translation"] = "back_translation"
    language: str = "English"
    """Of the instructions."""
    pivot: str = "German"


class GenerativeAugment(Schema):
    """Another task that takes the same skill, with an answer of its own."""

    type: Literal["generative"] = "generative"


class AugmentConfig(RecipeBase):
    """D_train = D_sample and variants of its instructions (survey eq. 17-19, methods D25)."""

    type: Literal["augment"] = "augment"
    how: Annotated[
        TokenAugment | ParaphraseAugment | BackTranslationAugment | GenerativeAugment, Field(discriminator="type")
    ] = TokenAugment()
    variants: Positive = 2
    """Variants of a row at most."""
    max_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Variants are at most this share of all rows: 0.5 is one variant per row."""
    keep_original: bool = True
    """Give each row itself too; without, the table is of variants alone."""
    max_rouge: Fraction = 0.9
    """A rewording whose ROUGE-L F with its original is above this is a copy."""
    judge: ServedModel | None = None
    """Who says whether a rewording asks for the same; default: the teacher."""

    def served(self) -> dict[str, ServedModel]:
        """The judge, where there is one."""
        return {} if self.judge is None else {"judge": self.judge}

    @property
    def asks_teacher(self) -> bool:
        """Words are changed without a model."""
        return not isinstance(self.how, TokenAugment)


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


Attribute = Literal["task", "lang", "length", "domain"]
ControlName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


class TaskTokensConfig(RecipeBase):
    """Control tokens before the prompt, so that one model can be told what to do (survey figure 2, methods D39). No
    model is asked."""

    type: Literal["task_tokens"] = "task_tokens"
    names: Annotated[dict[Attribute, Annotated[tuple[ControlName, ...], Field(min_length=1)]], Field(min_length=1)]
    """The names that each attribute may have: a row with another is rejected."""
    keys: dict[Attribute, str] = {}
    """Key of `meta` that holds a row's name; default: the attribute's own."""
    form: Literal["text", "special"] = "text"
    """`text`: `[task: NAME]`, as the tokenizer splits it; `special`: `<|task:NAME|>`, to be added to the tokenizer."""
    place: Literal["user", "system"] = "user"
    """Before the first user turn, or before the system message, which is made where there is none."""
    dropout: Fraction = 0.1
    """Share of rows that stay without tokens, so that the model works without them too."""

    @property
    def asks_teacher(self) -> bool:
        """No model is asked."""
        return False


Action = Literal[
    "goals",
    "constraints",
    "requirements",
    "skills",
    "reasoning",
    "domain",
    "life",
    "application",
    "emotion",
    "input_style",
    "output_style",
    "create",
]
RewardPart = Literal["quality", "complexity", "diversity", "executability"]


class MctsConfig(RecipeBase):
    """Rewrites of each seed found by Monte Carlo tree search (IDEA-MCTS, methods D22). `sampling` is that of the
    rewrites."""

    type: Literal["mcts"] = "mcts"
    iterations: Positive = 3
    children: Positive = 5
    """Different actions per expansion."""
    actions: Annotated[tuple[Action, ...], Field(min_length=1)] = typing.get_args(Action)
    task_actions: Annotated[int, Field(ge=0)] = 0
    """Further actions that the teacher proposes for each seed."""
    exploration: Annotated[float, Field(ge=0)] = 1.0
    """C of UCT; 0 is greedy."""
    uct_factor: Annotated[float, Field(gt=0)] = 1.0
    """Before ln N(parent) under the root; 2 is common too."""
    max_depth: Positive = 4
    """A node deeper than this is terminal."""
    max_reward: float = 10.0
    """A node of a larger reward is terminal."""
    reward: Annotated[dict[RewardPart, float], Field(min_length=1)] = {
        "quality": 1.0,
        "complexity": 1.0,
        "diversity": 1.0,
    }
    """Weights of the parts; each is 0 to 5, diversity is the number of intents."""
    rows: Positive = 4
    """Nodes drawn per seed, those on paths to terminal nodes, and answered."""
    keep_tree: bool = False
    """Put the whole tree into the `meta` of the seed's first row."""
    answer: SamplingConfig = ANSWERS
    """How the answers are sampled."""
    judge: ServedModel | None = None
    """Who rates; default: the teacher."""

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


TemplateTask = Literal["task", "pair", "choice", "classify", "question", "inverted"]
OptionStyle = Literal["list", "letters", "none"]


class TemplatesConfig(RecipeBase):
    """Labelled rows and tasks with definitions as instruction rows, by templates and without a model (FLAN, P3,
    Tk-Instruct; methods D40). The job has no `teacher`."""

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

    @property
    def asks_teacher(self) -> bool:
        """No model is asked."""
        return False


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
    | MagpieConfig
    | BacktranslationConfig
    | GroundedConfig
    | MultiDocumentConfig
    | MosaicConfig
    | TechniqueConfig
    | AugmentConfig
    | ReflectiveLearningConfig
    | TaskTokensConfig
    | MctsConfig
    | ConstitutionalConfig
    | PreferenceLabelConfig
    | DialogueConfig
    | ReflectionConfig
    | RedTeamConfig
    | TemplatesConfig
    | CustomRecipeConfig,
    Field(discriminator="type"),
]
