"""Recipes that rewrite rows by rules, most of them without a model."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from itune_ray.config.base import Schema
from itune_ray.config.recipes.base import RecipeBase
from itune_ray.config.shared import Fraction, Positive, ServedModel
from itune_ray.config.techniques import ChainOfThought, Technique, TechniqueName, check_composition


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
