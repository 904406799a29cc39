"""Trains the bundled models again: ``python -m dipgo_core.zoo.train all``.

In order: ``vae``, ``features`` and ``clip`` need only the images, ``unet`` and ``dit`` need the
autoencoder, ``statistics`` needs the feature network. About two hours on two CPU cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from dipgo_core.zoo import data
from dipgo_core.zoo.architectures import (
    build_clip,
    build_dit,
    build_noise_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
)
from dipgo_core.zoo.export import export_clip, export_tiny_dit, export_tiny_sd, export_vae
from dipgo_core.zoo.features import TinyFeatures
from dipgo_core.zoo.fitting import TrainingPlan, fit, follow
from dipgo_core.zoo.labels import expand_label_parts, share_label_parts

logger = logging.getLogger(__name__)

CAPTION_DROPOUT: Final = 0.1
KL_WEIGHT: Final = 2e-4
TINTS_PER_IMAGE: Final = 2
ENCODE_BATCH: Final = 500


PLANS: Final = {
    "vae": TrainingPlan(steps=1400, batch_size=64, learning_rate=2e-3, ema_decay=0.99),
    "features": TrainingPlan(steps=1400, batch_size=128, ema_decay=0.99, learning_rate=2e-3),
    "clip": TrainingPlan(steps=3500, batch_size=128, ema_decay=0.995),
    "unet": TrainingPlan(steps=4000, batch_size=64),
    "dit": TrainingPlan(steps=6000, batch_size=64),
}


class Batches:
    """Draws training batches from the tinted or the encoded training images."""

    def __init__(self, data_dir: Path, plan: TrainingPlan) -> None:
        self.grey = data.load_grey(data_dir, "train")
        self.batch_size = plan.batch_size
        self.generator = torch.Generator().manual_seed(plan.seed)

    def tinted(self, *, shift: int = 0) -> data.TintedImages:
        """Returns freshly tinted images, moved together by up to ``shift`` pixels."""
        chosen = self.indices(len(self.grey.pixels))
        images = data.tint(self.grey.pixels[chosen], self.grey.garments[chosen], self.generator)
        offsets = torch.randint(-shift, shift + 1, (2,), generator=self.generator).tolist()
        return replace(images, pixels=images.pixels.roll(offsets, dims=(-2, -1)))

    def indices(self, count: int) -> torch.Tensor:
        """Returns one batch of indices below ``count``."""
        return torch.randint(count, (self.batch_size,), generator=self.generator)


def train_vae(data_dir: Path, zoo_dir: Path, plan: TrainingPlan) -> None:
    """Trains the autoencoder and writes it into tiny-sd with its measured scaling factor."""
    torch.manual_seed(plan.seed)
    batches, vae = Batches(data_dir, plan), build_vae()

    def draw_loss() -> torch.Tensor:
        pixels = data.to_unit_range(batches.tinted().pixels)
        posterior = vae.encode(pixels).latent_dist
        restored = vae.decode(posterior.sample()).sample
        error = functional.mse_loss(restored, pixels) + functional.l1_loss(restored, pixels)
        loss: torch.Tensor = error + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        return loss

    def export(averaged: AutoencoderKL) -> None:
        latents, _ = encode_training_images(averaged, data_dir, seed=plan.seed, limit=5000)
        scale = 1 / latents.std().item()
        averaged.register_to_config(scaling_factor=averaged.config.scaling_factor * scale)
        logger.info(
            "scaling factor %.4f, std of the channels %s",
            averaged.config.scaling_factor,
            (latents.std(dim=(0, 2, 3)) * scale).tolist(),
        )
        export_vae(_vae_dir(zoo_dir), averaged)

    follow("vae", fit(vae, draw_loss, plan), plan, export)


def _vae_dir(zoo_dir: Path) -> Path:
    return zoo_dir / "weights" / "tiny-sd" / "vae"


@torch.no_grad()
def encode_training_images(
    vae: AutoencoderKL, data_dir: Path, *, seed: int, limit: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scaled latents (N, 4, 8, 8) of tinted training images and their captions (N,)."""
    grey = data.load_grey(data_dir, "train")
    generator = torch.Generator().manual_seed(seed)
    tints = TINTS_PER_IMAGE if limit is None else 1
    latents, captions = [], []
    for _ in range(tints):
        images = data.tint(grey.pixels[:limit], grey.garments[:limit], generator)
        for pixels in torch.split(images.pixels, ENCODE_BATCH):
            latents.append(vae.encode(data.to_unit_range(pixels)).latent_dist.mean)
        captions.append(images.captions)
    return torch.cat(latents) * vae.config.scaling_factor, torch.cat(captions)


def train_features(data_dir: Path, zoo_dir: Path, plan: TrainingPlan) -> None:
    """Trains tiny-features to name garment, colour and background."""
    torch.manual_seed(plan.seed)
    batches, model = Batches(data_dir, plan), TinyFeatures()

    def draw_loss() -> torch.Tensor:
        images = batches.tinted(shift=2)
        parts = data.caption_parts(images.captions).unbind(-1)
        losses = [
            functional.cross_entropy(logits, part)
            for logits, part in zip(model.classify(images.pixels), parts, strict=True)
        ]
        return torch.stack(losses).sum()

    def export(averaged: TinyFeatures) -> None:
        averaged.save_pretrained(zoo_dir / "weights" / "tiny-features")

    follow("features", fit(model, draw_loss, plan), plan, export)


def train_clip(data_dir: Path, zoo_dir: Path, plan: TrainingPlan) -> None:
    """Trains tiny-clip: of all 280 captions, an image is nearest to its own."""
    torch.manual_seed(plan.seed)
    tokenizer = build_tokenizer()
    batches, model = Batches(data_dir, plan), build_clip(tokenizer)
    tokens = tokenize(tokenizer, data.all_captions())
    held_out = data.held_out_images(data_dir)

    def draw_loss() -> torch.Tensor:
        images = batches.tinted(shift=2)
        return functional.cross_entropy(clip_logits(model, images.pixels, tokens), images.captions)

    def export(averaged: CLIPModel) -> None:
        averaged.eval()
        accuracy = clip_accuracy(averaged, held_out, tokens)
        logger.info("clip: zero-shot accuracy on held-out images %.4f", accuracy)
        export_clip(zoo_dir / "weights" / "tiny-clip", averaged, tokenizer)

    follow("clip", fit(model, draw_loss, plan), plan, export)


def tokenize(tokenizer: CLIPTokenizer, texts: tuple[str, ...]) -> torch.Tensor:
    """Returns padded token ids (len(texts), 16)."""
    encoded = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
    ids: torch.Tensor = encoded.input_ids
    return ids


def clip_logits(model: CLIPModel, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the scaled cosine (images, captions) of uint8 images and tokenised captions."""
    logits: torch.Tensor = model(
        input_ids=tokens, pixel_values=data.to_unit_range(pixels)
    ).logits_per_image
    return logits


@torch.no_grad()
def clip_accuracy(model: CLIPModel, images: data.TintedImages, tokens: torch.Tensor) -> float:
    """Returns the share of images whose nearest caption is their own."""
    guesses = [
        clip_logits(model, part, tokens).argmax(dim=-1)
        for part in torch.split(images.pixels, ENCODE_BATCH)
    ]
    return (torch.cat(guesses) == images.captions).float().mean().item()


def train_unet(data_dir: Path, zoo_dir: Path, plan: TrainingPlan) -> None:
    """Trains tiny-sd's U-Net and text encoder together, a tenth of the captions left empty."""
    torch.manual_seed(plan.seed)
    vae, tokenizer = load_vae(zoo_dir), build_tokenizer()
    latents, captions = encode_training_images(vae, data_dir, seed=plan.seed)
    tokens = tokenize(tokenizer, (*data.all_captions(), ""))  # the empty caption comes last
    model = TextToLatents(build_unet(), build_text_encoder(tokenizer))
    model.to(memory_format=torch.channels_last)
    batches = Batches(data_dir, plan)

    def draw_loss() -> torch.Tensor:
        chosen = batches.indices(len(latents))
        is_dropped = torch.rand(plan.batch_size, generator=batches.generator) < CAPTION_DROPOUT
        texts = tokens[captions[chosen].masked_fill(is_dropped, data.NUM_CAPTIONS)]
        noisy, timesteps, noise = add_noise(latents[chosen], batches.generator)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        return functional.mse_loss(model(noisy, timesteps, texts), noise)

    def export(averaged: TextToLatents) -> None:
        export_tiny_sd(
            zoo_dir / "weights" / "tiny-sd",
            vae=vae,
            unet=averaged.unet,
            text_encoder=averaged.text_encoder,
            tokenizer=tokenizer,
        )

    follow("unet", fit(model, draw_loss, plan), plan, export)


class TextToLatents(nn.Module):
    """tiny-sd's two trained parts as one module, so that one optimiser sees both."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, texts: torch.Tensor
    ) -> torch.Tensor:
        hidden = self.text_encoder(texts).last_hidden_state  # (N, 16, 64)
        predicted: torch.Tensor = self.unet(noisy, timesteps, hidden).sample
        return predicted


def load_vae(zoo_dir: Path) -> AutoencoderKL:
    """Loads the autoencoder that ``train_vae`` wrote."""
    vae = AutoencoderKL.from_pretrained(_vae_dir(zoo_dir))
    return vae.eval().requires_grad_(False)


def add_noise(
    latents: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns noisy latents, the timesteps they belong to, and the noise."""
    noise_scheduler = build_noise_scheduler()
    noise = torch.randn(latents.shape, generator=generator)
    last = noise_scheduler.config.num_train_timesteps
    timesteps = torch.randint(last, (len(latents),), generator=generator)
    return noise_scheduler.add_noise(latents, noise, timesteps), timesteps, noise


def train_dit(data_dir: Path, zoo_dir: Path, plan: TrainingPlan) -> None:
    """Trains tiny-dit; in training mode its label embedding drops a tenth of the classes."""
    torch.manual_seed(plan.seed)
    vae = load_vae(zoo_dir)
    latents, captions = encode_training_images(vae, data_dir, seed=plan.seed)
    dit = build_dit()
    share_label_parts(dit)
    batches = Batches(data_dir, plan)

    def draw_loss() -> torch.Tensor:
        chosen = batches.indices(len(latents))
        noisy, timesteps, noise = add_noise(latents[chosen], batches.generator)
        predicted = dit(noisy, timesteps, captions[chosen]).sample
        return functional.mse_loss(predicted, noise)

    def export(averaged: DiTTransformer2DModel) -> None:
        dense = build_dit()
        dense.load_state_dict(expand_label_parts(averaged))
        export_tiny_dit(zoo_dir / "weights" / "tiny-dit", vae=vae, dit=dense.eval())

    follow("dit", fit(dit, draw_loss, plan), plan, export)


@torch.no_grad()
def write_statistics(data_dir: Path, zoo_dir: Path, plan: TrainingPlan) -> None:
    """Writes the features of the held-out real images, their mean and their covariance."""
    model = TinyFeatures.from_pretrained(zoo_dir / "weights" / "tiny-features")
    images = data.held_out_images(data_dir)
    features = torch.cat([model(part) for part in torch.split(images.pixels, ENCODE_BATCH)])
    stored = features.half()
    tensors = {
        "features": stored,
        "mean": stored.double().mean(dim=0),
        "covariance": stored.double().T.cov(),
        "captions": images.captions.to(torch.int16),
    }
    folder = zoo_dir / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "features.safetensors")
    facts = {
        "kind": "dipgo.reference",
        "schema_version": 1,
        "images": "Fashion-MNIST test set, tinted with seed 1",
        "n": len(features),
        "feature_dim": features.shape[1],
        "extractor": "tiny-features",
        "resize": "antialiased bilinear to 32x32",
        "extractor_sha256": sha256(zoo_dir / "weights" / "tiny-features" / "model.safetensors"),
        "statistics_sha256": sha256(folder / "features.safetensors"),
        "images_sha256": hashlib.sha256(images.pixels.numpy().tobytes()).hexdigest(),
    }
    (folder / "features.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")


def sha256(path: Path) -> str:
    """Returns the hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_captions(data_dir: Path, zoo_dir: Path, plan: TrainingPlan) -> None:
    """Writes the two caption splits, one caption a line."""
    folder = zoo_dir / "captions"
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in zip(("calibration", "test"), data.split_captions(plan.seed), strict=True):
        (folder / f"{name}.txt").write_text("\n".join(split) + "\n", "utf-8")


STAGES: Final[dict[str, Callable[[Path, Path, TrainingPlan], None]]] = {
    "captions": write_captions,
    "vae": train_vae,
    "features": train_features,
    "statistics": write_statistics,
    "clip": train_clip,
    "unet": train_unet,
    "dit": train_dit,
}


def main(arguments: list[str] | None = None) -> None:
    """Runs one stage, or all of them in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--data", type=Path, default=data.DEFAULT_DATA_DIR)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the recipe's number of steps")
    parser.add_argument("--threads", type=int, help="CPU threads of this process")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for stage in STAGES if options.stage == "all" else [options.stage]:
        plan = replace(PLANS.get(stage, TrainingPlan(steps=0, batch_size=1)), seed=options.seed)
        if options.steps is not None:
            plan = replace(plan, steps=options.steps)
        STAGES[stage](options.data, options.out, plan)


if __name__ == "__main__":
    main()
