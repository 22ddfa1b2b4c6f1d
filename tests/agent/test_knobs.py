"""No knob is dead: a changed value of any of them changes something that is built, written or printed.

Each entry of the table names what must differ. What it is measured on is a whole trial, from data to artifacts, with
nothing replaced but the tracker (the one that keeps everything in memory).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY
from torch.optim.optimizer import register_optimizer_step_pre_hook

from agent.config import TrialConfig, build_config
from agent.lottery import run_chain
from agent.tracking.environment import find_run
from agent.trial import run_trial
from diffusion_core.checkpoint import CheckpointError, list_checkpoints, read_checkpoint
from diffusion_core.config import PRESETS, ConfigError, flatten, list_knobs
from diffusion_core.data.datasets import Dataset, Images, load_data
from diffusion_core.evaluation.classifier.classifier import Classifier
from diffusion_core.evaluation.classifier.network import ClassifierNetwork
from diffusion_core.evaluation.classifier.training import RECIPES
from diffusion_core.hardware import has_bf16
from diffusion_core.model import compilation
from diffusion_core.model.unet import UNet, build_network
from diffusion_core.registry import Choice
from diffusion_core.sampling import generation
from diffusion_core.terminal import progress
from diffusion_core.tracking import MemoryTracker
from diffusion_core.training import trainer

BASE: dict[str, Any] = TINY | {
    # One resolution: hardly a network any more, and hundreds are built here.
    "model.channel_multipliers": [1],
    "model.attention_resolutions": [],
    "diffusion.schedule": "linear",
    "diffusion.timesteps": 20,
    "train.steps": 4,
    "train.lr": 0.01,
    "ema.decay": 0.5,
    "ema.warmup": False,
    "sample.steps": 3,
    "sample.every": 0,
    "eval.every": 0,
    "eval.val_images": 16,
    "eval.classifier": "none",
    "checkpoint.every": 0,
    "log.every": 2,
}

FOLDER = "<folder>"
"""In the table: the path of a folder of images that the tests make."""

CHECKPOINT = "<checkpoint>"
"""The checkpoint of a run of the base configuration."""

OTHER_FOLDER = "<other folder>"
"""Another one, whose images are inverted."""


NETWORK = "<network>"
"""A feature network that they make."""


@dataclass(frozen=True)
class Entry:
    """How a knob is shown to be alive.

    Attributes:
        value: other than in the base configuration.
        differs: observables that must differ.
        base: settings that the knob needs to matter; they hold on both sides.
        same: observables that must not differ: what the knob has no business with.
        why: what a reader may wonder about.
    """

    value: Any
    differs: tuple[str, ...]
    base: Mapping[str, Any] = field(default_factory=dict)
    same: tuple[str, ...] = ()
    why: str = ""


WEIGHTS = ("weights", "ema weights", "val/loss", "grid")
SAMPLING_ONLY = ("weights", "ema weights", "val/loss", "train rows")
# Late enough for the layers that start at zero to have grown: they would go first.
PRUNED = {"prune.method": "magnitude", "prune.step": 6, "train.steps": 8, "train.lr": 0.02}
GRADUAL = PRUNED | {"prune.method": "gradual", "prune.step": 1, "prune.until": 7, "prune.interval": 2}
RIGL = {"prune.method": "rigl", "prune.until": 3, "prune.interval": 1, "train.lr": 0.02}
LOTTERY = {"prune.method": "lottery", "prune.rounds": 1, "train.lr": 0.02}
NARROWED = {"prune.method": "structured", "prune.step": 2, "prune.calibration_batches": 4, "train.lr": 0.02}
DDPM = {"sample.sampler": "ddpm"}
KARRAS = {"diffusion.schedule": "karras", "diffusion.prediction": "edm"}
AVERAGES = {"ema.power_widths": [0.1], "ema.average_from": 1}
BY_FOLDER = {"data.name": "folder", "data.path": FOLDER, "data.image_size": 8}
# So slow that the training loss goes up and down with the batches (here the first is lowest) while the validation loss,
# with noise that never changes, goes down a little with every step.
JUDGED = {"checkpoint.every": 1, "eval.every": 1, "log.every": 1, "train.lr": 1e-5, "seed": 2}
IN_FEATURES = {"eval.figures": ["frechet"], "eval.extractors": ["classifier"], "eval.num_images": 20}
OFTEN = {"checkpoint.every": 1, "checkpoint.upload": True}

STUDENT = ("weights", "ema weights", "grid")
TUNED = {"steps.method": "consistency", "checkpoint.best_metric": "train/loss", "train.steps": 6}
HALVED = TUNED | {"steps.method": "progressive", "steps.start": 2, "steps.target": 1}

TABLE: dict[str, Entry] = {
    "seed": Entry(1, (*WEIGHTS, "train rows"), same=("shapes", "val images")),
    "draws": Entry(1, (*WEIGHTS, "train rows"), same=("shapes", "val images")),
    "data.name": Entry("folder", ("train images", "val images", "classes", *WEIGHTS), {**BY_FOLDER, "data.name": None}),
    "data.path": Entry(OTHER_FOLDER, ("train images", "val images", *WEIGHTS), BY_FOLDER, same=("classes", "shapes")),
    "data.image_size": Entry(16, ("train images", "val images", "image shape", "macs", *WEIGHTS)),
    "data.horizontal_flip": Entry(True, WEIGHTS, same=("train images", "val images")),
    "data.val_fraction": Entry(0.5, ("train images", "val images", *WEIGHTS)),
    "model.channels": Entry(16, ("shapes", *WEIGHTS)),
    "model.channel_multipliers": Entry([1, 1], ("shapes", *WEIGHTS)),
    "model.num_res_blocks": Entry(2, ("shapes", *WEIGHTS)),
    "model.attention_resolutions": Entry([8], ("shapes", *WEIGHTS)),
    "model.num_heads": Entry(2, WEIGHTS, same=("shapes",)),
    "model.head_channels": Entry(4, WEIGHTS, same=("shapes",)),
    "model.embedding_channels": Entry(12, ("shapes", *WEIGHTS)),
    "model.frequency_shift": Entry(0.0, WEIGHTS, same=("shapes",)),
    "model.time_order": Entry("cos_sin", WEIGHTS, same=("shapes",)),
    "model.downsample_padding": Entry("both", WEIGHTS, {"model.channel_multipliers": [1, 1]}, same=("shapes",)),
    "model.dropout": Entry(0.5, WEIGHTS, same=("shapes",)),
    "model.norm_groups": Entry(2, WEIGHTS, same=("shapes",)),
    "model.norm_epsilon": Entry(0.01, WEIGHTS, same=("shapes",)),
    "model.conditioning": Entry("scale_shift", ("shapes", *WEIGHTS)),
    "model.self_conditioning": Entry(True, ("shapes", *WEIGHTS)),
    "model.learned_variance": Entry(True, ("shapes", *WEIGHTS)),
    "model.class_conditional": Entry(False, ("shapes", *WEIGHTS)),
    "diffusion.schedule": Entry("cosine", WEIGHTS),
    "diffusion.timesteps": Entry(30, WEIGHTS),
    "diffusion.beta_start": Entry(0.001, WEIGHTS),
    "diffusion.beta_end": Entry(0.01, WEIGHTS),
    "diffusion.logsnr_shift": Entry(1.0, WEIGHTS, same=("shapes",)),
    "diffusion.zero_terminal_snr": Entry(
        True, WEIGHTS, {"diffusion.prediction": "v", "diffusion.beta_end": 0.005}, same=("shapes",)
    ),
    "diffusion.sigma_min": Entry(0.1, WEIGHTS, KARRAS),
    "diffusion.sigma_max": Entry(20.0, WEIGHTS, KARRAS),
    "diffusion.prediction": Entry("v", WEIGHTS, same=("shapes",)),
    "diffusion.loss": Entry("l1", WEIGHTS),
    "diffusion.huber_delta": Entry(0.1, WEIGHTS, {"diffusion.loss": "huber"}),
    "diffusion.weighting": Entry("min_snr", WEIGHTS),
    "diffusion.min_snr_gamma": Entry(1.0, WEIGHTS, {"diffusion.weighting": "min_snr"}),
    "diffusion.p2_gamma": Entry(0.5, WEIGHTS, {"diffusion.weighting": "p2"}),
    "diffusion.timestep_sampling": Entry("lognormal", WEIGHTS),
    "diffusion.lognormal_mean": Entry(0.0, WEIGHTS, {"diffusion.timestep_sampling": "lognormal"}),
    "diffusion.lognormal_std": Entry(0.5, WEIGHTS, {"diffusion.timestep_sampling": "lognormal"}),
    "diffusion.vlb_weight": Entry(0.1, WEIGHTS, {"model.learned_variance": True}),
    "diffusion.offset_noise": Entry(0.5, WEIGHTS),
    "upsample.factor": Entry(2, ("shapes", *WEIGHTS)),
    "upsample.noise": Entry(0.9, WEIGHTS, {"upsample.factor": 2}, same=("shapes",)),
    "upsample.sample_noise": Entry(0.2, ("val/loss", "grid"), {"upsample.factor": 2}, same=("weights", "train rows")),
    "train.steps": Entry(6, (*WEIGHTS, "last step")),
    "plugins": Entry(["plugin_of_a_test"], ("plugins",), why="a module that adds nothing is imported"),
    "train.batch_size": Entry(16, WEIGHTS),
    "train.accumulation": Entry(
        2, ("batches",), why="the gradient is the same but for rounding; what differs is the size of the parts"
    ),
    "train.lr": Entry(0.02, (*WEIGHTS, "learning rates")),
    "train.lr_schedule": Entry("cosine", (*WEIGHTS, "learning rates")),
    "train.warmup_steps": Entry(3, (*WEIGHTS, "learning rates")),
    "train.weight_decay": Entry(0.5, WEIGHTS),
    "train.beta2": Entry(0.5, WEIGHTS),
    "train.grad_clip": Entry(None, WEIGHTS, {"train.grad_clip": 0.01, "train.lr": 0.1}),
    "train.label_dropout": Entry(0.9, WEIGHTS),
    "train.compile": Entry("blocks", ("compiled",), why="the result is the same but for rounding"),
    "train.cuda_graphs": Entry(False, ("replayed",), why="a GPU alone records and replays"),
    "train.deterministic": Entry(True, ("only deterministic algorithms",), same=("weights",)),
    "train.precision": Entry("bf16", (*WEIGHTS, "precision")),
    "train.device": Entry("cuda", ("device",), why="without a GPU the trial is refused, and says so"),
    "ema.decay": Entry(0.9, ("ema weights", "val/loss", "grid"), same=("weights",)),
    "ema.warmup": Entry(True, ("ema weights", "val/loss", "grid"), same=("weights",)),
    "ema.power_widths": Entry([0.1], ("files", "artifacts"), same=WEIGHTS, why="a further average, in checkpoints"),
    "ema.average_from": Entry(1, ("files", "artifacts"), same=WEIGHTS, why="a further average, in checkpoints"),
    "ema.sampled": Entry("power", ("ema weights", "val/loss", "grid"), AVERAGES, same=("weights",)),
    "sample.sampler": Entry("ddpm", ("grid",), same=SAMPLING_ONLY),
    "sample.steps": Entry(5, ("grid", "frames"), same=SAMPLING_ONLY),
    "sample.spacing": Entry("quadratic", ("grid",), same=SAMPLING_ONLY),
    "sample.start_level": Entry(2.0, ("grid",), same=SAMPLING_ONLY),
    "sample.eta": Entry(1.0, ("grid",), same=SAMPLING_ONLY),
    "sample.variance": Entry("fixed_small", ("grid",), DDPM, same=SAMPLING_ONLY),
    "sample.guidance": Entry(3.0, ("grid",), {"train.lr": 0.1, "train.steps": 6}, same=SAMPLING_ONLY),
    "sample.guidance_interval": Entry(
        [0.0, 1.0],
        ("grid",),
        {"train.lr": 0.1, "train.steps": 6, "sample.guidance": 3.0},
        same=SAMPLING_ONLY,
    ),
    "sample.clip_x0": Entry(False, ("grid",), same=SAMPLING_ONLY),
    "sample.every": Entry(2, ("files", "grids")),
    "sample.per_class": Entry(2, ("grid size",), same=SAMPLING_ONLY),
    "sample.batch_size": Entry(3, ("batches",), same=(*SAMPLING_ONLY, "grid"), why="memory and speed, not the images"),
    "sample.cuda_graphs": Entry(
        False, ("replayed",), {"eval.classifier": "auto", "eval.num_images": 4}, why="a GPU alone records and replays"
    ),
    "sample.compile": Entry(
        "network",
        ("compiled for sampling",),
        {"sample.batch_size": 5},
        same=(*SAMPLING_ONLY, "grid"),
        why="the images are the same but for rounding",
    ),
    "eval.every": Entry(2, ("val/loss",), same=("weights",)),
    "eval.val_images": Entry(8, ("val/loss",), same=("weights", "grid")),
    "eval.classifier": Entry("network", ("figures",), same=("weights", "grid")),
    "eval.num_images": Entry(
        37, ("class agreement",), {"eval.classifier": "network", "eval.num_images": 20}, same=("weights",)
    ),
    "eval.consistency_images": Entry(4, ("figures",), PRUNED, same=("weights", "val/loss", "grid")),
    "eval.figures": Entry(["loss_by_timestep"], ("figures",), same=("weights", "val/loss", "grid")),
    "eval.extractors": Entry([NETWORK], ("figures",), IN_FEATURES, same=("weights", "val/loss", "grid")),
    "eval.reference": Entry("val", ("figures",), IN_FEATURES, same=("weights", "val/loss", "grid")),
    "eval.inception_weights": Entry(
        "nowhere/b.pth",
        ("missing",),
        {"eval.figures": ["frechet"], "eval.num_images": 2, "eval.inception_weights": "nowhere/a.pth"},
        same=("weights", "figures"),
        why="without weights training goes on and says what is missing",
    ),
    "checkpoint.every": Entry(1, ("files", "artifacts"), {"checkpoint.keep": 9}, same=("weights", "rows")),
    "checkpoint.keep": Entry(3, ("files",), OFTEN, same=("weights", "artifacts")),
    "checkpoint.best_metric": Entry("train/loss", ("best", "artifacts"), JUDGED, same=("weights", "rows")),
    "checkpoint.resume": Entry(False, ("second run",), {"checkpoint.every": 2}),
    "checkpoint.upload": Entry(False, ("artifacts",), same=("weights",)),
    "checkpoint.ttl_days": Entry(7, ("artifacts",), {"checkpoint.upload": True}, same=("weights", "files")),
    "log.every": Entry(1, ("train rows",), same=("weights", "val/loss", "grid")),
    "log.dir": Entry("somewhere/else", ("run folder",), same=("weights",)),
    "log.progress": Entry(True, ("stderr",), same=("weights",)),
    "preset": Entry("mnist", ("other knobs",)),
    "prune.method": Entry("magnitude", (*WEIGHTS, "zeros", "figures"), {"prune.step": 2}),
    "prune.keep": Entry(0.2, (*WEIGHTS, "zeros", "sparsity"), PRUNED),
    "prune.scope": Entry("layer", (*WEIGHTS, "masks"), PRUNED, same=("zeros", "shapes")),
    "prune.profile": Entry("erk", (*WEIGHTS, "masks"), PRUNED | {"prune.scope": "layer"}, same=("zeros", "shapes")),
    "prune.target": Entry("params", (*WEIGHTS, "widths"), NARROWED),
    "prune.importance": Entry("l1", (*WEIGHTS, "kept"), NARROWED, same=("widths",)),
    "prune.depth": Entry(0.5, (*WEIGHTS, "kept", "widths"), NARROWED),
    "prune.blocks": Entry(["middle.1"], (*WEIGHTS, "kept", "widths"), NARROWED),
    "prune.iterations": Entry(2, (*WEIGHTS, "kept"), NARROWED | {"prune.importance": "taylor"}),
    "prune.round_to": Entry(1, (*WEIGHTS, "widths"), NARROWED),
    "prune.widths": Entry("diffusers", (*WEIGHTS, "widths"), NARROWED),
    "prune.block_keep": Entry([1.0, 0.5, 0.5], (*WEIGHTS, "widths"), NARROWED),
    "prune.calibration_batches": Entry(2, (*WEIGHTS, "kept"), NARROWED | {"prune.importance": "taylor"}),
    "prune.threshold": Entry(0.9, (*WEIGHTS, "kept"), NARROWED | {"prune.importance": "diff_pruning"}),
    "init.checkpoint": Entry(CHECKPOINT, (*WEIGHTS, "parent"), same=("shapes",)),
    "init.artifact": Entry("model-nowhere", ("device",), why="without a W&B key the trial is refused, and says so"),
    "init.weights": Entry("model", WEIGHTS, {"init.checkpoint": CHECKPOINT}),
    "distill.output": Entry(1.0, (*WEIGHTS, "files"), NARROWED),
    "distill.features": Entry(1.0, (*WEIGHTS, "files"), NARROWED),
    "distill.checkpoint": Entry(CHECKPOINT, WEIGHTS, NARROWED | {"distill.output": 1.0}),
    "distill.artifact": Entry(
        "model-nowhere",
        ("device",),
        NARROWED | {"distill.output": 1.0},
        why="without a W&B key the trial is refused, and says so",
    ),
    "steps.method": Entry("progressive", STUDENT, TUNED | {"steps.start": 4}),
    "steps.target": Entry(1, ("grid",), TUNED, same=("weights", "ema weights"), why="how a student is sampled"),
    "steps.start": Entry(4, STUDENT, HALVED),
    "steps.step": Entry(1, STUDENT, TUNED),
    "steps.lr": Entry(0.05, (*STUDENT, "learning rates"), TUNED),
    "steps.guidance": Entry(3.0, STUDENT, TUNED),
    "steps.start_level": Entry(1.0, STUDENT, TUNED),
    "steps.loss": Entry("l2", STUDENT, TUNED),
    "steps.huber_c": Entry(5.0, STUDENT, TUNED),
    "steps.weighting": Entry("difference", STUDENT, TUNED),
    "steps.doublings": Entry(1, STUDENT, TUNED),
    "prune.step": Entry(5, (*WEIGHTS, "pruned at"), PRUNED),
    "prune.until": Entry(5, (*WEIGHTS, "pruned at"), GRADUAL),
    "prune.interval": Entry(3, WEIGHTS, GRADUAL, same=("pruned at", "sparsity")),
    "prune.regrow": Entry(0.9, (*WEIGHTS, "masks"), RIGL, same=("pruned at", "sparsity")),
    "prune.pattern": Entry("1:2", (*WEIGHTS, "masks"), {"prune.method": "n_of_m"}, same=("sparsity",)),
    "prune.rounds": Entry(2, (*WEIGHTS, "zeros", "sparsity"), LOTTERY),
    "prune.per_round": Entry(0.5, (*WEIGHTS, "zeros", "sparsity"), LOTTERY),
    "prune.rewind_step": Entry(2, (*WEIGHTS, "pruned at"), LOTTERY, same=("masks",)),
    "prune.control": Entry("reinit", WEIGHTS, LOTTERY, same=("masks", "sparsity")),
}


def sketch(index: int, label: int, invert: bool) -> Image.Image:
    """A tiny picture that no two classes share and that is not its own mirror image."""
    source = np.random.default_rng(100 * label + index)
    pixels = source.integers(0, 256, (12, 10, 3), dtype=np.uint8)
    pixels[:, : 2 + label] = 255 * (label % 2)
    return Image.fromarray(255 - pixels if invert else pixels)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Folders of images with one sub-folder a class, by the names that the table gives them."""
    paths = {}
    for name, invert in ((FOLDER, False), (OTHER_FOLDER, True)):
        root = tmp_path_factory.mktemp("images")
        for label, animal in enumerate(("cat", "dog", "eel")):
            (root / animal).mkdir()
            for index in range(8):
                sketch(index, label, invert).save(root / animal / f"{index}.png")
        paths[name] = str(root)
    network = tmp_path_factory.mktemp("network") / "net.safetensors"
    Classifier(ClassifierNetwork(1, 10, 2).eval(), "other", 0.1, "", RECIPES["tiny"]).save(network)
    run = tmp_path_factory.mktemp("run")
    config = build_config(BASE, {"seed": 7})
    run_trial(config, MemoryTracker(), dataset=cached_data(config), folder=run, run_id="r")
    return paths | {str([NETWORK]): [str(network)], CHECKPOINT: str(run)}


def digest(*parts: Any) -> str:
    """A hash of tensors, arrays and plain values."""
    total = hashlib.sha256()
    for part in parts:
        array = part.detach().contiguous().numpy() if isinstance(part, torch.Tensor) else part
        total.update(array.tobytes() if isinstance(array, np.ndarray) else repr(array).encode())
    return total.hexdigest()[:16]


def images_digest(images: Images) -> tuple[int, str]:
    return len(images), digest(images.images_NCHW, images.labels_N)


@dataclass(frozen=True)
class Observed:
    """What can be seen of a trial from outside, by name."""

    observables: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.observables[name]


UNSTEADY = ("train/images_per_second",)
"""Figures that differ from one run of the same configuration to the next."""


def steady(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in UNSTEADY and not isinstance(value, Path)}


def shows(images_BCHW: torch.Tensor) -> bool:
    """Whether there is anything to see."""
    return images_BCHW.device.type != "meta" and bool(images_BCHW.any())


def observe(
    config: TrialConfig, folder: Path, twice: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Observed:
    """Run a trial, if wanted a second time in the same folder, and write down all that can be seen of it."""
    seen: dict[str, Any] = {"other knobs": {key: value for key, value in flatten(config).items() if key != "preset"}}
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_RUN_ID", "r")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    run_id, run_folder = find_run(config.log.dir)
    seen["run folder"] = str(run_folder)
    dataset = cached_data(config)
    seen["train images"], seen["val images"] = images_digest(dataset.train), images_digest(dataset.val)
    seen["classes"] = dataset.class_names
    network = build_network(config, dataset.num_classes)
    seen["shapes"] = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}

    tracker = MemoryTracker()
    capsys.readouterr()
    batches: list[int] = []
    compiled: list[str] = []
    for_sampling: list[str] = []

    def compile_network(network: UNet, how: str) -> None:
        compiled.append(how)
        compilation.compile_network(network, how)

    def compiled_network(network: UNet) -> Callable[..., torch.Tensor]:
        for_sampling.append(type(network).__name__)
        return compilation.compiled(network)

    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(trainer, "compile_network", compile_network)
    monkeypatch.setattr(generation, "compiled", compiled_network)
    monkeypatch.setattr(compilation, "BACKEND", "eager")  # The compiler proper takes minutes on a processor.
    algorithms: set[bool] = set()
    replayed: list[tuple[str, bool]] = []
    for module in (trainer, generation):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "is_replayed", lambda wanted, *_, name=name: replayed.append((name, wanted)))
    with (
        torch.nn.modules.module.register_module_forward_pre_hook(
            # Nothing but zeros is shown where time and memory of a pass are measured, as often as there is time for.
            lambda module, inputs: (
                batches.append(len(inputs[0])) if type(module).__name__ == "UNet" and shows(inputs[0]) else None
            )
        ),
        register_optimizer_step_pre_hook(lambda *_: algorithms.add(torch.are_deterministic_algorithms_enabled())),
    ):
        try:
            # One tracker sees all rounds of a chain.
            chain = partial(run_chain, open_tracker=lambda *_: tracker)
            run = chain if config.prune.method == "lottery" else run_trial
            result = run(config, tracker, dataset=dataset, folder=run_folder, run_id=run_id)
        except (ConfigError, CheckpointError) as error:
            return Observed(seen | {"device": str(error)})
    seen["batches"] = batches
    seen["compiled for sampling"] = for_sampling
    seen["plugins"] = [name for name in config.plugins if name in sys.modules]
    seen["replayed"] = sorted(set(replayed))
    seen["compiled"], seen["only deterministic algorithms"] = compiled, algorithms
    told = capsys.readouterr().err
    seen["stderr"] = "training:" in told
    seen["missing"] = [line for line in told.splitlines() if "no figures in features" in line]
    if twice:
        second = MemoryTracker()
        try:
            run_trial(config, second, dataset=dataset, folder=run_folder, run_id=run_id)
            more = len(second.rows) - len(tracker.rows)  # A tracker that knows nothing is told what came before.
            seen["second run"] = f"goes on and trains {more} rows more"
        except ConfigError as error:
            seen["second run"] = str(error)

    seen["device"], seen["precision"] = tracker.figures["system/device"], tracker.figures["system/precision"]
    seen["macs"] = result.figures["model/macs"]
    seen["figures"] = sorted(result.figures)
    seen["sparsity"] = result.figures.get("prune/sparsity")
    seen["last step"], seen["best"] = result.step, result.best_checkpoint.name
    seen["rows"] = [steady(row) for row in tracker.rows]
    seen["train rows"] = [
        {key: value for key, value in row.items() if key == "step" or key.startswith("train/")}
        for row in seen["rows"]
        if "train/loss" in row
    ]
    seen["learning rates"] = [row["train/lr"] for row in seen["train rows"]]
    seen["val/loss"] = [(row["step"], row["val/loss"]) for row in seen["rows"] if "val/loss" in row]
    seen["class agreement"] = [row["eval/class_agreement"] for row in seen["rows"] if "eval/class_agreement" in row]
    seen["artifacts"] = [
        (artifact["name"], artifact["aliases"], artifact["ttl_days"], artifact["files"].keys())
        for artifact in tracker.artifacts
    ]
    seen["files"] = sorted(str(path.relative_to(run_folder)) for path in run_folder.rglob("*"))

    last_run = result.best_checkpoint.parents[1]  # Of a chain: the last round's.
    checkpoint = read_checkpoint(list_checkpoints(last_run / "checkpoints")[-1])
    for name, part in (("weights", "model"), ("ema weights", "ema")):
        tensors = checkpoint.tensors(part)
        seen[name] = digest(*(item for pair in sorted(tensors.items()) for item in pair))
    seen["zeros"] = sum(int((tensor == 0).sum()) for tensor in checkpoint.tensors("model").values())
    seen["image shape"] = checkpoint.shape_CHW
    seen["pruned at"] = checkpoint.metadata["extra"].get("pruning", [{}])[-1].get("step")
    record = checkpoint.metadata["extra"].get("pruning", [{}])[-1]
    seen["kept"], seen["widths"] = record.get("details"), checkpoint.metadata["structure"]
    seen["parent"] = checkpoint.metadata["extra"].get("parent")
    seen["masks"] = digest(*checkpoint.tensors("masks").values()) if "masks" in checkpoint.parts else None

    grids = sorted((last_run / "samples").glob("samples-*.png"))
    seen["grids"] = len(grids)
    with Image.open(grids[-1]) as grid:
        seen["grid size"], seen["grid"] = grid.size, digest(np.asarray(grid))
    with Image.open(sorted((last_run / "samples").glob("diffusion-*.gif"))[-1]) as gif:
        seen["frames"] = getattr(gif, "n_frames", 1)
    return Observed(seen)


DATA: dict[str, Dataset] = {}
OBSERVED: dict[str, Observed] = {}


def cached_data(config: TrialConfig) -> Dataset:
    key = config.data.model_dump_json()
    if key not in DATA:
        DATA[key] = load_data(config.data)
    return DATA[key]


def settings_of(knob: str, entry: Entry, folders: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of both sides: they differ in the knob alone."""
    base = BASE | dict(entry.base)
    changed = base | {knob: entry.value}
    if knob == "data.name":  # A folder needs its path, and the digits refuse one.
        base = base | {"data.name": "digits", "data.path": None}
    if knob == "preset":  # A preset is what all that is not given falls back to.
        base, changed = {}, {"preset": entry.value}
    return tuple({key: folders.get(str(value), value) for key, value in side.items()} for side in (base, changed))  # type: ignore[return-value]


@pytest.fixture
def seen(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def look(settings: Mapping[str, Any], *, anew: bool = False, twice: bool = False) -> Observed:
        key = json.dumps([settings, twice], sort_keys=True)
        if anew or key not in OBSERVED:
            folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            OBSERVED[key] = observe(build_config(settings), folder, twice, capsys, monkeypatch)
        return OBSERVED[key]

    return look


def test_the_table_covers_exactly_the_knobs_that_there_are() -> None:
    assert sorted(TABLE) == sorted(key for key, _ in list_knobs(TrialConfig))


def test_every_entry_changes_its_knob_alone(folders: dict[str, str]) -> None:
    for knob, entry in TABLE.items():
        base, changed = (flatten(build_config(side)) for side in settings_of(knob, entry, folders))
        differing = {key for key in base if base[key] != changed[key]}
        allowed = {"data.name": {"data.name", "data.path"}, "preset": {"preset", *PRESETS["mnist"]}}.get(knob, {knob})
        assert differing == allowed, knob
        assert entry.differs, knob


@pytest.mark.parametrize("knob", [knob for knob in TABLE if knob != "preset"])
def test_no_knob_is_dead(knob: str, folders: dict[str, str], seen: Any) -> None:
    entry = TABLE[knob]
    if knob == "train.device" and torch.cuda.is_available():
        pytest.skip("with a GPU it changes where the trial runs; see the tests for GPUs")
    twice = "second run" in entry.differs
    base, changed = (seen(side, twice=twice) for side in settings_of(knob, entry, folders))
    for name in entry.differs:
        assert base[name] != changed[name], f"{knob} does not change {name}: {base[name]!r}"
    for name in entry.same:
        assert base[name] == changed[name], f"{knob} changes {name}"


def test_the_preset_changes_the_knobs_that_it_names() -> None:
    base, changed = flatten(build_config({})), flatten(build_config({"preset": "mnist"}))
    for key, value in PRESETS["mnist"].items():
        assert base[key] != value, key
        assert changed[key] == value, key


@pytest.mark.parametrize(
    "extra", [{}, BY_FOLDER, DDPM, PRUNED, OFTEN], ids=["plain", "folder", "ddpm", "pruned", "often"]
)
def test_control_the_same_configuration_twice_shows_the_same(
    extra: Mapping[str, Any], folders: dict[str, str], seen: Any
) -> None:
    """Without this a difference between two values of a knob would prove nothing."""
    settings = {key: folders.get(str(value), value) for key, value in (BASE | dict(extra)).items()}
    first = seen(settings).observables
    second = seen(settings, anew=True).observables
    assert first is not second
    assert first == second


# Knobs whose effect needs more than "it differs"


def test_accumulation_splits_the_batch_and_leaves_the_gradient(seen: Any) -> None:
    whole, split = seen(BASE), seen(BASE | {"train.accumulation": 2})
    assert whole["batches"][:4] == [8] * 4
    assert split["batches"][:8] == [4] * 8
    assert split["val/loss"][0][1] == pytest.approx(whole["val/loss"][0][1], rel=1e-3)


def test_sampling_batch_size_is_what_the_network_is_given(seen: Any) -> None:
    # Ten images of three steps each, after four training batches and one of validation.
    assert seen(BASE)["batches"][5:8] == [10] * 3
    assert seen(BASE | {"sample.batch_size": 3})["batches"][5:17] == [3] * 9 + [1] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_device(seen: Any) -> None:
    assert seen(BASE)["device"] == "cpu"
    assert seen(BASE | {"train.device": "auto"})["device"] == "cpu"
    expected = "train.device = 'cuda': this machine has no usable GPU; expected auto or cpu"
    assert seen(BASE | {"train.device": "cuda"})["device"] == expected


def test_precision(seen: Any) -> None:
    names = ["fp32", "bf16", "fp16"]
    assert [seen(BASE | {"train.precision": name})["precision"] for name in names] == names
    automatic = seen(BASE | {"train.precision": "auto"})
    assert automatic["precision"] == ("bf16" if has_bf16(torch.device("cpu")) else "fp32")
    assert automatic["weights"] == seen(BASE | {"train.precision": automatic["precision"]})["weights"]


def test_resume(seen: Any) -> None:
    assert seen(BASE, twice=True)["second run"] == "goes on and trains 0 rows more"
    assert "checkpoint.resume = False" in seen(BASE | {"checkpoint.resume": False}, twice=True)["second run"]


def test_log_dir_and_progress(seen: Any) -> None:
    assert seen(BASE)["run folder"] == "runs/r"
    assert seen(BASE | {"log.dir": "somewhere/else"})["run folder"] == "somewhere/else"
    assert seen(BASE)["stderr"] is False
    assert seen(BASE | {"log.progress": True})["stderr"] is True


def test_best_metric_decides_which_checkpoint_is_best(seen: Any) -> None:
    settings = BASE | JUDGED
    for metric in ("val/loss", "train/loss"):
        trial = seen(settings | {"checkpoint.best_metric": metric})
        assert len(trial["rows"]) == 4
        best = min(trial["rows"], key=lambda row: row[metric])["step"]
        assert trial["best"] == f"step-{best:08d}"


@pytest.mark.parametrize(("keep", "every", "kept"), [(1, 1, 1), (2, 1, 2), (3, 1, 3), (9, 1, 4), (2, 2, 2), (9, 0, 1)])
def test_as_many_checkpoints_are_kept_as_was_asked(keep: int, every: int, kept: int, seen: Any) -> None:
    # The only evaluation is the last one, so that the best checkpoint is the newest.
    trial = seen(BASE | {"checkpoint.keep": keep, "checkpoint.every": every})
    assert (
        len([name for name in trial["files"] if name.startswith("checkpoints/step-") and name.count("/") == 1]) == kept
    )


def choices(knob: str) -> list[str]:
    """All that a knob offers."""
    field = dict(list_knobs(TrialConfig))[knob]
    named = [choice.values() for choice in field.metadata if isinstance(choice, Choice)]
    return named[0] if named else list(get_args(field.annotation))


def test_every_schedule_of_the_rate_and_every_choice_is_another_one(seen: Any) -> None:
    """Each pair of choices of a knob differs, not only the two of the table."""
    variants: dict[str, tuple[str, dict[str, Any], list[str]]] = {
        "prune.method": (
            "weights",
            {"prune.step": 1, "prune.rounds": 1, "prune.interval": 1, "prune.calibration_batches": 2},
            choices("prune.method"),
        ),
        "prune.profile": (
            "masks",
            PRUNED | {"prune.scope": "layer", "prune.block_keep": [0.1, 0.5, 0.9]},
            choices("prune.profile"),
        ),
        "prune.control": ("weights", LOTTERY, choices("prune.control")),
        "eval.classifier": ("figures", {"sample.guidance": 2.0}, ["none", "network"]),
        "model.conditioning": ("weights", {}, choices("model.conditioning")),
        "diffusion.schedule": ("weights", {"diffusion.prediction": "edm"}, choices("diffusion.schedule")),
        "diffusion.prediction": ("weights", {}, choices("diffusion.prediction")),
        "diffusion.loss": ("weights", {}, choices("diffusion.loss")),
        "diffusion.weighting": ("weights", {}, choices("diffusion.weighting")),
        "diffusion.timestep_sampling": ("weights", {}, choices("diffusion.timestep_sampling")),
        "ema.sampled": ("ema weights", AVERAGES, choices("ema.sampled")),
        # With eta = 0, ddim is euler.
        "sample.sampler": ("grid", {"sample.eta": 0.5}, choices("sample.sampler")),
        "sample.spacing": ("grid", {}, choices("sample.spacing")),
        "sample.variance": ("grid", DDPM | {"model.learned_variance": True}, choices("sample.variance")),
        "checkpoint.best_metric": ("best", JUDGED, ["val/loss", "train/loss"]),
    }
    for knob, (name, extra, values) in variants.items():
        shown = [repr(seen(BASE | extra | {knob: value})[name]) for value in values]
        assert len(set(shown)) == len(values), knob


def test_keep_is_the_share_that_stays(seen: Any) -> None:
    for keep in (0.5, 0.2):
        trial = seen(BASE | PRUNED | {"prune.keep": keep})
        assert trial["sparsity"] == pytest.approx(1 - keep, abs=1e-3)
        assert trial["pruned at"] == 6
    narrow, wide = (
        seen(BASE | PRUNED | {"prune.method": "structured", "prune.keep": keep, "model.norm_groups": 1})
        for keep in (0.5, 0.75)
    )
    assert narrow["sparsity"] > wide["sparsity"] > 0.2
    assert seen(BASE | {"prune.method": "magnitude"})["pruned at"] == 2, "by default half of train.steps"


# Every downloaded data set: its shapes are known without a download


@pytest.mark.parametrize(
    ("name", "shape", "flips"),
    [
        ("cifar10", (3, 32, 32), True),
        ("cifar100", (3, 32, 32), True),
        ("mnist", (1, 28, 28), False),
        ("fashion_mnist", (1, 28, 28), False),
        ("digits", (1, 8, 8), False),
        ("folder", (3, 32, 32), True),
    ],
)
def test_every_data_set_has_its_own_shape_and_says_whether_it_is_mirrored(
    name: str, shape: tuple[int, int, int], flips: bool
) -> None:
    settings = {
        "data.name": name,
        "data.path": "x" if name == "folder" else None,
        "model.channel_multipliers": [1, 2],
        "model.attention_resolutions": [],
        "model.channels": 8,
    }
    config = build_config(settings)
    assert config.data.image_shape == shape
    assert config.data.flips is flips
    assert build_network(config, 10).conv_out.weight.shape[0] == shape[0]
    for flip in (True, False):
        assert build_config(settings, {"data.horizontal_flip": flip}).data.flips is flip
    assert build_config(settings, {"data.image_size": 64}).data.image_shape == (shape[0], 64, 64)
