"""The training loop and the label embedding of tiny-dit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dipgo_core.zoo.architectures import NULL_CLASS, build_dit
from dipgo_core.zoo.fitting import TrainingPlan, fit
from dipgo_core.zoo.labels import LabelParts, expand_label_parts, share_label_parts


def test_fit_reaches_the_least_squares_solution() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    inputs, wanted = torch.randn(64, 3), torch.tensor([[1.0, -2.0, 0.5]])
    plan = TrainingPlan(
        steps=600, batch_size=64, learning_rate=3e-2, weight_decay=0.0, ema_decay=0.9
    )
    progress = list(fit(model, lambda: (model(inputs) - inputs @ wanted.T).square().mean(), plan))
    assert [record.step for record in progress] == list(range(1, 601))
    assert progress[-1].averaged.weight.detach() == pytest.approx(wanted, abs=1e-2)


def test_label_parts_table_equals_the_module() -> None:
    parts = LabelParts(width=8)
    labels = torch.tensor([0, 17, 279, NULL_CLASS])
    assert torch.equal(parts.table()[labels], parts(labels))


def test_expanded_dit_equals_the_trained_one() -> None:
    torch.manual_seed(0)
    trained, stock = build_dit().eval(), build_dit().eval()
    share_label_parts(trained)
    for parameter in trained.parameters():
        nn.init.normal_(parameter, std=0.05)
    stock.load_state_dict(expand_label_parts(trained))
    latents, timesteps = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999])
    labels = torch.tensor([3, 250, NULL_CLASS])
    with torch.no_grad():
        expected = trained(latents, timesteps, labels).sample
        torch.testing.assert_close(stock(latents, timesteps, labels).sample, expected)
