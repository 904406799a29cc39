"""SearchProgress: figures as JSON, state only when asked for."""

from __future__ import annotations

import json

import torch

from dipgo_core.search import SearchProgress


def progress() -> SearchProgress:
    return SearchProgress(
        search_step=2,
        num_steps=5,
        loss=0.5,
        consistency=0.25,
        sparsity=0.25,
        compute_ratio=0.75,
        learning_rate=0.1,
        kept_gates=7,
        flips=1,
        forwards=30,
        sample_forwards=60.0,
        seconds=1.5,
        snapshot=lambda: {"search_step": torch.tensor(2)},
    )


def test_progress_figures_are_json_and_leave_tensors_out():
    figures = json.loads(json.dumps(progress().to_json()))
    assert figures["search_step"] == 2 and figures["compute_ratio"] == 0.75
    assert not {"outcome", "snapshot"} & set(figures)


def test_progress_state_is_what_its_search_gives():
    assert progress().state()["search_step"].item() == 2
