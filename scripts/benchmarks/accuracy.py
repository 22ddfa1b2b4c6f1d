"""Check that fast modes do not change results: bf16 against float32, and the same training twice, on digits."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from agent.config import TrialConfig, build_config
from agent.trial import run_trial
from benchmarks.measurement.options import Options
from benchmarks.measurement.rows import Row
from diffusion_core.checkpoint import Checkpoint, read_checkpoint
from diffusion_core.data.datasets import Dataset, load_data
from diffusion_core.evaluation.classifier.classifier import classifier_for
from diffusion_core.hardware import Precision, pick_device
from diffusion_core.run_folder import read_history
from diffusion_core.sampling.generation import Generator, round_robin
from diffusion_core.tracking import NullTracker

SUBJECT = "accuracy"
STEPS, SHORT_STEPS = 500, 75
IMAGES, SHORT_IMAGES = 1000, 20
AGREEMENT_TARGET, LOSS_TARGET = 1.0, 0.05
QUIET = {"preset": "digits", "sample.every": 0, "eval.every": 0, "eval.classifier": "none", "checkpoint.every": 0,
         "checkpoint.best_metric": "val/loss", "checkpoint.upload": False, "log.progress": False}  # fmt: skip


def trained(config: TrialConfig, dataset: Dataset, folder: Path) -> tuple[Checkpoint, list[float]]:
    """Return the last checkpoint of a training, and its losses, each the mean over a logging interval."""
    result = run_trial(config, NullTracker(), dataset=dataset, folder=folder, run_id=folder.name)
    losses = [row["train/loss"] for row in read_history(folder) if "train/loss" in row]
    return read_checkpoint(result.best_checkpoint), losses


def same_weights(one: Checkpoint, two: Checkpoint) -> bool:
    """Return whether two checkpoints have bit-identical weights."""
    ours, theirs = one.tensors("model"), two.tensors("model")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def measure(options: Options) -> list[Row]:
    """Measure loss curves in both precisions and compiled, class agreement of samples, and determinism."""
    steps, count = (SHORT_STEPS, SHORT_IMAGES) if options.short else (STEPS, IMAGES)
    base = build_config(QUIET | {"train.steps": steps, "train.precision": "fp32", "train.deterministic": True})
    dataset = load_data(base.data)
    device = pick_device(base.train)
    variants = {"fp32": {}, "fp32 again": {}, "bf16": {"train.precision": "bf16"}}
    if device.type == "cuda" or shutil.which("g++"):  # On CPUs, torch.compile needs a C++ compiler.
        variants["compiled"] = {"train.compile": "network"}
    checkpoints, losses = {}, {}
    with tempfile.TemporaryDirectory() as name:
        for variant, knobs in variants.items():
            options.say(f"training: {variant}")
            config = build_config(QUIET | base.model_dump(mode="json") | knobs)
            checkpoints[variant], losses[variant] = trained(config, dataset, Path(name) / variant.replace(" ", "-"))
        classifier = classifier_for(dataset, "digits", mirrored=False, device=device)
        network = checkpoints["fp32"].network().to(device)
        wanted = round_robin(range(10), range(count))
        agreement = {}
        precisions: tuple[Precision, Precision] = ("fp32", "bf16")
        for precision in precisions:
            options.say(f"sampling: {precision}")
            images = Generator(network, base, precision).images(wanted, base.sample, 1)
            agreement[precision] = 100.0 * classifier.class_agreement(images, [request.label for request in wanted])
        identical = same_weights(checkpoints["fp32"], checkpoints["fp32 again"])
    rows = [
        Row(
            SUBJECT,
            f"class agreement of {count} digits, sampled in bf16 against fp32",
            abs(agreement["fp32"] - agreement["bf16"]),
            "points",
            AGREEMENT_TARGET,
            at_least=False,
            ours=f"{agreement['bf16']:.1f}%",
            peer=f"{agreement['fp32']:.1f}%",
        ),
        Row(SUBJECT, f"{steps} steps twice, train.deterministic: weights identical", float(identical), "", 1.0),
    ]
    for variant in ("bf16", *(["compiled"] if "compiled" in losses else [])):
        # Skip the first interval, in which losses fall at every step.
        pairs = list(zip(losses["fp32"], losses[variant], strict=True))[1:]
        worst = max(abs(other - exact) / exact for exact, other in pairs)
        what = f"loss curve over {steps} steps, {variant} against fp32: largest relative difference of 25-step means"
        rows.append(Row(SUBJECT, what, worst, "", LOSS_TARGET, at_least=False))
    return rows
