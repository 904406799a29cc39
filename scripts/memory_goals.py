"""Prints the estimates in docs/memory.md: a paper-faithful search of every known model."""

from __future__ import annotations

from dipgo_core.decoding import Decoding
from dipgo_core.families import KNOWN_MODELS, KnownModel
from dipgo_core.families.sizes import known_sizes
from dipgo_core.memory import Load, Need, Run, Search, generation_need, search_need

CALLS, GUIDANCE, GB = 50, 7.5, 1e9


def main() -> None:
    columns = ("model", "pixels", "weights", "caches", "search", "decoder again", "one image")
    print(f"| {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|")
    for known in KNOWN_MODELS:
        if not known.bundled:
            print(row(known))


def row(known: KnownModel) -> str:
    load = Load(
        sizes=known_sizes()[known.id],
        dtype="float16",
        side=known.resolution,
        guided=True,
        pipeline_upcasts=known.family == "sdxl",
    )
    search = Search(
        images=1, calls=CALLS, granularity="block", gates=known.num_blocks - 1, query_dim=512
    )
    plain = search_need(load, search, Run(images=1))
    again = search_need(load, search, Run(images=1, decoding=Decoding(checkpointing=True)))
    image = generation_need(load, Run(images=1))
    networks = ("denoiser", "text encoders", "autoencoder")
    weights = sum(plain.parts.get(name, 0) for name in networks)
    sizes = (weights / GB, plain.parts["caches between calls"] / GB)
    peaks = (total(need) for need in (plain, again, image))
    cells = [known.id, f"{known.resolution}", *(f"{size:.1f}" for size in sizes), *peaks]
    return f"| {' | '.join(cells)} |"


def total(need: Need) -> str:
    return f"{need.total / GB:.1f}"


if __name__ == "__main__":
    main()
