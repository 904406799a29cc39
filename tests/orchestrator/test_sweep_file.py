"""Sweep files: what is accepted, what is resolved, and that every error is reported at its place.

Oracle: lines and columns counted by hand in the files below; grids counted by multiplication.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dipgo_core.config import SearchSettings
from dipgo_core.errors import SweepFileError
from dipgo_core.families import FAMILIES, find_known
from orchestrator.sweep_file import SweepFile, load_sweep
from orchestrator.sweep_settings import AskedResources, Budget

SWEEPS = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))
Load = Callable[..., SweepFile]

HEAD = "schema_version: 1\nname: small\n"
SMALL = HEAD + "models: [tiny-sd]\ntargets: [0.5]\n"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads text as the file ``s.yaml`` of the current folder."""
    monkeypatch.chdir(tmp_path)

    def load_text(text: str) -> SweepFile:
        Path("s.yaml").write_text(text, encoding="utf-8")
        return load_sweep("s.yaml")

    return load_text


def issues_of(load: Load, text: str) -> list[str]:
    with pytest.raises(SweepFileError) as caught:
        load(text)
    assert all(str(issue) in str(caught.value) for issue in caught.value.errors)
    return [str(issue) for issue in caught.value.errors]


# --- what is accepted ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweep_loads_from_any_folder(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = load_sweep(path)
    assert sweep.models and all(model.searches() for model in sweep.models)
    assert json.loads(json.dumps(sweep.to_json())) == sweep.to_json()


def test_shipped_sweeps_are_the_ones_promised() -> None:
    assert {path.stem for path in SWEEPS} >= {"quickstart", "tiny_full", "sd_family"}
    quickstart = load_sweep(next(path for path in SWEEPS if path.stem == "quickstart"))
    assert [model.name for model in quickstart.models] == ["tiny-sd", "tiny-dit"]
    assert {len(model.targets) for model in quickstart.models} == {3}
    assert {len(model.searches()) for model in quickstart.models} == {2}


def test_every_field_of_the_contract_is_accepted(load: Load) -> None:
    Path("prompts.jsonl").write_text('{"prompt": "a cat"}\n')
    text = """\
schema_version: 1
name: sd-family
objective: {speed: latency, quality: clip}
models:
  - name: sd15
    id: stable-diffusion-v1-5/stable-diffusion-v1-5
    revision: main
    dtype: float16
    sampler: {scheduler: ddim, steps: 50, guidance_scale: 7.5}
    overrides: {search: {steps: 9}, targets: [0.1], evaluate: {seed: 1}, baselines: [uniform]}
search:
  strategy: dipgo
  loss: {consistency: {ssim: 1.0}, alpha: [0.5, 1.0, 2.0], tau: 0.2, gamma: true}
  steps: 500
  granularity: block
  seed: [0, 1]
  calibration:
    prompts: {hub: poloclub/diffusiondb, column: prompt, rows: 1000}
    batch_size: 1
targets: [0.3, 0.5, 0.7, 0.8]
baselines: [few_steps, uniform, best_step_mask, random]
evaluate:
  prompts: ${COCO_PROMPTS:-prompts.jsonl}
  images: 5000
  reference: dense
  metrics: [fid, kid, clip, psnr, ssim, latency]
  seed: 0
resources: {search: {gpus: 1}, evaluate: {gpus: 1}, images_per_shard: 500}
tracking: {uri: null, experiment: sd-family}
storage: ./.dipgo
budget: {gpu_hours: 200, wall_hours: 12, usd: 500, usd_per_gpu_hour: 2.5}
macs_convention: all
allow_unpinned: true
"""
    sweep = load(text)
    (model,) = sweep.models
    assert len(model.searches()) == 3 * 2 and model.searches()[0].steps == 9
    assert model.evaluate.prompts.source == {"file": "prompts.jsonl"}
    assert sweep.budget == Budget(gpu_hours=200, wall_hours=12, usd=500, usd_per_gpu_hour=2.5)
    assert sweep.resources.search.gpus == 1.0


def test_bare_model_has_its_defaults(load: Load) -> None:
    known = find_known("tiny-sd")
    (model,) = load(SMALL).models
    assert known is not None and model.sampler == known.sampler
    assert model.evaluate.scorers == known.scorers
    assert model.searches() == (SearchSettings(),)
    assert model.calibration.prompts.source == "bundled:calibration"
    assert model.evaluate.prompts.source == "bundled:test"


def test_list_of_samplers_makes_one_model_each(load: Load) -> None:
    sampler = "sampler: [{steps: 5}, {scheduler: pndm, steps: 10}]"
    models = load(SMALL.replace("tiny-sd", f"{{id: tiny-sd, name: a, {sampler}}}")).models
    assert [model.name for model in models] == ["a-ddim-5", "a-pndm-10"]
    assert [model.sampler.steps for model in models] == [5, 10]


def test_schedule_of_ones_own_says_its_steps(load: Load) -> None:
    lists = "{timesteps: [999, 500, 9]}, {timesteps: [999, 400, 9]}, {steps: 3}"
    samplers = f"sampler: [{lists}]".replace("{", "{scheduler: dpm++2m, ")
    models = load(SMALL.replace("tiny-sd", f"{{id: tiny-sd, name: a, {samplers}}}")).models
    assert [model.sampler.timesteps for model in models] == [(999, 500, 9), (999, 400, 9), None]
    assert [model.name for model in models] == [
        "a-dpm-2m-3-timesteps", "a-dpm-2m-3-timesteps-2", "a-dpm-2m-3"
    ]  # fmt: skip
    assert {model.sampler.steps for model in models} == {3}


def test_flow_matching_takes_sigmas(load: Load) -> None:
    flux = "{id: black-forest-labs/FLUX.1-dev, sampler: {sigmas: [1.0, 0.4]}, overrides: {OURS}}"
    ours = "search: {calibration: {prompts: a.txt}}, evaluate: {prompts: b.txt}"
    Path("a.txt").write_text("a cat")
    Path("b.txt").write_text("a dog")
    text = SMALL.replace("tiny-sd", flux.replace("OURS", ours)) + "allow_unpinned: true\n"
    (model,) = load(text).models
    assert (model.sampler.scheduler, model.sampler.steps) == ("flow_match_euler", 2)
    assert model.sampler.custom == {"sigmas": [1.0, 0.4]}


def test_image_size_and_layers_are_read(load: Load) -> None:
    text = SMALL.replace("tiny-sd", "{id: tiny-sd, resolution: 64}")
    (model,) = load(text + "search: {granularity: [block, layer]}\n").models
    assert model.settings.resolution == 64
    assert [search.granularity for search in model.searches()] == ["block", "layer"]


def auraflow(folder: Path, noise_scheduler: str = "FlowMatchEulerDiscreteScheduler") -> None:
    """The files of a pipeline in no family that planning reads."""
    diffusers = {"transformer": "AuraFlowTransformer2DModel", "scheduler": noise_scheduler}
    index = {name: ["diffusers", kind] for name, kind in diffusers.items()}
    folder.mkdir()
    index_file = folder / "model_index.json"
    index_file.write_text(json.dumps({"_class_name": "AuraFlowPipeline", **index}))
    Path("a.txt").write_text("a cat")
    Path("b.txt").write_text("a dog")


AURA = HEAD + "models: [{id: ./aura, resolution: 64}]\ntargets: [0.5]\n" + (
    "evaluate: {prompts: b.txt}\nallow_unpinned: true\n"
    "search: {calibration: {prompts: a.txt}, granularity: GRANULARITY}\n"
)  # fmt: skip


def test_pipeline_in_no_family_is_searched_with_its_own_noise_scheduler(load: Load) -> None:
    auraflow(Path("aura"))
    (model,) = load(AURA.replace("GRANULARITY", "block")).models
    assert model.family == "AuraFlowPipeline.transformer.AuraFlowTransformer2DModel"
    assert model.sampler.scheduler == "flow_match_euler"


def test_pipeline_in_no_family_has_no_layers(load: Load) -> None:
    auraflow(Path("aura"))
    (issue,) = issues_of(load, AURA.replace("GRANULARITY", "layer"))
    assert "search.granularity: AuraFlowPipeline is in no family" in issue
    assert issue.endswith("take block, got layer")


def test_pipeline_that_takes_more_than_a_prompt_is_not_searched(load: Load) -> None:
    Path("inpaint").mkdir()
    Path("inpaint/model_index.json").write_text('{"_class_name": "FluxInpaintPipeline"}')
    issues = issues_of(load, SMALL.replace("tiny-sd", "./inpaint"))
    assert "FluxInpaintPipeline makes images of more than a prompt" in issues[0]
    assert "search the model of FluxPipeline" in issues[0]


def test_pipeline_whose_noise_scheduler_has_no_name_is_refused(load: Load) -> None:
    auraflow(Path("aura"), "DEISMultistepScheduler")
    issues = issues_of(load, AURA.replace("GRANULARITY", "block"))
    assert "DEISMultistepScheduler is none of ddim, pndm" in issues[0]


def test_labels_are_the_prompts_of_a_label_model(load: Load) -> None:
    (model,) = load(SMALL.replace("tiny-sd", "tiny-dit")).models
    assert model.evaluate.prompts.kind == model.calibration.prompts.kind == "labels"


PINNED = f"""\
evaluate:
  prompts: {{hub: a/b, revision: {"cd" * 20}}}
  scorers: {{clip: laion/clip@{"ef" * 20}}}
search: {{calibration: {{prompts: {{hub: c/d, revision: {"0a" * 20}}}}}}}
"""


def test_hub_model_with_a_commit_needs_no_permission(load: Load) -> None:
    model = f"{{id: owner/model, family: sdxl, revision: {'ab' * 20}}}"
    (model_read,) = load(SMALL.replace("tiny-sd", model) + PINNED).models
    assert model_read.settings.revision == "ab" * 20
    assert model_read.sampler == FAMILIES["sdxl"].sampler


@pytest.mark.parametrize(
    ("written", "field"),
    [
        (f", revision: {'cd' * 20}", "evaluate.prompts.revision"),
        (f", revision: {'0a' * 20}", "search.calibration.prompts.revision"),
        (f"@{'ef' * 20}", "evaluate.scorers.clip"),
        (f"scorers: {{clip: laion/clip@{'ef' * 20}}}", "evaluate.scorers.clip"),
    ],
)
def test_prompts_and_scorers_that_move_need_permission_too(
    load: Load, written: str, field: str
) -> None:
    model = f"{{id: owner/model, family: sdxl, revision: {'ab' * 20}}}"
    text = SMALL.replace("tiny-sd", model) + PINNED.replace(written, "")
    (issue,) = issues_of(load, text)
    assert f": {field}: must name a commit (40 hexadecimal digits), got none" in issue
    assert "`dipgo-sweep pin s.yaml` writes it, or set allow_unpinned: true" in issue
    assert load(text + "allow_unpinned: true\n")


def test_scorer_that_no_metric_needs_may_move(load: Load) -> None:
    model = f"{{id: owner/model, family: sdxl, revision: {'ab' * 20}}}"
    text = SMALL.replace("tiny-sd", model) + PINNED.replace(f"@{'ef' * 20}", "")
    assert load(text.replace("evaluate:", "evaluate:\n  metrics: [psnr]"))


def test_local_folder_tells_its_family(load: Load) -> None:
    Path("my-model").mkdir()
    Path("my-model/model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    (model,) = load(SMALL.replace("tiny-sd", "./my-model")).models
    assert (model.family, model.settings.id) == ("dit", "my-model")


def test_scorer_folder_beside_the_file_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep" / "mine" / "clip").mkdir(parents=True)
    scorers = "evaluate: {metrics: [psnr], scorers: {clip: mine/clip, cmmd: owner/clip}}\n"
    (tmp_path / "deep" / "s.yaml").write_text(SMALL + scorers)
    monkeypatch.chdir(tmp_path)
    (model,) = load_sweep("deep/s.yaml").models
    assert model.evaluate.scorers.clip == "deep/mine/clip"
    assert model.evaluate.scorers.cmmd == "owner/clip"


def test_paths_are_found_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "p.txt").write_text("a cat\n")
    (tmp_path / "deep" / "s.yaml").write_text(SMALL + "evaluate: {prompts: p.txt}\n")
    monkeypatch.chdir(tmp_path)
    source = load_sweep("deep/s.yaml").models[0].evaluate.prompts
    assert Path(source.value).read_text() == "a cat\n"


def test_digest_ignores_comments_order_and_spelled_out_defaults(load: Load) -> None:
    other = "# hello\ntargets: [0.50]\nmodels: [{id: tiny-sd}]\nname: small\nschema_version: 1\n"
    assert load(SMALL).digest == load(other + "search: {steps: 500, loss: {tau: 0.2}}").digest
    assert load(SMALL).digest != load(SMALL.replace("0.5", "0.6")).digest


def test_baselines_take_settings(load: Load) -> None:
    text = "baselines: [uniform, {random: {draws: 7}}, {few_steps: {spacing: trailing}}]\n"
    uniform, random, few_steps = load(SMALL + text).models[0].baselines
    assert (uniform.draws, random.draws, few_steps.spacing) == (0, 7, ("trailing",))


def test_batch_sizes_of_latency_are_one_or_a_list(load: Load) -> None:
    assert load(SMALL).latency.batch_size == (1,)
    assert load(SMALL + "latency: {batch_size: 4}").latency.batch_size == (4,)
    assert load(SMALL + "latency: {batch_size: [1, 8]}").latency.batch_size == (1, 8)


def test_latency_takes_one_accelerator(load: Load) -> None:
    text = "resources: {evaluate: {gpus: 1}, latency: {accelerator: A100}}"
    resources = load(SMALL + text).resources
    assert (resources.latency.gpus, resources.latency.accelerator) == (1, "A100")
    assert resources.evaluate.accelerator is None


def test_what_is_not_given_is_left_to_the_size_of_the_model(load: Load) -> None:
    resources = load(SMALL + "resources: {search: {accelerator: A100}, score: {cpus: 4}}").resources
    assert (resources.search.gpus, resources.search.accelerator) == (None, "A100")
    assert (resources.score.cpus, resources.score.gpus) == (4, None)
    assert resources.evaluate == AskedResources()


def test_gpu_memory_is_handed_down_like_gpus(load: Load) -> None:
    text = "resources: {evaluate: {gpus: 1, gpu_memory_gb: 24}, search: {gpus: 1}}"
    resources = load(SMALL + text).resources
    assert resources.reference.gpu_memory_gb == resources.latency.gpu_memory_gb == 24
    assert resources.search.gpu_memory_gb is None


# --- the grid ------------------------------------------------------------------------------------


def test_lists_of_the_search_are_axes(load: Load) -> None:
    text = "search: {seed: [0, 1], steps: [5, 6, 7], loss: {alpha: [1, 2], gamma: [true, false]}}"
    searches = load(SMALL + text).models[0].searches()
    assert len(searches) == len({repr(search) for search in searches}) == 2 * 3 * 2 * 2


def test_consistency_and_loss_are_axes_too(load: Load) -> None:
    text = "search: {loss: [{consistency: [ssim, {l1: 0.5, l2: 1}]}, {alpha: [0, 0.5, 1]}]}"
    losses = [search.loss for search in load(SMALL + text).models[0].searches()]
    assert [loss.alpha for loss in losses] == [1, 1, 0, 0.5, 1]
    assert [dict(loss.consistency) for loss in losses[:2]] == [{"ssim": 1.0}, {"l1": 0.5, "l2": 1}]


def test_huge_grid_is_refused_without_expanding(load: Load) -> None:
    seeds = list(range(1000))
    text = f"search: {{seed: {seeds}, steps: {seeds[1:]}, loss: {{alpha: {seeds}}}}}\n"
    started = time.monotonic()
    (issue,) = issues_of(load, SMALL + text)
    assert issue.startswith("s.yaml:5:9: search: a sweep has at most 100,000 points")
    assert "this one has 999,000,007;" in issue
    assert time.monotonic() - started < 5  # hang detector; takes well under a second


# --- what is refused -----------------------------------------------------------------------------

BROKEN = [
    ("targts: [1]", "6:1: targts: unknown key; valid are ", "Did you mean 'targets'?"),
    ("storage: 5", "6:10: storage: must be text (put it in quotes), got 5"),
    ("macs_convention: papers", "6:18: macs_convention: must be one of all, paper, got the text"),
    ("allow_unpinned: yes", "6:17: allow_unpinned: must be true or false, got the text 'yes'"),
    ("budget: {gpu_hours: 0}", "6:21: budget.gpu_hours: must be a number, above 0, got 0"),
    (
        "budget: {usd: 500}",
        "6:15: budget.usd: needs the price of a GPU hour: give budget.usd_per_gpu_hour too",
    ),
    (
        "budget: {wall_hours: no}",
        "6:22: budget.wall_hours: must be a number, above 0, got the text 'no'",
    ),
    ("budget: 5", "6:9: budget: must be a mapping (key: value), got 5"),
    ("objective: {speed: clip}", "6:20: objective.speed: must be one of latency, macs, got"),
    ("tracking: {url: x}", "6:12: tracking.url: unknown key", "Did you mean 'uri'?"),
    ("latency: {min_runs: 5}", "6:21: latency.min_runs: must be a whole number, at least 6"),
    (
        "latency: {warmup: 9, max_warmup: 8}",
        "6:34: latency.max_warmup: must be at least warmup (9)",
    ),
    ("latency: {batch_size: [8, 8]}", "6:27: latency.batch_size.1: is listed twice: 8"),
    (
        "resources: {latency: {gpus: 0, accelerator: A100}}",
        "6:45: resources.latency.accelerator: is a type of GPU, but the tasks take none",
    ),
    ("resources: {score: {accelerator: 5}}", "6:34: resources.score.accelerator: must be text"),
    (
        "resources: {search: {gpus: 0, gpu_memory_gb: 24}}",
        "6:46: resources.search.gpu_memory_gb: is memory of a GPU, but the tasks take none",
    ),
    ("resources: {search: {gpu: 1}}", "6:22: resources.search.gpu: unknown key"),
    ("resources: {search: {gpus: -1}}", "6:28: resources.search.gpus: must be a number, at least"),
    ("search: {steps: '500'}", "6:17: search.steps: must be a whole number, at least 1, got the"),
    ("search: {steps: true}", "6:17: search.steps: must be a whole number, at least 1, got true"),
    ("search: {steps: 5.0}", "6:17: search.steps: must be a whole number, at least 1, got 5.0"),
    ("search: {steps: 0}", "6:17: search.steps: must be a whole number, at least 1, got 0"),
    ("search: {seed: [0, -1]}", "6:20: search.seed.1: must be a whole number, at least 0, got -1"),
    ("search: {seed: 4294967296}", "6:16: search.seed: must be a whole number, at most 4294967295"),
    ("search: {seed: [0, 0]}", "6:20: search.seed.1: is listed twice: 0"),
    ("search: {seed: []}", "6:16: search.seed: must list 1 to 1000 values, got 0"),
    ("search: {strategy: dipg}", "6:20: search.strategy: must be one of", "Did you mean 'dipgo'?"),
    ("search: {loss: {alpha: .nan}}", "6:24: search.loss.alpha: must be a number, at least 0"),
    ("search: {loss: {alpha: [1, x]}}", "6:28: search.loss.alpha.1: must be a number, at least 0"),
    ("search: {loss: {tau: 1}}", "6:22: search.loss.tau: must be a number, at least 0 and below 1"),
    ("search: {loss: {gamma: 1}}", "6:24: search.loss.gamma: must be true or false, got 1"),
    ("search: {loss: {consistency: sim}}", "6:30: search.loss.consistency: must be one of ssim"),
    ("search: {loss: {consistency: {}}}", "6:30: search.loss.consistency: needs a positive weight"),
    ("search: {loss: {aplha: 1}}", "6:17: search.loss.aplha: unknown key", "mean 'alpha'?"),
    ("search: {calibration: {images: 0}}", "6:32: search.calibration.images: must be a whole"),
    ("search: {postprocess: best}", "6:23: search.postprocess: must be one of budget, paper"),
    ("search: {learning_rate: 0}", "6:25: search.learning_rate: must be a number, above 0, got 0"),
    ("baselines: [uniforn]", "6:13: baselines.0: must be one of", "Did you mean 'uniform'?"),
    ("baselines: [random, random]", "6:21: baselines.1: is listed twice: the text 'random'"),
    ("baselines: [random, {random: {draws: 2}}]", "6:12: baselines: lists random twice"),
    ("baselines: [{random: {draws: 0}}]", "6:30: baselines.0.random.draws: must be a whole"),
    ("baselines: [{uniform: {draws: 2}}]", "6:24: baselines.0.uniform.draws: unknown key"),
    ("evaluate: {images: 1}", "6:20: evaluate.images: must be at least 2 for fid, got 1", "kid"),
    ("evaluate: {images: 3}", "6:20: evaluate.images: must be at least 4 for kid, got 3"),
    ("evaluate: {images: [9, 9]}", "6:24: evaluate.images.1: is listed twice"),
    ("evaluate: {images: [9]}", "6:20: evaluate.images: must list 2 to"),
    ("evaluate: {images: [9, 8]}", "6:20: evaluate.images: must list 2 to 5 rising numbers"),
    ("evaluate: {rungs: [4, 5, 6, 7, 8, 9]}", "6:19: evaluate.rungs: must list 2 to 5 rising"),
    ("evaluate: {images: [7, 9]}", "6:20: evaluate.images: must be at least 8 for kid, got 7"),
    ("evaluate: {rungs: [7, 9]}", "6:19: evaluate.rungs: must be at least 8 for kid, got 7"),
    (
        "evaluate: {images: [3, 9], race: [psnr]}",
        "6:20: evaluate.images: must be at least 4 for kid",
    ),
    (
        "evaluate: {images: [1, 9], metrics: [psnr]}",
        "6:20: evaluate.images: must be at least 2 for",
    ),
    ("evaluate: {rungs: 9}", "6:19: evaluate.rungs: must be a list"),
    ("evaluate: {images: 9, rungs: [4, 9]}", "6:23: evaluate.rungs: says the same as images"),
    (
        "evaluate: {images: [4, 9], race: [fid]}",
        "6:34: evaluate.race: a race can look at kid, clip",
    ),
    ("evaluate: {images: [4, 9], race: [lpips]}", "6:34: evaluate.race: a race can look at kid"),
    ("evaluate: {race: [kid]}", "6:12: evaluate.race: is for races"),
    ("evaluate: {images: [4, 9], metrics: [fid]}", "6:20: evaluate.images: a race judges fid by"),
    ("evaluate: {metrics: [fid, fdi]}", "6:27: evaluate.metrics.1: must be one of fid, kid"),
    ("evaluate: {prompts: none.txt}", "6:21: evaluate.prompts: no such file: none.txt"),
    (
        "evaluate: {prompts: bundled:tests}",
        "6:21: evaluate.prompts: must be bundled:calibration or",
    ),
    ("evaluate: {prompts: bundled:calibration}", "6:21: evaluate.prompts: are those of search"),
    ("evaluate: {prompts: labels}", "6:21: evaluate.prompts: model tiny-sd takes text; give a"),
    ("evaluate: {prompts: {hub: x}}", "6:27: evaluate.prompts.hub: must be a hub id (owner/name)"),
    ("evaluate: {prompts: {}}", "6:21: evaluate.prompts: needs one of hub, file, labels"),
    ("evaluate: {reference: densest}", "6:23: evaluate.reference: must be dense, {folder: PATH}"),
    ("evaluate: {reference: {folder: no}}", "6:32: evaluate.reference.folder: no such folder: no"),
    ("evaluate: {scorers: {features: x}}", "6:32: evaluate.scorers.features: must be one of"),
    ("evaluate: {seed: 1, seed: 2}", "6:21: evaluate.seed: key 'seed' is already given on line 6"),
]


@pytest.mark.parametrize("line", ["images: [8, 16, 32]", "rungs: [8, 16, 32]"])
def test_images_may_be_the_rungs_of_a_race(load: Load, line: str) -> None:
    evaluate = load(SMALL + f"evaluate: {{{line}}}\n").models[0].evaluate
    assert (evaluate.rungs, evaluate.images) == ((8, 16, 32), 32)


def test_rungs_may_be_given_on_the_command_line(load: Load) -> None:
    load(SMALL)
    sweep = load_sweep("s.yaml", ["evaluate.images=[64,256]"])
    assert sweep.models[0].evaluate.rungs == (64, 256)


def test_race_may_look_at_some_metrics(load: Load) -> None:
    evaluate = load(SMALL + "evaluate: {images: [8, 16], race: [psnr, kid]}\n").models[0].evaluate
    assert evaluate.race == ("psnr", "kid")


def test_one_number_of_images_is_no_race(load: Load) -> None:
    assert load(SMALL + "evaluate: {images: 8}\n").models[0].evaluate.rungs == ()


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case[0])
def test_broken_line_is_reported_at_its_place(load: Load, case: tuple[str, ...]) -> None:
    line, *parts = case
    text = "# one\n" + SMALL + line + "\n"
    first = issues_of(load, text)
    assert first[0].startswith(f"s.yaml:{parts[0]}")
    assert all(part in "\n".join(first) for part in parts)


MODELS = [
    ("[]", "3:9: models: must be a list of 1 to 500 models, got a list"),
    ("tiny-sd", "3:9: models: must be a list of 1 to 500 models, got the text 'tiny-sd'"),
    ("[tiny-sdd]", "3:10: models.0: 'tiny-sdd' is no bundled model, hub id", "mean 'tiny-sd'?"),
    ("[5]", "3:10: models.0: must be a mapping (key: value), got 5"),
    ("[{name: a}]", "3:10: models.0.id: is missing; a bundled model (tiny-sd, tiny-dit), a hub id"),
    ("[{id: tiny-sd, nam: a}]", "3:24: models.0.nam: unknown key", "Did you mean 'name'?"),
    ("[{id: tiny-sd, name: a b}]", "3:30: models.0.name: must be up to 100 letters, digits"),
    ("[{id: tiny-sd, dtype: half}]", "3:31: models.0.dtype: must be one of float32, float16"),
    ("[{id: tiny-sd, revision: main}]", "3:34: models.0.revision: only models on the hub have"),
    ("[{id: tiny-sd, family: dit}]", "3:15: models.0.id: tiny-sd is of family sd, not dit"),
    ("[{id: a/b}]", "3:15: models.0.id: a/b is not among the known models; give its `family`"),
    ("[{id: a/b, family: sdx}]", "3:28: models.0.family: must be one of sd, sdxl, dit"),
    ("[./nowhere]", "3:10: models.0: no pipeline in folder ./nowhere: model_index.json cannot"),
    ("[tiny-sd, tiny-sd]", "3:19: models.1: the name 'tiny-sd-ddim-10' is already taken"),
    ("[{id: tiny-sd, sampler: {step: 5}}]", "3:34: models.0.sampler.step: unknown key"),
    ("[{id: tiny-sd, sampler: {steps: 0}}]", "3:41: models.0.sampler.steps: must be a whole"),
    ("[{id: tiny-sd, sampler: {scheduler: dim}}]", "3:45: models.0.sampler.scheduler: must be one"),
    ("[{id: tiny-sd, sampler: {spacing: even}}]", "3:43: models.0.sampler.spacing: must be one of"),
    ("[{id: tiny-sd, sampler: {guidance_scale: -1}}]", "3:50: models.0.sampler.guidance_scale: mu"),
    (
        "[{id: tiny-sd, sampler: {scheduler: flow_match_euler}}]",
        "3:45: models.0.sampler.scheduler: flow_match_euler does not fit models of family sd",
        "take one of ddim, pndm, dpm++2m, unipc, euler, heun, lcm",
    ),
    (
        "[{id: tiny-dit, sampler: {scheduler: euler}}]",
        "3:46: models.0.sampler.scheduler: euler does not fit models of family dit",
    ),
    (
        "[{id: tiny-sd, sampler: {scheduler: lcm, steps: 60}}]",
        "3:57: models.0.sampler.steps: lcm takes at most 50 steps, got 60",
    ),
    (
        "[{id: tiny-sd, sampler: {scheduler: lcm, steps: 6, spacing: leading}}]",
        "3:69: models.0.sampler.spacing: lcm does not follow the spacing leading",
    ),
    (
        "[{id: tiny-sd, sampler: {steps: 61, spacing: trailing}}]",
        "3:41: models.0.sampler.steps: trailing spacing makes 62 timesteps of 61 steps",
    ),
    (
        "[{id: tiny-sd, sampler: {timesteps: [900, 500]}}]",
        "3:45: models.0.sampler.timesteps: ddim takes steps alone",
        "timesteps are for dpm++2m, euler, heun, lcm",
    ),
    (
        "[{id: tiny-dit, sampler: {scheduler: dpm++2m, timesteps: [900, 500]}}]",
        "3:66: models.0.sampler.timesteps: DiTPipeline takes none: it takes steps alone",
    ),
    (
        "[{id: tiny-sd, sampler: {scheduler: euler, timesteps: [5, 9]}}]",
        "3:67: models.0.sampler.timesteps.1: must be below the entry before (5), got 9",
    ),
    (
        "[{id: tiny-sd, sampler: {scheduler: euler, timesteps: [1000, 5]}}]",
        "3:64: models.0.sampler.timesteps.0: must be a whole number, at most 999, got 1000",
    ),
    (
        "[{id: tiny-sd, sampler: {scheduler: euler, timesteps: [9, 5], steps: 3}}]",
        "3:78: models.0.sampler.steps: must be the number of timesteps, 2, or be left out, got 3",
    ),
    (
        "[{id: tiny-sd, sampler: {scheduler: euler, timesteps: [9, 5], spacing: leading}}]",
        "3:63: models.0.sampler.timesteps: excludes spacing",
    ),
    (
        "[{id: tiny-sd, sampler: {scheduler: euler, sigmas: [2, 1]}}]",
        "3:60: models.0.sampler.sigmas: euler takes timesteps; sigmas are for flow_match_euler",
    ),
    (
        "[{id: tiny-sd, resolution: 65}]",
        "3:36: models.0.resolution: must be a multiple of 8 pixels, such as 64 or 72, got 65",
    ),
    (
        "[{id: stabilityai/stable-diffusion-3-medium-diffusers, resolution: 3088}]",
        "1:1: evaluate.prompts: is missing",
        "models.0.resolution: must be at most 3072 pixels",
    ),
    (
        "[{id: black-forest-labs/FLUX.1-dev, sampler: {sigmas: [1.5, 0.4]}}]",
        "1:1: evaluate.prompts: is missing",
        "models.0.sampler.sigmas: go from 1 (noise alone) towards 0 (the image), got 1.5",
    ),
    (
        "[{id: tiny-dit, resolution: 64}]",
        "3:37: models.0.resolution: DiTPipeline makes images of the model's own size",
    ),
    (
        "[{id: tiny-sd, overrides: {search: {granularity: layers}}}]",
        "3:58: models.0.overrides.search.granularity: must be one of block, layer",
    ),
    ("[{id: tiny-sd, sampler: {steps: 1}}]", "4:11: targets.0: must be at most 0: the first of 1"),
    ("[{id: tiny-sd, overrides: {target: [1]}}]", "3:36: models.0.overrides.target: unknown key"),
    ("[{id: tiny-sd, overrides: {targets: [1]}}]", "3:46: models.0.overrides.targets.0: must be"),
    ("[{id: facebook/DiT-XL-2-256}]", "3:10: models.0.revision: must name a commit (40 hex"),
]


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case[0])
def test_broken_model_is_reported_at_its_place(load: Load, case: tuple[str, ...]) -> None:
    models, *parts = case
    issues = issues_of(load, HEAD + f"models: {models}\ntargets: [0.5]\n")
    assert issues[0].startswith(f"s.yaml:{parts[0]}")
    assert all(part in "\n".join(issues) for part in parts)


@pytest.mark.parametrize("targets", ["[1]", "[-0.1]", "[0.5, 0.5]", "[]", "0.5", "[x]", "[true]"])
def test_impossible_targets_are_refused(load: Load, targets: str) -> None:
    (issue,) = issues_of(load, SMALL.replace("[0.5]", targets))
    assert issue.startswith("s.yaml:4:") and ": targets" in issue


def test_missing_keys_are_all_named(load: Load) -> None:
    fields = [issue.split(": ")[1] for issue in issues_of(load, "storage: x")]
    assert fields == ["models", "name", "schema_version", "targets"]


def test_all_errors_are_reported_at_once_in_the_order_of_the_file(load: Load) -> None:
    text = """\
schema_version: 2
nam: x
models:
  - {id: tiny-sd, name: a, sampler: {steps: ten}}
  - {id: nothing, overrides: {evaluate: {images: -1}}}
  - {id: tiny-dit, name: a}
targets: [0.5, 2]
search: {steps: 0}
"""
    found = [issue.split(": ")[:2] for issue in issues_of(load, text)]
    assert found == [
        ["s.yaml:1:1", "name"],
        ["s.yaml:1:17", "schema_version"],
        ["s.yaml:2:1", "nam"],
        ["s.yaml:4:45", "models.0.sampler.steps"],
        ["s.yaml:5:10", "models.1.id"],
        ["s.yaml:5:50", "models.1.overrides.evaluate.images"],
        ["s.yaml:6:26", "models.2.name"],
        ["s.yaml:7:16", "targets.1"],
        ["s.yaml:8:17", "search.steps"],
    ]


def test_hub_model_without_prompts_says_what_to_give(load: Load) -> None:
    issues = issues_of(load, SMALL.replace("tiny-sd", "{id: a/b, family: sd, name: x}"))
    assert "evaluate.prompts: is missing; x needs a file, {hub: owner/name}" in "\n".join(issues)


def test_knee_beats_the_trivial_baseline_unless_asked_otherwise(load: Load) -> None:
    assert load(SMALL).objective.knee == "beats_trivial"
    assert load(SMALL + "objective: {knee: any}\n").objective.knee == "any"
    (issue,) = issues_of(load, SMALL + "objective: {knee: best}\n")
    assert "objective.knee: must be one of beats_trivial, any, got" in issue


def test_unmeasured_objective_is_refused(load: Load) -> None:
    text = "evaluate: {metrics: [fid]}\nobjective: {quality: clip}\n"
    (issue,) = issues_of(load, SMALL + text)
    assert issue.startswith("s.yaml:6:22: objective.quality: clip is not in evaluate.metrics")
    objective = load(SMALL + text.splitlines()[0]).objective
    assert (objective.speed, objective.quality) == ("macs", "fid")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"# hi\n", "is empty"), (b"a: \xff", ":1:4: not UTF-8: byte 0xff")]
    + [(b"[1, 2]", ":1:1: must be a mapping"), (b"hello", ":1:1: must be a mapping")],
)
def test_unreadable_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(content)
    with pytest.raises(SweepFileError, match=message):
        load_sweep(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepFileError, match="cannot be read: No such file"):
        load_sweep(tmp_path / "none.yaml")
    with pytest.raises(SweepFileError, match="cannot be read: Is a directory"):
        load_sweep(tmp_path)


# --- whatever is in the file, there is a sweep or a list of errors -------------------------------

VALUES = st.sampled_from(
    [None, True, -1, 0, 1, 10**18, 0.5, float("nan"), "", "x", "~nobody", "\0", "a/b", "é" * 5000]
    + [[], {}, [[]], [{}], {"x": 1}, ["x"], {"hub": "a/b"}, [0.1, 0.2], {"random": None}]
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items: Any = []
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    return [path] * bool(path) + [
        deeper for name, item in items for deeper in places(item, (*path, name))
    ]


def mutate(document: Any, path: tuple[Any, ...], new: Any, how: str) -> None:
    parent = document
    for name in path[:-1]:
        parent = parent[name]
    if how == "replace" or isinstance(parent, list):
        parent[path[-1]] = new
    elif how == "rename":
        parent[f"{path[-1]}x"] = parent.pop(path[-1])
    else:
        del parent[path[-1]]


@given(st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_mutated_sweep_loads_or_lists_its_errors(tmp_path: Path, data: st.DataObject) -> None:
    source = data.draw(st.sampled_from(SWEEPS))
    document = copy.deepcopy(yaml.safe_load(source.read_text(encoding="utf-8")))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(document)))
        how = data.draw(st.sampled_from(["replace", "rename", "delete"]))
        new = copy.deepcopy(data.draw(VALUES))  # a later mutation may change it
        mutate(document, path, new, how)
    target = tmp_path / "mutated.yaml"
    target.write_text(yaml.safe_dump(document), encoding="utf-8")
    try:
        assert load_sweep(target).digest
    except SweepFileError as error:
        assert error.errors
