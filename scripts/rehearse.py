"""Run the flagship sweep files on shrunk models, through the command line, to their fronts.

The files are changed by `-o` only: paths (models, prompts, scorers, results), images (how many, how
large, how many latency times), steps (of samplers and searches). Ends with exit code 1 if a task
failed, or a model lacks a front with its dense run, every baseline and its searched points. The
files run side by side, each on one core: a latency bears as much beside it on two cores.
Times are not judged: where a busy machine disturbed a model's latencies, its front counts MACs.

    python scripts/rehearse.py [--folder FOLDER] [--executor ray] [sd_family] [transformer_family]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from dipgo_core.evaluation.device import gpu_name
from dipgo_core.zoo import shrunk
from dipgo_core.zoo.shrunk.clip import write_clip

ROOT: Final = Path(__file__).parents[1]

#: The shrunk model that stands in for each model of a sweep file, in their order there.
FLAGSHIPS: Final[Mapping[str, tuple[str, ...]]] = {
    "sd_family": ("sd15", "sd21", "sdxl"),
    "transformer_family": ("dit", "pixart", "sd35", "flux"),
}

#: Calls a run: the fewest of which each file's highest target leaves one.
CALLS: Final[Mapping[str, int]] = {"sd_family": 5, "transformer_family": 4}

#: Those whose folder does not say how small its images are to be.
SIZED: Final = ("pixart", "flux")

SEARCH_STEPS: Final = 2
CALIBRATION_IMAGES: Final = 2
IMAGES: Final = 8  # the fewest that give every metric an interval
LATENCY: Final = "{batch_size: 1, warmup: 0, max_warmup: 0, min_runs: 6, min_seconds: 0, tries: 1}"

SUBJECTS: Final = (
    "lighthouse",
    "red bicycle",
    "bowl of oranges",
    "city at night",
    "paper boat",
    "snowy owl",
    "steam train",
    "garden gate",
)


@dataclass(frozen=True)
class Stage:
    """A folder with everything that a rehearsal reads and writes."""

    folder: Path
    executor: str = "local"

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.tsv"

    @property
    def calibration(self) -> Path:
        return self.folder / "calibration.jsonl"

    @property
    def clip(self) -> Path:
        return self.folder / "clip"

    def model(self, name: str) -> Path:
        return self.folder / "models" / name

    def log(self, flagship: str) -> Path:
        """Return where the output of a run goes."""
        return self.folder / f"{flagship}.log"

    def command(self, verb: str, flagship: str, *options: str) -> list[str]:
        """Return a command line about a flagship file with this stage's overrides."""
        settings = [word for item in self.overrides(flagship) for word in ("-o", item)]
        file = str(ROOT / "sweeps" / f"{flagship}.yaml")
        program = "from orchestrator.cli import main; main()"
        return [sys.executable, "-c", program, verb, file, *settings, *options]

    def overrides(self, flagship: str) -> Iterator[str]:
        """Yield what differs from the sweep file: paths, images, steps."""
        yield f"storage={self.folder / flagship}"
        yield f"tracking.uri=sqlite:///{self.folder / flagship}.db"
        yield f"evaluate.scorers={{features: tiny-features, clip: {self.clip}}}"
        yield f"evaluate.prompts={{file: {self.prompts}, column: Prompt, rows: {IMAGES}}}"
        yield f"evaluate.images={IMAGES}"
        yield (
            f"search.calibration.prompts={{file: {self.calibration}, column: prompt, "
            f"rows: {CALIBRATION_IMAGES}}}"
        )
        yield f"search.calibration.images={CALIBRATION_IMAGES}"
        yield f"search.steps={SEARCH_STEPS}"
        yield f"latency={LATENCY}"
        for index, name in enumerate(FLAGSHIPS[flagship]):
            yield f"models.{index}.sampler.steps={CALLS[flagship]}"
            yield from self._model_overrides(f"models.{index}", name)

    def _model_overrides(self, place: str, name: str) -> Iterator[str]:
        yield f"{place}.id={self.model(name)}"
        yield f"{place}.revision=null"
        if name in SIZED:
            yield f"{place}.resolution={shrunk.PIXELS}"
        if name == "dit":
            yield f"{place}.overrides.evaluate.images={IMAGES}"


def write_stage(stage: Stage, flagships: Sequence[str]) -> None:
    """Write the shrunk models, a CLIP to score them and two prompt files."""
    for name in (name for flagship in flagships for name in FLAGSHIPS[flagship]):
        shrunk.write(name, stage.model(name))
    write_clip(stage.clip)
    lines = [f"a {subject} by the sea\tScenes" for subject in SUBJECTS]
    stage.prompts.write_text("\n".join(["Prompt\tCategory", *lines]) + "\n")
    rows = [json.dumps({"prompt": f"an oil painting of a {subject}"}) for subject in SUBJECTS]
    stage.calibration.write_text("\n".join(rows) + "\n")


def rehearse(stage: Stage, flagship: str) -> list[str]:
    """Run one sweep file, print what came of it, and return what is wrong."""
    started = time.monotonic()
    with stage.log(flagship).open("w") as log:
        command = stage.command("run", flagship, "--executor", stage.executor)
        code = call(command, stdout=log, stderr=subprocess.STDOUT).returncode
    problems = [] if code == 0 else [f"{flagship}: run ended with exit code {code}"]
    sweep, results = (_read(stage, verb, flagship) for verb in ("validate", "pareto"))
    if sweep is None or results is None:
        problems.append(f"{flagship}: no results can be read")
    lines = []
    for model in sweep["models"] if sweep and results else []:
        quality = sweep["objective"]["quality"]
        wanted = {"dense", "search", *(baseline["name"] for baseline in model["baselines"])}
        problems += judged(model["name"], quality, wanted, results)
        lines.append(f"  {summary(model['name'], quality, results)}")
    if problems:
        lines += [stage.log(flagship).read_text(), *problems]
    say("\n".join([f"{flagship}: {time.monotonic() - started:.0f} s", *lines]))
    return problems


def call(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command offline; without a GPU its tasks ask for none."""
    gpus = {} if gpu_name() else {"DIPGO_GPUS": "0"}
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **gpus, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    return subprocess.run(command, env=environment, text=True, check=False, **options)


def _read(stage: Stage, verb: str, flagship: str) -> Any:
    """Return the JSON document of a command, None if it failed."""
    answer = call(stage.command(verb, flagship, "--json"), stdout=subprocess.PIPE)
    return json.loads(answer.stdout) if answer.returncode == 0 else None


def judged(
    model: str, quality: str, wanted: Collection[str], results: Mapping[str, Any]
) -> list[str]:
    """Return what one model's results lack: finished points of every method, and their front.

    results: of `dipgo-sweep pareto --json`. A point whose latency was disturbed is known to the
    front as such, and counts.
    """
    points = {point["key"]: point for point in results["points"] if point["model"] == model}
    problems = [
        f"{model}: {point['name']} is {point['state']}"
        for point in points.values()
        if point["state"] != "done"
    ]
    front = _front(model, quality, results)
    if front is None:
        return [*problems, f"{model}: no front of {quality}"]
    compared = {points[key]["method"] for key in (*front["standing"], *front["disturbed"])}
    lacking = sorted(set(wanted) - compared)
    return problems + [f"{model}: no {method} on its front of {quality}" for method in lacking]


def summary(model: str, quality: str, results: Mapping[str, Any]) -> str:
    """Return one line on a model: its points by method, and its front."""
    methods = Counter(point["method"] for point in results["points"] if point["model"] == model)
    counts = ", ".join(f"{count} {method}" for method, count in methods.items())
    front = _front(model, quality, results)
    if front is None:
        return f"{model}: {counts}; no front"
    speed = front["objectives"][0]
    return f"{model}: {counts}; {len(front['points'])} on the front of {speed} and {quality}"


def _front(model: str, quality: str, results: Mapping[str, Any]) -> Any:
    """Return the front through most points of a model, None where it has none."""
    fronts = (
        front
        for front in results["fronts"]
        if front["model"] == model and front["objectives"][1] == quality and front["points"]
    )
    return max(fronts, key=lambda front: len(front["standing"]), default=None)


def say(line: str) -> None:
    """Print a line at once: what the commands print comes between."""
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help=f"{', '.join(FLAGSHIPS)} [all]")
    parser.add_argument("--folder", type=Path, help="keep everything there [a temporary folder]")
    parser.add_argument("--executor", choices=("local", "ray"), default="local")
    arguments = parser.parse_args()
    flagships = arguments.sweeps or list(FLAGSHIPS)
    if unknown := set(flagships) - set(FLAGSHIPS):
        parser.error(f"no flagship is called {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as temporary:
        stage = Stage((arguments.folder or Path(temporary)).resolve(), arguments.executor)
        stage.folder.mkdir(parents=True, exist_ok=True)
        write_stage(stage, flagships)
        with ThreadPoolExecutor(len(flagships)) as pool:
            problems = sum(pool.map(partial(rehearse, stage), flagships), [])
    say(f"{len(problems)} problems" if problems else "every model has its front")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
