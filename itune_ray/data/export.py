"""Export: the rows of a finished artifact in a form that others read, with a data card written from its manifest."""

import json
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from itune_ray.data.artifact import Artifact, open_artifact
from itune_ray.data.ledger import LEDGER_SCHEMA
from itune_ray.data.records import RECORD_SCHEMA, Record
from itune_ray.data.storage import Folder
from itune_ray.errors import ConfigError, DataError, StorageError, did_you_mean

Form = Literal["parquet", "jsonl", "hf"]
FORMS: tuple[Form, ...] = ("parquet", "jsonl", "hf")
PAYLOADS = ("kept", "accepted")
"""Folders that hold an artifact's good rows."""
BOOKKEEPING = frozenset(LEDGER_SCHEMA.names) - frozenset(RECORD_SCHEMA.names) | {"duplicate_of"}
"""Columns that say how a row ended, which is the same for all that are exported."""
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
"""Size categories of the Hub."""


def export(path: str, target: str, form: Form, *, payload: str | None = None, license: str | None = None) -> Folder:
    """Write the good rows of an artifact and README.md into a new folder.

    | form | files |
    |---|---|
    | parquet | data/train.parquet: all columns of the rows that are not empty |
    | jsonl | chat.jsonl ({messages}), preference.jsonl ({prompt, chosen, rejected}), text.jsonl ({text}) |
    | hf | what `datasets.load_from_disk` loads; a local folder only |

    Args:
        path: The artifact's folder.
        target: A folder that does not exist yet, or is empty.
        form: See above.
        payload: The rows' folder in the artifact; default: kept or accepted.
        license: Licence of the whole for the card, as the Hub names it, e.g. `cc-by-4.0`.

    Raises:
        DataError: The artifact is not finished, or has no such rows.
        StorageError: There is no artifact, or the target is in use.
    """
    artifact = open_artifact(path)
    manifest = artifact.manifest
    if manifest["status"] != "complete":
        raise DataError("the artifact is not finished: run its job to the end first", got=path)
    name = _payload(artifact, payload)
    table = artifact.folder.read_table(name).sort_by("key")
    if not table.num_rows:
        raise DataError("the artifact holds no rows to export", got=artifact.path(name))
    folder = Folder.at(target)
    if folder.names():
        raise StorageError("the target holds files already", got=target, allowed="a new or an empty folder")
    files = _write(_columns(table), folder, form)
    card = data_card(artifact, table, files=files, form=form, license=license)
    folder.write_bytes("README.md", card.encode())
    return folder


def _payload(artifact: Artifact, asked: str | None) -> str:
    there = [name for name in artifact.folder.names() if name in {*PAYLOADS, "rejected", "failed"}]
    names = [asked] if asked else list(PAYLOADS)
    found = next((name for name in names if name in there), None)
    if found is None:
        hint = did_you_mean(asked, there) if asked else ""
        allowed = ", ".join(there) or "an artifact of generate or curate"
        raise DataError(f"the artifact has no such rows{hint}", got=asked or artifact.stage, allowed=allowed)
    return found


def _columns(table: pa.Table) -> pa.Table:
    """Without bookkeeping and without columns that are null in every row."""
    names = [n for n in table.column_names if n not in BOOKKEEPING and table[n].null_count < table.num_rows]
    return table.select(names)


def _write(table: pa.Table, folder: Folder, form: Form) -> list[str]:
    """Write the rows; names of the files, or of the folder for `hf`."""
    if form == "parquet":
        folder.write_table("data/train.parquet", table)
        return ["data/train.parquet"]
    if form == "hf":
        return _write_hf(table, folder)
    lines: dict[str, list[str]] = {}
    for row in table.to_pylist():
        kind, value = _json_row(Record.from_row(row))
        lines.setdefault(f"{kind}.jsonl", []).append(json.dumps(value, ensure_ascii=False))
    for name, written in lines.items():
        folder.write_bytes(name, ("\n".join(written) + "\n").encode())
    return sorted(lines)


def _write_hf(table: pa.Table, folder: Folder) -> list[str]:
    if not folder.is_local:
        raise ConfigError("a dataset folder is written to a local disk", got=folder.uri, allowed="a local folder")
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    Path(folder.path).mkdir(parents=True, exist_ok=True)
    Dataset(table).save_to_disk(folder.path)
    return ["."]


def _json_row(record: Record) -> tuple[str, dict[str, Any]]:
    """Kind of a row, and the row as others read it; a weight other than 1 and `meta` go along."""
    extra: dict[str, Any] = {"id": record.key}
    if record.weight != 1.0:
        extra["weight"] = record.weight
    if record.meta:
        extra["meta"] = record.meta
    if record.text is not None:
        return "text", {"text": record.text, **extra}
    if record.rejected is None:
        return "chat", {"messages": list(record.messages), **extra}
    lost = {"role": "assistant", "content": record.rejected}
    return "preference", {
        "prompt": list(record.prompt),
        "chosen": list(record.messages[len(record.prompt) :]),
        "rejected": [lost],
        **extra,
    }


# --- card ----------------------------------------------------------------------------------------------------------


def data_card(artifact: Artifact, table: pa.Table, *, files: list[str], form: Form, license: str | None) -> str:
    """README.md of an export: what it holds, where it is from, under which licences, and what was left out and why."""
    manifest = artifact.manifest
    records = [Record.from_row(row) for row in table.to_pylist()]
    names = table["input"].to_pylist() if "input" in table.column_names else [record.source for record in records]
    sections = [
        _front_matter(license, len(records), files, form),
        f"# {artifact.stage} {artifact.id}",
        f"{len(records)} rows, made by `itune {manifest['job']}` of itune-ray "
        f"{manifest.get('packages', {}).get('itune-ray', '')}. {_licence_sentence(license)}",
        _sources(manifest, records, names),
        _made_by(records),
        _languages(records),
        _filters(manifest),
        _funnel(manifest),
        _packages(manifest),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(license: str | None, rows: int, files: list[str], form: Form) -> str:
    size = next((name for limit, name in SIZES if rows < limit), "n>1M")
    lines = ["---", *([f"license: {license}"] if license else []), "size_categories:", f"- {size}"]
    if form != "hf":
        lines.append("configs:")
        for file in files:
            stem = "default" if len(files) == 1 else posixpath.splitext(posixpath.basename(file))[0]
            lines += [f"- config_name: {stem}", "  data_files:", "  - split: train", f"    path: {file}"]
    return "\n".join([*lines, "---"])


def _licence_sentence(license: str | None) -> str:
    return f"Licence: {license}." if license else "No licence of the whole is stated; those of the sources apply."


def _sources(manifest: Mapping[str, Any], records: list[Record], names: list[str]) -> str:
    read = {source["source"]: source for source in manifest.get("sources", [])}
    kept = Counter(names)
    licences: dict[str, Counter[str]] = {name: Counter() for name in kept}
    for record, name in zip(records, names, strict=True):
        stated = record.meta.get("license") or record.meta.get("licence")
        licences[name][str(stated) if stated else "not stated"] += 1
    rows = [
        [
            name,
            read.get(name, {}).get("layout", ""),
            read.get(name, {}).get("revision") or "",
            read.get(name, {}).get("rows", ""),
            kept.get(name, 0),
            ", ".join(f"{licence} ({count})" for licence, count in licences.get(name, Counter()).most_common()),
        ]
        for name in sorted({*read, *kept})
    ]
    return _section("Sources", ["source", "layout", "revision", "rows read", "rows here", "licences of rows"], rows)


def _made_by(records: list[Record]) -> str:
    found = Counter((record.recipe or "read", record.model or "none named") for record in records)
    return _section("Who wrote the last turn", ["recipe", "model", "rows"], ([*k, n] for k, n in sorted(found.items())))


def _languages(records: list[Record]) -> str:
    found = Counter(str(record.meta["lang"]) for record in records if "lang" in record.meta)
    return _section("Languages of the targets", ["language", "rows"], ([*item] for item in found.most_common()))


def _filters(manifest: Mapping[str, Any]) -> str:
    rows = [
        [
            number,
            entry["filter"],
            entry["ended"],
            json.dumps({k: v for k, v in entry.items() if k not in ("filter", "ended")}),
        ]
        for number, entry in enumerate(manifest.get("filters", []), start=1)
    ]
    return _section("Filters, in their order", ["", "filter", "rows ended", "facts"], rows)


def _funnel(manifest: Mapping[str, Any]) -> str:
    funnel = manifest.get("funnel")
    if not funnel:
        return ""
    rows = [["read", funnel["in"]], ["accepted", funnel["accepted"]]]
    rows += [[f"rejected: {reason}", count] for reason, count in funnel["rejected"].items()]
    rows += [[f"failed: {cause}", count] for cause, count in funnel["failed"].items()]
    return _section("Where the rows went", ["end", "rows"], rows)


def _packages(manifest: Mapping[str, Any]) -> str:
    return _section("Made with", ["package", "version"], ([*item] for item in manifest.get("packages", {}).items()))


def _section(title: str, header: list[str], rows: Iterable[list[Any]]) -> str:
    """A heading and a table; empty without rows."""
    lines = [_line(row) for row in rows]
    return "\n".join([f"## {title}", "", _line(header), "|" + "---|" * len(header), *lines]) if lines else ""


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(_escaped(cells)) + " |"


def _escaped(cells: Iterable[Any]) -> Iterator[str]:
    return (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
