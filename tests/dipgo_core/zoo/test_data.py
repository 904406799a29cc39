"""The tinted data set: captions, their parts, and the colours of the pixels."""

from __future__ import annotations

import torch

from dipgo_core.zoo import captions, data
from dipgo_core.zoo.architectures import build_tokenizer


def test_caption_parts_invert_the_order_of_all_captions() -> None:
    texts = data.all_captions()
    parts = data.caption_parts(torch.arange(len(texts))).tolist()
    colours, backgrounds = list(data.COLOURS), list(data.BACKGROUNDS)
    for text, (garment, colour, background) in zip(texts, parts, strict=True):
        words = text.split()
        assert words[1:3] == [colours[colour], data.GARMENTS[garment]]
        assert words[5] == backgrounds[background]


def test_split_captions_gives_the_shipped_files() -> None:
    assert data.split_captions() == (captions("calibration"), captions("test"))


def test_tint_shows_background_where_grey_is_black_and_colour_where_it_is_white() -> None:
    grey = torch.zeros(4, 28, 28, dtype=torch.uint8)
    grey[:, 10:20, 10:20] = 255
    images = data.tint(grey, torch.arange(4), torch.Generator().manual_seed(0))
    parts = data.caption_parts(images.captions)
    backgrounds = torch.tensor(list(data.BACKGROUNDS.values()))[parts[:, 2]]
    colours = torch.tensor(list(data.COLOURS.values()))[parts[:, 1]]
    assert images.pixels.shape == (4, 3, 32, 32)
    assert torch.equal(images.pixels[:, :, 0, 0], backgrounds.to(torch.uint8))
    assert torch.equal(images.pixels[:, :, 16, 16], colours.to(torch.uint8))


def test_tokenizer_has_one_token_for_each_word() -> None:
    tokenizer = build_tokenizer()
    lengths = {len(tokenizer(text).input_ids) for text in data.all_captions()}
    assert lengths == {7 + 2}  # the words, begin and end
