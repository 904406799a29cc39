"""Measures the bundled models: scorers on real images, dense models over the DDIM steps.

    python benchmarks/zoo/measure.py model tiny-sd    # one part file a model, can run side by side
    python benchmarks/zoo/measure.py model tiny-dit
    python benchmarks/zoo/measure.py report           # scorers, dense_quality.json, tables, plot

The step count and the targets of every later sweep are fixed from this curve, before any search.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer

from dipgo_core.zoo import data, reference_statistics_path, zoo_path
from dipgo_core.zoo.features import TinyFeatures
from dipgo_core.zoo.train import clip_logits, tokenize

HERE: Final = Path(__file__).parent
CURVE: Final = (50, 20, 10, 8, 7, 6, 5, 4, 3, 2)
SPACINGS: Final = ("leading", "trailing")
GUIDANCE_TRIALS: Final = (1.5, 2.0, 3.0, 4.0)
GUIDANCE: Final = {"tiny-sd": 3.0, "tiny-dit": 3.0}  # chosen from the trials
BATCH: Final = 140
SEED: Final = 0
CARD_STEPS: Final = (50, 10, 5, 3)
CARD_MARKS: Final = (
    "<!-- figures: written by benchmarks/zoo/measure.py report -->",
    "<!-- end of figures -->",
)
PROTOCOL: Final[dict[str, Any]] = {
    "steps": 10,
    "guidance_scale": 3.0,
    "targets": [0.3, 0.5, 0.7],
    "fixed": "from this curve of the dense models alone, not from any search",
    "reasons": [
        "From 50 down to 4 dense steps FID, CLIP score and accuracy hardly change: with more than "
        "about 10 steps a sweep would mostly measure redundancy.",
        "The knee is between 4 and 3 steps (tiny-sd, leading: FID 1.76 to 5.03, accuracy 0.936 to "
        "0.679). Of 10 steps 3 are target 0.7, so that is the highest target.",
        "At 2 steps both models fall apart; a target of 0.8 would compare ruins.",
        "0.3 and 0.5 are controls: FID and CLIP score should tie with dense there, and only the "
        "paired distances (PSNR, SSIM to the dense image of the same seed) can tell methods apart.",
        "With leading spacing FID falls a little down to 4 or 5 steps, so a FID below the dense "
        "one is no proof of quality; read it beside the paired distances.",
        "At 3 steps trailing spacing is much better than leading: beating leading proves nothing.",
        "Guidance 3.0 is the lowest trial at which both models pass 0.90 exact captions; FID "
        "alone would choose 1.5 to 2.0.",
        "One set of 560 images, no intervals: a standard error of accuracy is about 0.01.",
    ],
}


@dataclass(frozen=True)
class Run:
    """One dense sampling run."""

    steps: int
    spacing: str
    guidance_scale: float
    images_per_caption: int


class Scorers:
    """tiny-clip, tiny-features and the statistics of the real images."""

    def __init__(self) -> None:
        self.clip = CLIPModel.from_pretrained(zoo_path("tiny-clip")).eval()
        tokenizer = CLIPTokenizer.from_pretrained(zoo_path("tiny-clip"))
        self.tokens = tokenize(tokenizer, data.all_captions())
        self.features = TinyFeatures.from_pretrained(zoo_path("tiny-features"))
        self.reference = load_file(reference_statistics_path())

    @torch.no_grad()
    def score(self, images: data.TintedImages) -> dict[str, float]:
        """Returns every figure of a set of images."""
        parts = images.pixels.split(500)
        features = torch.cat([self.features(part) for part in parts])
        logits = torch.cat([clip_logits(self.clip, part, self.tokens) for part in parts])
        named = torch.stack([head(features).argmax(-1) for head in self.features.heads], dim=-1)
        truth = data.caption_parts(images.captions)
        clip_named = data.caption_parts(logits.argmax(-1))
        cosine = logits / self.clip.logit_scale.exp()
        own = cosine.gather(1, images.captions[:, None])
        return {
            "n": len(images.pixels),
            "fid": frechet_distance(features, self.reference["mean"], self.reference["covariance"]),
            "clip_score": 100 * own.mean().item(),
            "accuracy_clip": _all_equal(clip_named, truth),
            "accuracy_features": _all_equal(named, truth),
            **_by_part("clip", clip_named == truth),
            **_by_part("features", named == truth),
            "agreement": _all_equal(named, clip_named),
            **_by_part("agreement", named == clip_named),
        }


def _all_equal(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left == right).all(dim=-1).float().mean().item()


def _by_part(name: str, is_right: torch.Tensor) -> dict[str, float]:
    shares = is_right.float().mean(dim=0).tolist()
    return {
        f"{name}_{part}": share
        for part, share in zip(("garment", "colour", "background"), shares, strict=True)
    }


def frechet_distance(features: torch.Tensor, mean: torch.Tensor, cov: torch.Tensor) -> float:
    """Returns the FID of features (N, D) against a Gaussian, in float64."""
    own_mean, own_cov = features.double().mean(dim=0), features.double().T.cov()
    root_trace = torch.linalg.eigvals(own_cov @ cov).real.clamp(min=0).sqrt().sum()
    squared = (own_mean - mean).square().sum()
    return (squared + own_cov.trace() + cov.trace() - 2 * root_trace).item()


def load(name: str) -> DiffusionPipeline:
    """Loads a bundled model through its stock pipeline."""
    stock = StableDiffusionPipeline if name == "tiny-sd" else DiTPipeline
    pipe = stock.from_pretrained(zoo_path(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def generate(pipe: DiffusionPipeline, run: Run) -> data.TintedImages:
    """Returns images of all 280 captions; image ``i`` starts from the noise of seed ``i``."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=run.spacing)
    captions = torch.arange(data.NUM_CAPTIONS).repeat(run.images_per_caption)
    pixels = []
    for chosen in torch.arange(len(captions)).split(BATCH):
        seeds = [SEED * 1_000_000 + index for index in chosen.tolist()]
        images = pipe(
            _conditions(pipe, captions[chosen]),
            num_inference_steps=run.steps,
            guidance_scale=run.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        ).images
        pixels.append(torch.from_numpy(images).permute(0, 3, 1, 2).mul(255).round())
    return data.TintedImages(torch.cat(pixels).to(torch.uint8), captions)


def _conditions(pipe: DiffusionPipeline, captions: torch.Tensor) -> list[str] | list[int]:
    if isinstance(pipe, DiTPipeline):
        return captions.tolist()
    texts = data.all_captions()
    return [texts[index] for index in captions]


def measure_model(name: str) -> dict[str, Any]:
    """Measures one model: guidance trials at 10 steps, then the curve at the chosen guidance."""
    pipe, scorers = load(name), Scorers()
    trials = [Run(10, "leading", guidance, 1) for guidance in GUIDANCE_TRIALS]
    rows = {"guidance_trials": trials, "curve": list(curve_runs(GUIDANCE[name]))}
    result: dict[str, Any] = {"guidance_scale": GUIDANCE[name]}
    for title, runs in rows.items():
        result[title] = []
        for run in runs:
            row = {**asdict(run), **scorers.score(generate(pipe, run))}
            print(json.dumps(row), flush=True)
            result[title].append(row)
    save_grid(generate(pipe, Run(10, "leading", GUIDANCE[name], 1)), HERE / f"{name}.png")
    return result


def curve_runs(guidance_scale: float) -> Iterator[Run]:
    """Yields the few-step curve; above 10 steps the spacing no longer matters."""
    for steps in CURVE:
        for spacing in SPACINGS if steps <= 10 else SPACINGS[:1]:
            yield Run(steps, spacing, guidance_scale, 2)


def save_grid(images: data.TintedImages, path: Path, *, zoom: int = 2) -> None:
    """Writes one row a garment, one column for each of its 28 colours and backgrounds."""
    rows = images.pixels[: data.NUM_CAPTIONS].reshape(len(data.GARMENTS), -1, 3, 32, 32)
    grid = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (10 * 32, 28 * 32, 3)
    picture = Image.fromarray(grid.contiguous().numpy())
    size = (picture.width * zoom, picture.height * zoom)
    picture.resize(size, Image.Resampling.NEAREST).save(path, optimize=True)


def measure_scorers(data_dir: Path) -> dict[str, Any]:
    """Scores the held-out real images, and as many training images as the curve has (FID floor)."""
    scorers = Scorers()
    grey = data.load_grey(data_dir, "train")
    some = torch.randperm(len(grey.pixels), generator=torch.Generator().manual_seed(SEED))[:560]
    generator = torch.Generator().manual_seed(SEED)
    real = data.tint(grey.pixels[some], grey.garments[some], generator)
    return {
        "held_out": scorers.score(data.held_out_images(data_dir)),
        "training_images": scorers.score(real),
    }


def machine() -> dict[str, Any]:
    """Returns what the figures were measured on."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    packages = ("torch", "diffusers", "transformers")
    return {
        "cpu": cpu[0].split(":", 1)[1].strip() if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def write_tables(quality: dict[str, Any], path: Path) -> None:
    """Writes the curve of both models as Markdown."""
    lines = ["# Dense quality of the bundled models", ""]
    for name in GUIDANCE:
        lines += [
            f"## {name}, guidance scale {quality[name]['guidance_scale']}",
            "",
            "| steps | spacing | n | FID | CLIP score | accuracy (tiny-clip) | agreement |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {row['steps']} | {row['spacing']} | {row['n']} | {row['fid']:.2f} "
            f"| {row['clip_score']:.2f} | {row['accuracy_clip']:.3f} | {row['agreement']:.3f} |"
            for row in quality[name]["curve"]
        ]
        lines.append("")
    path.write_text("\n".join(lines), "utf-8")


def write_card(quality: dict[str, Any], card: Path) -> None:
    """Puts the figures between the card's two marks."""
    scorers = quality["scorers"]
    lines = ["| images | n | FID | CLIP score | tiny-clip | tiny-features | agreement |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    lines.append(_card_row("held-out, real", scorers["held_out"]))
    lines.append(_card_row("training, real", scorers["training_images"]))
    for name in GUIDANCE:
        for row in quality[name]["curve"]:
            if row["steps"] in CARD_STEPS and row["spacing"] == "leading":
                lines.append(_card_row(f"{name}, {row['steps']} DDIM steps", row))
    head, rest = card.read_text("utf-8").split(CARD_MARKS[0])
    tail = rest.split(CARD_MARKS[1])[1]
    text = "\n".join([CARD_MARKS[0], *lines, CARD_MARKS[1]])
    card.write_text(head + text + tail, "utf-8")


def _card_row(title: str, row: dict[str, Any]) -> str:
    figures = [f"{row['fid']:.2f}", f"{row['clip_score']:.2f}"]
    figures += [f"{row[key]:.3f}" for key in ("accuracy_clip", "accuracy_features", "agreement")]
    return f"| {title} | {row['n']} | {' | '.join(figures)} |"


def plot_curves(quality: dict[str, Any], path: Path) -> None:
    """Draws FID and accuracy over the number of steps."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in GUIDANCE:
        for spacing, style in zip(SPACINGS, ("-o", "--s"), strict=True):
            rows = [row for row in quality[name]["curve"] if row["spacing"] == spacing]
            steps = [row["steps"] for row in rows]
            for axis, metric in zip(axes, ("fid", "accuracy_clip"), strict=True):
                axis.plot(steps, [row[metric] for row in rows], style, label=f"{name} {spacing}")
    for axis, title in zip(axes, ("FID (tiny-features)", "exact-caption accuracy"), strict=True):
        axis.set(xscale="log", xlabel="DDIM steps", ylabel=title, xticks=CURVE)
        axis.set_xticks(CURVE, [str(steps) for steps in CURVE])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def write_json(value: dict[str, Any], path: Path) -> None:
    """Writes rounded figures, keys in the order they were made."""
    text = json.dumps(
        json.loads(json.dumps(value), parse_float=lambda x: round(float(x), 4)), indent=1
    )
    path.write_text(text + "\n", "utf-8")


def measured(name: str) -> dict[str, Any]:
    """Returns the last part of one model, or what an earlier report has kept of it."""
    part = HERE / f".{name}.json"
    if part.exists():
        return json.loads(part.read_text("utf-8"))
    return json.loads((HERE / "dense_quality.json").read_text("utf-8"))[name]


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["model", "report"])
    parser.add_argument("name", nargs="?", choices=list(GUIDANCE))
    parser.add_argument("--data", type=Path, default=data.DEFAULT_DATA_DIR)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    started = time.monotonic()
    if options.part == "model":
        part = measure_model(options.name)
        part["wall_s"] = round(time.monotonic() - started)
        write_json(part, HERE / f".{options.name}.json")
        return
    quality: dict[str, Any] = {"schema_version": 1, "machine": machine(), "protocol": PROTOCOL}
    quality["scorers"] = measure_scorers(options.data)
    for name in GUIDANCE:
        quality[name] = measured(name)
    write_json(quality, HERE / "dense_quality.json")
    write_tables(quality, HERE / "few_steps.md")
    plot_curves(quality, HERE / "few_steps.png")
    write_card(quality, Path(data.__file__).parent / "CARD.md")


if __name__ == "__main__":
    main()
