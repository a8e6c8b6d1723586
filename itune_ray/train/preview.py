"""What a training job would learn: a few of its rows as the chat template renders them, supervised tokens apart from
masked ones."""

import itertools
import re
from collections.abc import Iterator

from itune_ray.config.shared import FileSource, HubSource, PlaygroundSource, Source
from itune_ray.config.train import TrainJob
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.records import Record
from itune_ray.data.sources import read_source
from itune_ray.data.storage import Folder
from itune_ray.errors import DataError
from itune_ray.train.documents import Document, DocumentError, documents_for
from itune_ray.train.renderer import load_renderer

ROWS_PER_PART = 2
_COLOURS = {True: ("\x1b[32m", "\x1b[0m"), False: ("\x1b[2m", "\x1b[0m")}
_BRACKETS = {True: ("⟦", "⟧"), False: ("", "")}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def preview(job: TrainJob, colour: bool) -> Iterator[str]:
    """Lines about the first rows of each part of the data; raises `ITuneError` where the model's tokenizer or the rows
    are not at hand.

    Args:
        colour: Supervised tokens green and masked ones dim; otherwise supervised ones stand in ⟦ ⟧.
    """
    renderer = load_renderer(job.model, job.images is not None)
    yield "sample of the rows: " + ("supervised tokens are green" if colour else "supervised tokens stand in ⟦ ⟧")
    for part in job.data:
        for record in _first_rows(part.source):
            yield from _row(record, job, renderer, colour)


def _first_rows(source: Source) -> list[Record]:
    if isinstance(source, HubSource) and not Folder.at(source.path).exists():
        raise DataError("rows of a Hub dataset are shown once it is here", got=source.path)
    if isinstance(source, FileSource | HubSource):
        source = source.model_copy(update={"limit": min(source.limit or ROWS_PER_PART, ROWS_PER_PART)})
    elif isinstance(source, PlaygroundSource):
        source = source.model_copy(update={"rows": min(source.rows, ROWS_PER_PART)})
    return read_source(source).records[:ROWS_PER_PART]


def _row(record: Record, job: TrainJob, renderer: ChatRenderer, colour: bool) -> Iterator[str]:
    try:
        document = documents_for(job).document(record, job, renderer)
    except DocumentError as error:
        detail = f", {_safe(' '.join(error.detail.split()))}" if error.detail else ""
        yield f"--- {record.key}: rejected as {error.reason}{detail}"
        return
    lengths = [int(length) for length in document["lengths"]]
    for number, (start, end) in enumerate(itertools.pairwise(itertools.accumulate(lengths, initial=0)), start=1):
        supervised = sum(document["supervised"][start:end])
        place = f", segment {number} of {len(lengths)}" if len(lengths) > 1 else ""
        yield f"--- {record.key}{place}: {end - start} tokens, {supervised} supervised"
        yield from _painted(document, start, end, renderer, colour).split("\n")


def _painted(document: Document, start: int, end: int, renderer: ChatRenderer, colour: bool) -> str:
    """The segment's text, run by run of equal flags; control characters of the rows reach no terminal."""
    marks, text = _COLOURS if colour else _BRACKETS, ""
    tokens = zip(document["input_ids"][start:end], document["supervised"][start:end], strict=True)
    for flag, run in itertools.groupby(tokens, key=lambda token: bool(token[1])):
        opens, closes = marks[flag]
        safe = _safe(_decoded([int(token) for token, _ in run], renderer))
        text += opens + (safe.replace("\n", f"{closes}\n{opens}") if colour else safe) + closes
    return text


def _decoded(ids: list[int], renderer: ChatRenderer) -> str:
    """The text of tokens; an added token that is repeated, as an image's is hundreds of times, once with its number."""
    text, pending = "", list[int]()
    added = renderer.tokenizer.added_tokens_decoder
    for token, group in itertools.groupby(ids):
        count = len(list(group))
        if count == 1 or token not in added:
            pending += [token] * count
        else:
            text += f"{renderer.tokenizer.decode(pending)}{renderer.tokenizer.decode([token])} × {count} "
            pending = []
    return text + renderer.tokenizer.decode(pending)


def _safe(text: str) -> str:
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
