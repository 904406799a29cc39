"""What the commands print."""

from __future__ import annotations

import io
import sys

import pytest

from orchestrator.cli.show import say


class _Writes(io.StringIO):
    """Keeps each write apart: another thread may write between any two."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def write(self, text: str) -> int:
        self.made.append(text)
        return super().write(text)


@pytest.mark.parametrize("stderr", [False, True])
def test_line_and_its_end_are_one_write(monkeypatch: pytest.MonkeyPatch, stderr: bool) -> None:
    stream = _Writes()
    monkeypatch.setattr(sys, "stderr" if stderr else "stdout", stream)
    say("[1/2] done: a task", stderr=stderr)
    assert stream.made == ["[1/2] done: a task\n"]
