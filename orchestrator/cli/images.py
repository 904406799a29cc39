"""`generate`: one prompt through an exported SubNet, beside the dense model where asked."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipgo_core.config import DType
from dipgo_core.errors import ConfigError
from dipgo_core.families import Family, call_options
from dipgo_core.subnet import SubNet

if TYPE_CHECKING:
    from dipgo_core.pipelines import LoadedModel


@dataclass(frozen=True)
class Generated:
    """One image and how long its pipeline call took. seconds: wall clock, first call included."""

    image: Any  # PIL.Image.Image
    seconds: float


def generate_images(
    subnet: SubNet, prompt: str, seed: int, *, dtype: DType, device: str, compare: bool
) -> tuple[Generated, Generated | None]:
    """Return the SubNet's image of a prompt and, if asked, the dense model's from the same noise.

    Raises:
        DipgoError: the model cannot be loaded, or the prompt is no class of a class-conditional
            model.
    """
    from dipgo_core.binding import scheduler_of
    from dipgo_core.pipelines import load_model
    from dipgo_core.runtime import apply_subnet
    from orchestrator.cli.quiet import silence_loading

    silence_loading()
    model = load_model(subnet.model_settings(dtype), device=device)
    model.pipe.scheduler = scheduler_of(subnet)
    arguments = {
        **condition(model.family, model.pipe, prompt),
        **model.size_arguments,
        **call_options(model.family, model.settings.id),
        **subnet.call_kwargs(),
    }
    dense = timed(lambda: call(model, arguments, seed)) if compare else None
    with apply_subnet(model.pipe, subnet):
        pruned = timed(lambda: call(model, arguments, seed))
    return pruned, dense


def call(model: LoadedModel, arguments: dict[str, Any], seed: int) -> Any:
    """Call the stock pipeline with a CPU generator."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return model.pipe(**arguments, generator=generator).images[0]


def timed(make: Callable[[], Any]) -> Generated:
    start = time.perf_counter()
    image = make()
    return Generated(image, time.perf_counter() - start)


def condition(family: Family, pipe: Any, prompt: str) -> dict[str, Any]:
    """Return the argument that carries the prompt: text, or a class by number or name.

    Raises:
        ConfigError: a class-conditional model has no class of this name.
    """
    if family.conditioning == "prompt":
        return {"prompt": prompt}
    if prompt.isdecimal():
        return {"class_labels": [int(prompt)]}
    names = dict(getattr(pipe, "labels", None) or {})
    if prompt not in names:
        listed = ", ".join(sorted(names)[:20]) or "none by name: give its number"
        raise ConfigError(
            f"--prompt must be a class of this model, got {prompt!r}; it has {listed}"
        )
    return {"class_labels": [int(names[prompt])]}


def save_image(image: Any, path: Path) -> None:
    """Write an image through a temporary name; its suffix chooses the format.

    Raises:
        ConfigError: the suffix is no image format.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        image.save(temporary)
    except ValueError as error:
        raise ConfigError(f"--output {path}: {error}; use a name such as image.png") from error
    temporary.replace(path)


def side_by_side(left: Any, right: Any) -> Any:
    """Return one image with both, the same height."""
    from PIL import Image

    joined = Image.new("RGB", (left.width + right.width, max(left.height, right.height)))
    joined.paste(left, (0, 0))
    joined.paste(right, (left.width, 0))
    return joined
