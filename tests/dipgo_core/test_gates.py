"""GateTable: invariants and conversions."""

from __future__ import annotations

import numpy as np
import pytest

from dipgo_core.errors import SubNetError
from dipgo_core.gates import GateTable


def test_from_strings_round_trips() -> None:
    rows = ["111", "010", "000"]
    assert GateTable.from_strings(rows).to_strings() == rows


@pytest.mark.parametrize("rows", [[], ["11", "1"], ["12", "11"], [""], ["1", ""]])
def test_from_strings_refuses_what_is_no_table(rows: list[str]) -> None:
    with pytest.raises(SubNetError):
        GateTable.from_strings(rows)


def test_first_call_is_always_computed() -> None:
    with pytest.raises(SubNetError, match=r"keep\[0\] reuses blocks \[1\]"):
        GateTable.from_strings(["101", "111"])


@pytest.mark.parametrize("keep", [np.ones((2, 3)), np.ones(3, bool), np.ones((0, 3), bool)])
def test_table_must_be_boolean_and_two_dimensional(keep: np.ndarray) -> None:
    with pytest.raises(SubNetError, match="non-empty boolean table"):
        GateTable(keep)


def test_table_cannot_be_changed_by_its_maker() -> None:
    keep = np.ones((2, 2), dtype=bool)
    gates = GateTable(keep)
    keep[1] = False
    assert gates == GateTable.all_keep(2, 2)
    with pytest.raises(ValueError, match="read-only"):
        gates.keep[1, 1] = False


def test_from_calls_computes_whole_calls() -> None:
    assert GateTable.from_calls((0, 2), 3, 2).to_strings() == ["11", "00", "11"]


@pytest.mark.parametrize("calls", [(0, 3), (0, -1)])
def test_from_calls_refuses_calls_outside_the_run(calls: tuple[int, ...]) -> None:
    with pytest.raises(SubNetError, match="0 to 2"):
        GateTable.from_calls(calls, 3, 2)


def test_all_or_nothing_share_counts_whole_calls() -> None:
    assert GateTable.from_strings(["11", "00", "01", "11"]).all_or_nothing_share == 0.75


def test_equal_tables_have_equal_digests() -> None:
    one, two = GateTable.all_keep(2, 2), GateTable.from_strings(["11", "11"])
    assert one == two
    assert one.digest == two.digest != GateTable.all_keep(4, 1).digest
    whole, real = (GateTable(one.keep, share) for share in (1, 1.0))  # JSON may drop the ".0"
    assert whole.digest == real.digest != one.digest
    assert len({one, two}) == 1
