"""Recipes that make new instructions."""

import typing
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from itune_ray.config.recipes.base import ANSWERS, RecipeBase
from itune_ray.config.shared import FileSource, Fraction, Positive, SamplingConfig, ServedModel

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
    encoding: Literal["plain", "varied"] = "plain"
    """plain: the instruction, a blank line and the input. varied: one of 7 surface forms (6 without an input), and half
    of the inputs with a single field label lose it, so that a model does not learn one layout (step 5)."""


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
