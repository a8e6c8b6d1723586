"""Recipes that make rows of documents."""

from typing import Annotated, Literal

from pydantic import Field

from itune_ray.config.recipes.base import RecipeBase
from itune_ray.config.shared import Fraction, Positive, SamplingConfig, ServedModel


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
