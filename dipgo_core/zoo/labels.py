"""tiny-dit's label embedding while it trains: a sum of three parts, shipped as a stock table."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from dipgo_core.zoo import data
from dipgo_core.zoo.architectures import NULL_CLASS


class LabelParts(nn.Module):
    """A label embedding that is the sum of its garment's, colour's and background's.

    Garment, colour and background are drawn independently, so a table of 280 free rows would
    learn each of them many times over. What is shipped is the expanded stock table.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (len(data.GARMENTS), len(data.COLOURS), len(data.BACKGROUNDS), 1)
        self.width = width
        self.parts = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        for weight in self.parts.parameters():
            nn.init.normal_(weight, std=0.02)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """Returns (N, width); ``NULL_CLASS`` has a row of its own."""
        is_null = labels == NULL_CLASS
        indices = data.caption_parts(labels.masked_fill(is_null, 0)).unbind(-1)
        summed = torch.stack(
            [part(index) for part, index in zip(self.parts[:3], indices, strict=True)]
        ).sum(dim=0)
        return torch.where(is_null[:, None], self.parts[3](torch.zeros_like(labels)), summed)

    def table(self) -> torch.Tensor:
        """Returns the stock table (1001, width); rows that are no caption are 0."""
        labels = torch.cat([torch.arange(data.NUM_CAPTIONS), torch.tensor([NULL_CLASS])])
        return torch.zeros(NULL_CLASS + 1, self.width).index_copy(0, labels, self(labels))


def share_label_parts(dit: DiTTransformer2DModel) -> None:
    """Replaces the label table of every block by a sum of parts, in place."""
    for block in dit.transformer_blocks:
        embedder = block.norm1.emb.class_embedder
        embedder.embedding_table = LabelParts(embedder.embedding_table.embedding_dim)


@torch.no_grad()
def expand_label_parts(dit: DiTTransformer2DModel) -> dict[str, torch.Tensor]:
    """Returns the state of a stock model with the same label tables."""
    state = {key: value for key, value in dit.state_dict().items() if ".parts." not in key}
    for name, module in dit.named_modules():
        if isinstance(module, LabelParts):
            state[f"{name}.weight"] = module.table()
    return state
