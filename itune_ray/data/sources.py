"""Sources to rows: files, payloads of earlier artifacts, the playground, the Hub, your own function.

Reading is plain Python and needs no Ray session. What cannot be used is returned beside what can, never dropped.
"""

import contextlib
import functools
import importlib
import inspect
import itertools
import posixpath
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from itune_ray.config.shared import CustomSource, FileSource, HubSource, PlaygroundSource, Source
from itune_ray.data.download import AbsentError, hub_info
from itune_ray.data.files import RawRow, read_rows
from itune_ray.data.fingerprint import artifact_of
from itune_ray.data.formats import detect, parse
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.data.storage import Folder
from itune_ray.errors import ConfigError, DataError, did_you_mean

SOURCES = {
    "file": "itune_ray.data.sources:read_file",
    "playground": "itune_ray.data.sources:read_playground",
    "hub": "itune_ray.data.sources:read_hub",
    "custom": "itune_ray.data.sources:read_custom",
}
"""Source type -> reader."""
PLAYGROUND_ROWS = "itune_ray.playground.sets:rows"
"""Resolved by name: the playground is built on this package, so this package cannot import it."""


@dataclass(frozen=True)
class SourceTable:
    """The rows of one source."""

    name: str
    """Name of the source in reports and in `only`; for all but artifact payloads the first part of every row key."""
    records: list[Record]
    quarantined: list[Outcome]
    """Rows that could not be used, rejected with a reason, in the order of their positions."""
    layout: str = "records"
    """The row layout taken, see `itune_ray.data.formats`."""
    revision: str | None = None
    """Commit of a Hub dataset."""

    @property
    def rows_in(self) -> int:
        """All rows that were read."""
        return len(self.records) + len(self.quarantined)


def read_source(source: Source) -> SourceTable:
    """Read a source whole.

    Raises:
        DataError: It is not there, holds nothing, or has no layout that fits.
        ConfigError: A playground option or an import path is wrong.
    """
    table = _resolve(SOURCES[source.type], "type")(source)
    twice = [key for key, count in Counter(r.key for r in table.records).items() if count > 1]
    if twice:
        raise DataError(
            f"source {table.name} yields two rows of the same key", got=twice[0], allowed="one per (position, sample)"
        )
    return table


def told_apart(tables: Sequence[SourceTable]) -> list[SourceTable]:
    """The tables, no two of which share a row key unless they share a name.

    Payloads of artifacts keep their keys, so a stage read beside the one before it holds keys twice. The source of each
    such row becomes `NAME/SOURCE`, with its table's name; `meta.renamed_from` is the source that it had.
    """
    if len(tables) < 2:
        return list(tables)
    holder: dict[str, int] = {}
    shared: set[str] = set()
    for number, table in enumerate(tables):
        for record in itertools.chain(table.records, (outcome.record for outcome in table.quarantined)):
            if holder.setdefault(record.key, number) != number:
                shared.add(record.key)
    return [_renamed(table, shared) for table in tables] if shared else list(tables)


def _renamed(table: SourceTable, shared: Collection[str]) -> SourceTable:
    def new(record: Record) -> Record:
        if record.key not in shared:
            return record
        meta = {**record.meta, "renamed_from": record.source}
        return replace(record, source=f"{table.name}/{record.source}", meta=meta)

    records = [new(record) for record in table.records]
    unusable = [replace(o, record=r, input_key=r.key) for o in table.quarantined for r in (new(o.record),)]
    return replace(table, records=records, quarantined=unusable)


def read_file(source: FileSource) -> SourceTable:
    """Rows of files. The payload of an artifact keeps its row keys, whatever the name."""
    rows = read_rows(source.path, source.limit)
    payload_of = _finished_artifact(source.path)
    table = _table(rows, source.format, source.name or payload_of or _stem(source.path), source)
    if table.rows_in == 0 and payload_of is None:
        raise DataError("the source holds no rows", got=source.path, knob="path")
    return table


def read_playground(source: PlaygroundSource) -> SourceTable:
    """Rows of the built-in world, made from the seed."""
    name = source.name or f"playground-{source.split}"
    rows = _resolve(PLAYGROUND_ROWS, "type")(source.split, source.rows, source.seed, source.options)
    return SourceTable(name, [replace(record, source=name) for record in rows], [])


def read_hub(source: HubSource) -> SourceTable:
    """Rows of a Hub dataset, or of a folder written by `datasets.save_to_disk`."""
    dataset, revision = _saved(source) if Folder.at(source.path).exists() else _downloaded(source)
    rows = (RawRow(position, dict(row)) for position, row in enumerate(itertools.islice(dataset, source.limit)))
    name = source.name or posixpath.basename(source.path.rstrip("/"))
    return replace(_table(rows, source.format, name, source), revision=revision)


def read_custom(source: CustomSource) -> SourceTable:
    """What the user's function yields; a given name replaces the rows' own source."""
    function: Callable[..., Iterable[Record]] = _resolve(source.import_path, "import_path")
    try:
        inspect.signature(function).bind(**source.args)
    except TypeError as error:
        raise ConfigError(f"the arguments do not fit {source.import_path}: {error}", knob="args") from None
    records: list[Record] = []
    for value in function(**source.args):
        if not isinstance(value, Record):
            what = f"{source.import_path} must yield itune_ray.data.records.Record"
            raise DataError(what, got=type(value).__name__, knob="import_path")
        records.append(replace(value, source=source.name) if source.name else value)
    return SourceTable(source.name or source.import_path.partition(":")[2], records, [])


def _table(rows: Iterator[RawRow], layout: str, name: str, source: FileSource | HubSource) -> SourceTable:
    seen: list[RawRow] = []
    if layout == "auto":
        for row in rows:
            seen.append(row)
            if row.fields is not None:
                break
        columns = next((row.fields for row in seen if row.fields is not None), None)
        try:
            layout = "records" if columns is None else detect(columns)
        except DataError as error:
            raise DataError(
                f"{source.path}: {error.what}", got=error.got, allowed=error.allowed, knob=error.knob
            ) from None
    records, quarantined = parse(itertools.chain(seen, rows), name, layout, source.max_row_bytes)  # type: ignore[arg-type]
    return SourceTable(name, records, quarantined, layout)


def _finished_artifact(path: str) -> str | None:
    """The stage whose payload the path is, else None; refuses one that is still being written."""
    folder = Folder.at(path)
    inside = artifact_of(folder)
    if inside is None:
        return None
    depth = len(inside.split("/")) - 1
    root = Folder(folder.fs, "/".join(folder.path.split("/")[: len(folder.path.split("/")) - depth]), "")
    manifest: Mapping[str, Any] = root.read_json("manifest.json")
    if manifest.get("status") != "complete":
        raise DataError("the artifact is not finished: run its job to the end first", got=path, knob="path")
    return str(manifest["stage"])


def _stem(path: str) -> str:
    return posixpath.basename(path.rstrip("/")).split(".")[0] or "file"


def _resolve(location: str, knob: str) -> Any:
    """The object at `package.module:name`."""
    module, _, name = location.partition(":")
    try:
        found = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"cannot import it: {error}", got=location, allowed="package.module:name, importable from here", knob=knob
        ) from None
    return found


# --- Hub -----------------------------------------------------------------------------------------------------------


def _saved(source: HubSource) -> tuple[Iterable[Mapping[str, Any]], None]:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(source.path)
    except (FileNotFoundError, ValueError, OSError) as error:
        what = f"the folder is no dataset saved by datasets.save_to_disk: {' '.join(str(error).split())[:200]}"
        raise DataError(what, got=source.path, knob="path") from None
    return (_split(loaded, source) if isinstance(loaded, DatasetDict) else loaded), None  # type: ignore[return-value]


def _split(loaded: Mapping[str, Any], source: HubSource) -> Iterable[Mapping[str, Any]]:
    if source.split not in loaded:
        hint = did_you_mean(source.split, loaded)
        raise DataError(f"no such split{hint}", got=source.split, allowed=", ".join(loaded), knob="split")
    return loaded[source.split]


def _downloaded(source: HubSource) -> tuple[Iterable[Mapping[str, Any]], str | None]:
    """From the Hub, or from its cache on this machine where the Hub cannot be asked."""
    from datasets import DownloadConfig, DownloadMode, load_dataset
    from datasets.exceptions import DatasetsError

    commit = _hub_commit(source)
    try:
        with _no_network(commit is None):
            loaded = load_dataset(
                source.path,
                source.subset,
                split=source.split,
                revision=commit or source.revision,
                download_config=DownloadConfig(local_files_only=commit is None),
                download_mode=DownloadMode.REUSE_DATASET_IF_EXISTS,
            )
    except (DatasetsError, OSError, ValueError) as error:
        offline = "" if commit else " (the Hub cannot be reached, and this machine has no copy)"
        raise DataError(
            f"the dataset cannot be read{offline}: {' '.join(str(error).split())[:200]}",
            got=source.path,
            allowed="org/name of a Hub dataset, or a folder of datasets.save_to_disk",
            knob="path",
        ) from None
    return loaded, commit  # type: ignore[return-value]


@contextlib.contextmanager
def _no_network(offline: bool) -> Iterator[None]:
    """Keep the Hub's client from the 30 s of retries that it spends on a network which was just found missing."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub_commit(source: HubSource) -> str | None:
    """The commit that the revision means now; None when the Hub cannot be asked."""
    if Path(source.path).is_absolute():
        return None
    try:
        info = hub_info("dataset", source.path, source.revision)
    except AbsentError:
        what = "no such dataset on the Hub, and no such folder here"
        raise DataError(what, got=source.path, allowed="org/name or a folder", knob="path") from None
    return None if info is None else info.sha
