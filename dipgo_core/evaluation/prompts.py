"""Prompt sets and class labels, read from many formats into one list of items. No torch."""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from dipgo_core import hub
from dipgo_core.errors import DipgoError, EvaluationError, nearest
from dipgo_core.items import Item
from dipgo_core.zoo import captions

BUNDLED = "bundled:"
_QUOTED = re.compile(r'"([^"]|"")*"')
_WHOLE = re.compile(r"[+-]?[0-9]+")
_HUB_KEYS = ("hub", "file", "revision", "split", "config", "column", "rows")
_FILE_KEYS = ("file", "column", "rows")
_LABEL_KEYS = ("labels",)


def read_items(
    source: str | Path | Mapping[str, Any], *, folder: Path | None = None
) -> tuple[Item, ...]:
    """Return the items of a prompt set, in its order.

    source: a file (one prompt a line, .jsonl, .csv, .tsv, .json of COCO captions, .parquet);
    "bundled:calibration" or "bundled:test"; or a mapping {file, column, rows},
    {hub, file, revision, split, config, column, rows}, or {labels: number of classes}, every class
    once. Where `rows` is given, just these are read.
    folder: where relative paths start.

    Raises:
        EvaluationError: the source is missing, empty, broken, lacks the column, or has fewer rows.
        HubError: the hub does not have it, or is out of reach.
    """
    if isinstance(source, Mapping):
        return _read_mapping(source, folder)
    if isinstance(source, str) and source.startswith(BUNDLED):
        return _read_bundled(source.removeprefix(BUNDLED))
    return _read_file(_located(source, folder), column=None, rows=None)


#: What a label-conditioned model calls each of its classes, by label; a class may have several
#: names, and two classes the same one (ImageNet has two kinds of crane).
ClassNames = Mapping[int, Sequence[str]]


def label_items(
    names: ClassNames, count: int | None = None, *, chosen: Sequence[int] = ()
) -> tuple[Item, ...]:
    """Return one item a class, in order of label; with `count`, that many spread evenly.

    Images walk through the items in turn, so that n images show every class equally often, or once
    more than others where the classes do not divide n. An item's text is the first name of its
    class; classes of one name are told apart by their labels alone.

    chosen: only these labels.

    Raises:
        EvaluationError: the model has no classes, fewer than `count`, or not one of the chosen.
    """
    items = [Item(names[label][0], label) for label in sorted(names)]
    if not items:
        raise EvaluationError("the model has no class labels (id2label is empty); give prompts")
    if unknown := sorted(set(chosen) - set(names)):
        raise EvaluationError(
            f"the model has no class {hub.listed(map(str, unknown))}; its labels are "
            f"{min(names)} to {max(names)}"
        )
    if chosen:
        return tuple(Item(names[label][0], label) for label in chosen)
    if count is None:
        return tuple(items)
    if count > len(items):
        raise EvaluationError(
            f"{count} classes are asked for, the model has {len(items)}: ask for no more"
        )
    return tuple(items[i * len(items) // count] for i in range(count))


def with_labels(items: Sequence[Item], names: ClassNames) -> tuple[Item, ...]:
    """Return the items with the class label of each text, for a label-conditioned model.

    Raises:
        EvaluationError: a text is no class of the model, or the name of several.
    """
    labels: dict[str, list[int]] = {}
    for label in sorted(names):
        for name in dict.fromkeys(names[label]):
            labels.setdefault(name, []).append(label)
    unlabelled = [item.prompt for item in items if item.label is None]
    _check_known([text for text in unlabelled if text not in labels], len(items), tuple(labels))
    for text in unlabelled:
        if len(labels[text]) > 1:
            raise EvaluationError(
                f"{text!r} names the classes {hub.listed(map(str, labels[text]))} of this model: "
                "say which in a column `label`, or ask for {labels: [...]}"
            )
    return tuple(
        item if item.label is not None else replace(item, label=labels[item.prompt][0])
        for item in items
    )


def _check_known(missing: Sequence[str], count: int, known: tuple[str, ...]) -> None:
    if missing:
        raise EvaluationError(
            f"{len(missing)} of {count} texts are no class label of this model, the first is "
            f"{missing[0]!r}.{nearest(missing[0], known)} The model knows {len(known)} labels, "
            f"such as {', '.join(map(repr, known[:3]))}"
        )


def distinct(items: Sequence[Item]) -> tuple[Item, ...]:
    """Return the items without those that repeat an earlier one, in label and, but for case, spaces
    and ways to write one letter, in text: images of one prompt are not independent of each other.
    """
    first: dict[tuple[str, int | None], Item] = {}
    for item in items:
        first.setdefault((_normal(item.prompt), item.label), item)
    return tuple(first.values())


def in_order(items: Sequence[Item]) -> tuple[Item, ...]:
    """Return the items in the order in which images show them: a fixed, random-looking one.

    Prompt sets come sorted by category, captions by class; in this order any first n items are a
    fair sample of all, and those of a smaller n are the first of a larger one.
    """
    return tuple(items[i] for i in sorted(range(len(items)), key=_place))


def _place(index: int) -> bytes:
    return hashlib.sha256(f"dipgo.order\0{index}".encode()).digest()


def items_sha256(items: Sequence[Item]) -> str:
    """Return the SHA-256 of the prompts and labels, order included."""
    text = json.dumps([[item.prompt, item.label] for item in items], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_disjoint(calibration: Sequence[Item], test: Sequence[Item]) -> None:
    """Check that no test item was seen in calibration; case, spaces and the ways in which Unicode
    writes one letter make no difference.

    Raises:
        EvaluationError: an item is in both; names the first.
    """
    seen = {_normal(item.prompt): i for i, item in enumerate(calibration)}
    for i, item in enumerate(test):
        if (place := seen.get(_normal(item.prompt))) is not None:
            raise EvaluationError(
                f"calibration and test overlap: {item.prompt!r} is calibration item {place} and "
                f"test item {i}; a search must not see test prompts, remove it from one of them"
            )


def _normal(prompt: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def item_of_image(index: int, num_items: int) -> int:
    """Return which item image `index` shows; the images of one item are one bootstrap group."""
    return index % num_items


def _read_mapping(source: Mapping[str, Any], folder: Path | None) -> tuple[Item, ...]:
    kinds = {"hub": _HUB_KEYS, "file": _FILE_KEYS, "labels": _LABEL_KEYS}
    kind = next((kind for kind in kinds if kind in source), None)
    if kind is None or not set(source) <= set(kinds[kind]):
        valid = " or ".join(f"{{{', '.join(keys)}}}" for keys in kinds.values())
        raise EvaluationError(f"a prompt source is {valid}, got {{{', '.join(map(str, source))}}}")
    if kind == "labels":
        return label_items({i: (f"class {i}",) for i in range(_positive(source["labels"]))})
    column, rows = source.get("column"), source.get("rows")
    if kind == "hub":
        return _read_hub(source, column=column, rows=rows)
    return _read_file(_located(source["file"], folder), column=column, rows=rows)


def _positive(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise EvaluationError(f"labels must be the number of classes, at least 1, got {value!r}")
    return value


def _read_bundled(split: str) -> tuple[Item, ...]:
    splits: dict[str, Literal["calibration", "test"]] = {
        "calibration": "calibration",
        "test": "test",
    }
    if split not in splits:
        raise EvaluationError(
            f"no bundled prompts are called {split!r}; there are bundled:calibration, bundled:test"
        )
    return tuple(Item(text) for text in captions(splits[split]))


def _located(source: str | Path, folder: Path | None) -> Path:
    path = Path(source).expanduser()
    return path if folder is None else folder / path


def _read_file(path: Path, *, column: str | None, rows: int | None) -> tuple[Item, ...]:
    read = _READERS.get(path.suffix.lower(), _text_rows)
    try:
        items = list(islice(read(path, column), rows))
    except FileNotFoundError as error:
        raise EvaluationError(f"no prompt file at {path}") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"cannot read prompts from {path}: byte {error.start} is not UTF-8; save it as UTF-8"
        ) from error
    except (OSError, ValueError, csv.Error) as error:
        raise EvaluationError(f"cannot read prompts from {path}: {error}") from error
    return _checked(items, str(path), rows)


def _checked(items: Sequence[Item], source: str, rows: int | None) -> tuple[Item, ...]:
    if not items:
        raise EvaluationError(f"the prompt set {source} is empty")
    if rows is not None and len(items) < rows:
        raise EvaluationError(
            f"rows is {rows}, but {source} has {len(items)}: lower rows, or leave it out to take "
            "all of them"
        )
    for i, item in enumerate(items):
        if not item.prompt.strip():
            raise EvaluationError(f"item {i} of {source} has no text; remove it")
    return tuple(items)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Return number and text of the lines that are not blank, one at a time."""
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, line.strip()


def _text_rows(path: Path, column: str | None) -> Iterator[Item]:
    return (Item(line) for _, line in _lines(path))


def _jsonl_rows(path: Path, column: str | None) -> Iterator[Item]:
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise EvaluationError(f"{path}:{number} is not JSON: {error}") from error
        if isinstance(row, str):
            yield Item(row.strip())
        elif isinstance(row, dict):
            yield _item(row, column, f"{path}:{number}")
        else:
            raise EvaluationError(f"{path}:{number} must be a text or an object, got {row!r}")


def _csv_rows(path: Path, column: str | None) -> Iterator[Item]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        for where, row in _table_rows(csv.DictReader(stream, strict=True), path):
            yield _item(row, column, where)


def _tsv_rows(path: Path, column: str | None) -> Iterator[Item]:
    """Tabs part the cells, and nothing else does: PartiPrompts has prompts that begin with a
    quotation mark. A cell that is quoted as a whole is what stands inside."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        table = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        for where, row in _table_rows(table, path):
            yield _item({key: _unquoted(cell) for key, cell in row.items()}, column, where)


def _table_rows(
    table: csv.DictReader[str], path: Path
) -> Iterator[tuple[str, dict[str | Any, str | Any]]]:
    """Return where each row stands, and its cells, as many as the header has: a text with a
    separator in it that is not quoted would else be cut there."""
    for row in table:
        where, columns = f"{path}:{table.line_num}", table.fieldnames or ()
        if None in row or None in row.values():
            cells = sum(cell is not None for key, cell in row.items() if key is not None)
            raise EvaluationError(
                f"{where} has {cells + len(row.get(None, ()))} cells, the header has "
                f"{len(columns)} ({', '.join(columns)}): put texts with commas (of .csv) in "
                "quotation marks, and write every cell, empty ones too"
            )
        yield where, row


def _unquoted(cell: str) -> str:
    if not _QUOTED.fullmatch(cell):
        return cell
    return cell[1:-1].replace('""', '"')


def _coco_rows(path: Path, column: str | None) -> Iterable[Item]:
    """One caption an image, the first, as COCO evaluations take it."""
    try:
        annotations = json.loads(path.read_text(encoding="utf-8-sig"))["annotations"]
        first = {entry["image_id"]: entry["caption"] for entry in reversed(annotations)}
        images = sorted(first)  # fails where numbers and texts are mixed
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{path} is not a COCO captions file (annotations with image_id and caption): {error!r}"
        ) from error
    return [Item(_text(first[i], "caption", f"{path}: image {i}")) for i in images]


def _parquet_rows(path: Path, column: str | None) -> Iterator[Item]:
    """Only the columns asked for are read, and only as many rows as are taken."""
    parquet = _optional("pyarrow.parquet", "pyarrow", f"reading {path}")
    if not path.is_file():
        raise FileNotFoundError(path)
    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        wanted = {_column_of(names, column, str(path)), *({"label"} & set(names))}
        for batch in file.iter_batches(batch_size=1000, columns=sorted(wanted)):
            for row in batch.to_pylist():
                yield _item(row, column, str(path))


def _read_hub(
    source: Mapping[str, Any], *, column: str | None, rows: int | None
) -> tuple[Item, ...]:
    name, revision = source["hub"], source.get("revision")
    commit = hub.resolve_commit(name, revision, "dataset")
    if source.get("file"):
        folder = hub.fetch(name, commit, [source["file"]], "dataset")
        return _read_file(folder / source["file"], column=column, rows=rows)
    table = _data_set(source, commit, streaming=rows is not None)
    try:
        items = [_item(row, column, name) for row in islice(table, rows)]
    except DipgoError:
        raise
    except Exception as error:  # a streamed table is read here
        raise _unloadable(name, error) from error
    return _checked(items, name, rows)


def _data_set(source: Mapping[str, Any], commit: str, *, streaming: bool) -> Iterable[Any]:
    """Load a split through the package datasets; streaming reads no more than is taken."""
    name = source["hub"]
    datasets = _optional("datasets", "datasets", f"reading the hub data set {name}")
    try:
        table: Iterable[Any] = datasets.load_dataset(
            name, source.get("config"), revision=commit, split=_split(source), streaming=streaming
        )
    except Exception as error:  # the library raises many kinds, network ones among them
        raise _unloadable(name, error) from error
    return table


def _unloadable(name: str, error: Exception) -> EvaluationError:
    return EvaluationError(
        f"cannot load the data set {name} ({error}); name one `file` of it, which `dipgo-sweep "
        "prefetch` fetches, or give a local file"
    )


def _split(source: Mapping[str, Any]) -> str:
    return str(source.get("split") or "train")


def _item(row: Mapping[str, Any], column: str | None, source: str) -> Item:
    name = _column_of(tuple(row), column, source)
    if row[name] is None:
        raise EvaluationError(f"{source} has a row without {column or 'prompt'}; remove it")
    return Item(_text(row[name], name, source), _label(row.get("label"), source))


def _text(value: Any, column: str, source: str) -> str:
    if not isinstance(value, str):
        raise EvaluationError(
            f"{source}: {column} must be text, got {value!r:.80}: choose a column of texts with "
            "`column`, and write lists as one row a text"
        )
    return value.strip()


def _column_of(names: Sequence[str], column: str | None, source: str) -> str:
    """Return the column of this name, whatever its case."""
    wanted = column or "prompt"
    present = {str(name).lower(): name for name in names}
    if wanted.lower() not in present:
        raise EvaluationError(
            f"{source} has no column {wanted!r}; it has {', '.join(map(str, names)) or 'none'}: "
            "name one with `column`"
        )
    return present[wanted.lower()]


def _label(value: Any, source: str) -> int | None:
    if value is None or value == "":
        return None
    whole = isinstance(value, str) and _WHOLE.fullmatch(value.strip())
    if not whole and (not isinstance(value, int) or isinstance(value, bool)):
        raise EvaluationError(f"{source}: label must be an integer, got {value!r:.80}")
    return int(value)


def _optional(module: str, package: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EvaluationError(
            f"{purpose} needs the package {package!r}, which is not installed: "
            "`pip install 'dipgo-sweep[datasets]'`, or give a .jsonl, .csv or text file"
        ) from error


_READERS: dict[str, Callable[[Path, str | None], Iterable[Item]]] = {
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".json": _coco_rows,
    ".parquet": _parquet_rows,
}
