"""Facts a plan needs, read again on another machine. Oracle: what the running machine saw."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from orchestrator.facts import gather_facts, known_items
from orchestrator.sweep_file import load_sweep


def test_hub_prompts_keep_the_digest_they_had_when_the_sweep_ran(repository: Path) -> None:
    sweep = load_sweep(repository / "sweeps" / "sd_family.yaml")
    seen = {
        name: replace(
            facts,
            test=replace(facts.test, sha256="a" * 64, count=7),
            calibration=replace(facts.calibration, sha256="b" * 64, count=9),
        )
        for name, facts in gather_facts(sweep, offline=True).items()
    }
    known = json.loads(json.dumps(known_items(sweep, seen)))
    for facts in gather_facts(sweep, offline=True, known=known).values():
        assert (facts.test.sha256, facts.test.count) == ("a" * 64, 7)
        assert (facts.calibration.sha256, facts.calibration.count) == ("b" * 64, 9)
