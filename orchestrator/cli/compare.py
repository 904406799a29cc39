"""`compare`: what is meant by A and B, and how their differences are printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dipgo_core.errors import ConfigError
from dipgo_core.subnet import SubNet
from orchestrator.cli.exporting import point_by_key
from orchestrator.cli.show import print_table, say
from orchestrator.cli.sweeps import Results, open_results
from orchestrator.compare import (
    Comparison,
    Difference,
    Row,
    Side,
    compare_all,
    compare_sides,
    matching_points,
    side_of_point,
    side_of_subnet,
)
from orchestrator.metrics import figure_text, ratio_text
from orchestrator.points import ResolvedPoint
from orchestrator.protocol_text import protocol_rows, short

SWEEPS = (".yaml", ".yml")
USAGE = (
    "compare takes two sweep files, two SubNet files that `export` wrote, or a sweep file and the "
    "keys of two of its points (`pareto FILE` shows them)"
)


@dataclass(frozen=True)
class Compared:
    """What was compared, and a line for each pair of matching points that cannot be."""

    pairs: tuple[Comparison, ...]
    left_out: tuple[str, ...] = ()


def compare_named(names: Sequence[str], overrides: Sequence[str], model: str | None) -> Compared:
    """Return the comparisons that the arguments ask for: one, or one for each matching point.

    Raises:
        ConfigError: the arguments fit no form, or the sides are not comparable.
    """
    kinds = [_kind(name) for name in names]
    if kinds == ["sweep", "sweep"]:
        sweeps = [open_results(Path(name), overrides) for name in names]
        return compare_sweeps(sweeps[0], sweeps[1], model)
    if model is not None:
        raise ConfigError("--model is for two sweep files: points and SubNets have their model")
    if kinds == ["subnet", "subnet"]:
        if overrides:
            raise ConfigError("-o changes a sweep file; SubNet files are compared as they are")
        sides = [side_of_subnet(SubNet.load(name), name) for name in names]
        return Compared((compare_sides(sides[0], sides[1]),))
    if len(names) == 3 and kinds[0] == "sweep" and kinds[1:] == ["key", "key"]:
        results = open_results(Path(names[0]), overrides)
        chosen = [_side(results, point_by_key(results.points, key)) for key in names[1:]]
        return Compared((compare_sides(chosen[0], chosen[1]),))
    raise ConfigError(f"{USAGE}; got {', '.join(names)}")


def compare_sweeps(ours: Results, theirs: Results, model: str | None) -> Compared:
    """Compare the matching points of two sweeps, model by model. A race may have stopped one of a
    pair at fewer images, under another protocol: that pair is left out.

    Raises:
        ConfigError: no model in common, or no two matching points that may be compared.
    """
    pairs: list[tuple[Side, Side]] = []
    for name in _common_models(ours, theirs, model):
        mine, its = ([p for p in r.points if p.model == name] for r in (ours, theirs))
        pairs += [(_side(ours, a), _side(theirs, b)) for a, b in matching_points(mine, its)]
    if not pairs:
        raise ConfigError("the two sweeps have no finished point in common: run them first")
    found, left_out = compare_all(pairs)
    return Compared(found, tuple(left_out))


def comparisons_json(found: Compared) -> dict[str, Any]:
    """Return the document of `compare --json`; every comparison has its protocol among those."""
    protocols = {one.a.protocol.hash: one.a.protocol.to_json() for one in found.pairs}
    pairs = [{"protocol": one.a.protocol.hash, **one.to_json()} for one in found.pairs]
    return {"protocols": protocols, "comparisons": pairs, "left_out": list(found.left_out)}


def print_comparisons(found: Compared) -> None:
    """Print one table for two points, or one a model and figure for two sweeps."""
    if len(found.pairs) == 1:
        _print_pair(found.pairs[0])
    else:
        _print_tables(found.pairs)
    for line in found.left_out:
        say(line)


def _print_tables(found: Sequence[Comparison]) -> None:
    tables: dict[tuple[str, str, str], list[tuple[Comparison, Row]]] = {}
    for one in found:
        for row in one.rows:
            model = one.a.name.partition(":")[0]
            where = (model, row.label, one.a.protocol.hash)
            tables.setdefault(where, []).append((one, row))
    for (model, label, digest), listed in tables.items():
        rows = [(_short_name(one.a), *_cells(row)) for one, row in listed]
        title = f"{model}: {label}, protocol {short(digest)}"
        print_table(title, ("point", *COLUMNS), rows, right=COLUMNS[:3])
    for note in dict.fromkeys(note for one in found for note in one.notes):
        say(note)


COLUMNS = ("A", "B", "B - A, or B / A", "", "better")


def _print_pair(one: Comparison) -> None:
    say(f"A: {one.a.name}, key {short(one.a.key)}")
    say(f"B: {one.b.name}, key {short(one.b.key)}")
    rows = [(row.label, *_cells(row)) for row in one.rows]
    title = f"One protocol, {short(one.a.protocol.hash)}; 95 % intervals"
    print_table(title, ("figure", *COLUMNS), rows, right=COLUMNS[:3])
    for what, words in protocol_rows(one.a.protocol.to_json()):
        say(f"  {what}: {words}")
    for note in one.notes:
        say(note)


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    told = row.difference
    values = [
        figure_text(row.figure, one.value, one.low, one.high, n=one.n or None)
        for one in (row.a, row.b)
    ]
    return values[0], values[1], _difference_text(row, told), _how(told), told.better or "neither"


def _difference_text(row: Row, told: Difference) -> str:
    if told.kind == "ratio":
        return ratio_text(told.value, told.low, told.high)
    n = row.a.n or None
    return figure_text(row.figure, told.value, told.low, told.high, n=n, signed=True)


def _how(told: Difference) -> str:
    if told.kind == "ratio":
        return ""
    return "no interval" if told.low is None else "paired" if told.paired else "unpaired"


def _short_name(side: Side) -> str:
    return side.name.partition(": ")[2]


def _kind(name: str) -> str:
    suffix = Path(name).suffix.lower()
    if suffix in SWEEPS:
        return "sweep"
    return "subnet" if suffix == ".json" else "key"


def _side(results: Results, point: ResolvedPoint) -> Side:
    return side_of_point(point, results.store.records(), results.comparisons)


def _common_models(ours: Results, theirs: Results, model: str | None) -> list[str]:
    mine, its = (list(dict.fromkeys(p.model for p in r.points)) for r in (ours, theirs))
    common = [name for name in mine if name in its and model in (None, name)]
    if not common:
        asked = "" if model is None else f" called {model!r}"
        raise ConfigError(
            f"no model{asked} in both sweeps: A has {', '.join(mine)}, B has {', '.join(its)}"
        )
    return common
