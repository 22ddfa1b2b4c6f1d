"""Step distillation as the last part of a run: stages, records, resuming, lineage, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import convert_diffusers
import evaluate
import prune
import pytest
import sample_images
import torch
from tiny import TINY, assert_same_tensors, cpu, digits, one_line, tiny_batches, tiny_state

from agent.config import build_config
from agent.trial import run_trial
from diffusion_core.checkpoint import Checkpoint, list_checkpoints, read_checkpoint
from diffusion_core.config import FORMULATIONS, ConfigError, StepsConfig
from diffusion_core.config.steps import without_effect
from diffusion_core.model.structure import maskable
from diffusion_core.registries import STEP_METHODS
from diffusion_core.sampling.generation import Generator, Request
from diffusion_core.step_distillation.phase import TEACHER_PART, distil_steps, stages
from diffusion_core.tracking import MemoryTracker
from diffusion_core.training.learning_rate import Phase, learning_rate
from diffusion_core.training.trainer import TrainState

QUIET = TINY | {
    "model.channel_multipliers": [1],
    "model.attention_resolutions": [],
    "sample.every": 0,
    "eval.every": 0,
    "eval.classifier": "none",
    "eval.consistency_images": 0,
    "checkpoint.best_metric": "train/loss",
    "checkpoint.keep": 99,
}
CONSISTENCY = {"steps.method": "consistency"}
PROGRESSIVE = {"steps.method": "progressive", "steps.start": 8, "steps.target": 2}


def trial(folder: Path, *knobs: dict[str, Any]) -> MemoryTracker:
    tracker = MemoryTracker()
    config = build_config(QUIET, *knobs)
    run_trial(config, tracker, dataset=digits(), folder=folder, run_id=folder.name)
    return tracker


def last(folder: Path) -> Checkpoint:
    return read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    trial(folder, {"checkpoint.best_metric": "val/loss", "train.steps": 3})
    return folder


@pytest.mark.parametrize("method", list(STEP_METHODS))
@pytest.mark.parametrize("name", FORMULATIONS)
def test_every_formulation_trains_and_samples_in_few_steps(name: str, method: str) -> None:
    """One training step, then images in 4, 2 and 1 steps."""
    steps = {"steps.method": method, "steps.target": 4, "steps.start": 8, "steps.guidance": 1.5}
    start = {"init.checkpoint": "x", "train.steps": 1, "sample.clip_x0": False}
    config = build_config(QUIET, FORMULATIONS[name], start, steps)
    state = tiny_state(config)
    distil_steps(state, tiny_batches(config), config, config.steps, 0, [], accelerator=cpu())
    assert state.step == 1
    sample = state.sampling(config.sample)
    assert (sample.steps, sample.guidance, sample.spacing) == (4, 1.0, "trailing")
    generator = Generator(state.ema.network, config, "fp32")
    for count in (4, 2, 1):
        fewer = sample.model_copy(update={"steps": count})
        assert torch.isfinite(generator.batch([Request(3, 0), Request(4, 1)], fewer, 0)).all()


def test_a_run_trains_prunes_and_distils(tmp_path: Path) -> None:
    pruning = {"prune.method": "structured", "prune.step": 2, "prune.keep": 0.5}
    tracker = trial(tmp_path / "run", PROGRESSIVE, pruning, {"train.steps": 12, "eval.every": 1, "eval.val_images": 8})
    names = {row["step"]: {key.partition("/")[0] for key in row if "val/loss" in key} for row in tracker.rows}
    # The end of the training is half of what is left after the pruning.
    assert names == {step: {"dense"} if step < 2 else {"teacher"} if step <= 7 else set() for step in range(1, 13)} | {
        2: {"dense"}
    }
    # The learning rate of each part goes its own way: the cosine ends where the part does.
    record = last(tmp_path / "run").metadata["extra"]["steps"]
    assert (record["stage"], record["start"], record["sampling"]["steps"]) == (1, 9, 2)
    # Dense -> trained -> student: the run uses the model that it made on the way.
    made = [artifact["name"] for artifact in tracker.artifacts]
    assert "teacher-run" in made
    assert ("model", "teacher-run") in tracker.used
    assert tracker.figures["sample/evaluations"] == 2
    assert tracker.figures["sample/macs"] == 2 * tracker.figures["model/macs"]
    assert tracker.figures["sample/seconds"] > 0.0


def test_only_figures_of_the_last_student_rank_a_run(teacher: Path, tmp_path: Path) -> None:
    """Students of earlier stages take more steps, so their figures do not belong to the costs of the run."""
    figure = "eval/diversity_20"
    knobs: dict[str, Any] = {"eval.every": 1, "eval.figures": ["diversity"], "eval.num_images": 20}
    knobs |= {"checkpoint.best_metric": figure, "init.checkpoint": str(teacher), "train.steps": 6}
    tracker = trial(tmp_path / "run", PROGRESSIVE | {"steps.target": 1, "checkpoint.every": 1}, knobs)
    names = {row["step"]: {key for key in row if key.endswith(figure)} for row in tracker.rows}
    prefixes = ["stage-4/", "stage-4/", "stage-2/", "stage-2/", "", ""]
    assert names == {step: {f"{prefix}{figure}"} for step, prefix in enumerate(prefixes, start=1)}
    result = json.loads((tmp_path / "run" / "result.json").read_text())["figures"]
    assert result[figure] == max(row[figure] for row in tracker.rows[-2:])
    assert result["sample/evaluations"] == 1
    bests = [read_checkpoint(path).metadata["best"] for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert bests[:4] == [None] * 4
    assert bests[4]["step"] == 5


@pytest.mark.parametrize(
    ("method", "cut"),
    [
        ("consistency", 6),
        pytest.param("progressive", 6, marks=pytest.mark.slow),
        pytest.param("guided", 7, marks=pytest.mark.slow),
        ("masked", 7),
        pytest.param("taught", 6, marks=pytest.mark.slow),
        pytest.param("at the start", 4, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_distillation_equals_an_unbroken_one(method: str, cut: int, tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "consistency": CONSISTENCY,
        "taught": {"steps.method": "consistency_distillation"},
        "progressive": PROGRESSIVE,
        "guided": CONSISTENCY | {"steps.guidance": 2.0},
        "masked": PROGRESSIVE | {"prune.method": "magnitude", "prune.step": 2, "steps.step": 4},
        "at the start": PROGRESSIVE,
    }
    knobs = cases[method]
    dropout = {"model.dropout": 0.3, "train.lr_schedule": "cosine", "checkpoint.every": cut}
    trial(tmp_path / "whole", knobs, dropout)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for path in list_checkpoints(tmp_path / "cut" / "checkpoints"):
        if read_checkpoint(path).step > cut:
            shutil.rmtree(path)
    assert last(tmp_path / "cut").step == cut
    (tmp_path / "cut" / "result.json").unlink()
    trial(tmp_path / "cut", knobs, dropout)
    whole, cut_short = last(tmp_path / "whole"), last(tmp_path / "cut")
    assert set(whole.parts) == set(cut_short.parts)
    assert (TEACHER_PART in whole.parts) == (method != "consistency")
    for part in whole.parts:
        assert_same_tensors(whole.tensors(part), cut_short.tensors(part))
    assert whole.metadata["extra"] == cut_short.metadata["extra"]
    if method == "masked":
        zeros = sum(int((weight == 0).sum()) for weight in maskable(whole.network()).values())
        assert zeros >= 0.5 * sum(weight.numel() for weight in maskable(whole.network()).values())


def test_each_stage_starts_from_the_averages_with_its_own_learning_rate(tmp_path: Path) -> None:
    config = build_config(QUIET, PROGRESSIVE, {"init.checkpoint": "x", "train.lr_schedule": "cosine", "steps.lr": 0.01})
    state = tiny_state(config)
    with torch.no_grad():
        for average, weight in zip(state.ema.network.parameters(), state.network.parameters(), strict=True):
            average.copy_(weight + 0.5)
    averages = {name: tensor.clone() for name, tensor in state.ema.network.state_dict().items()}
    rows: list[dict[str, Any]] = []
    teachers: list[dict[str, torch.Tensor]] = []

    def note(state: TrainState, row: dict[str, Any]) -> None:
        rows.append(row)
        teachers.append(state.extra_parts[TEACHER_PART])

    distil_steps(state, tiny_batches(config), config, config.steps, 0, [note], accelerator=cpu())
    assert_same_tensors(teachers[0], averages)
    assert teachers[3] is not teachers[4]  # Stages of four steps each.
    rates = [row["train/lr"] for row in rows]
    expected = [learning_rate(step, config.train, Phase(0, 4, 0.01, 0)) for step in range(4)]
    assert rates == expected * 2
    assert rates[0] == 0.01
    assert [stage.count for stage in stages(config.steps, 0, 8)] == [4, 2]


def test_a_student_is_sampled_as_it_was_made_for(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial(tmp_path / "run", CONSISTENCY, {"init.checkpoint": str(teacher), "train.steps": 2})
    checkpoint = last(tmp_path / "run")
    sample = checkpoint.config().sample
    assert (sample.sampler, sample.steps, sample.spacing, sample.start_level) == ("consistency", 2, "trailing", 10.0)
    assert checkpoint.metadata["extra"]["parent"]["checkpoint"].startswith(str(teacher))
    assert checkpoint.metadata["config"]["sample.sampler"] == "ddim"  # What its teacher is sampled with.
    words = ["--checkpoint", str(tmp_path / "run"), "--num-images", "2", "--device", "cpu"]
    assert sample_images.main([*words, "--out", str(tmp_path / "a")]) == 0
    assert "warning" not in capsys.readouterr().err
    settings = json.loads((tmp_path / "a" / "samples.json").read_text())["sample"]
    assert (settings["sampler"], settings["steps"], settings["guidance"]) == ("consistency", 2, 1.0)
    explicit = ["--sampler", "consistency", "--steps", "2", "--spacing", "trailing", "--start-level", "10"]
    assert sample_images.main([*words, "--out", str(tmp_path / "b"), *explicit]) == 0
    assert (tmp_path / "a" / "0-0.png").read_bytes() == (tmp_path / "b" / "0-0.png").read_bytes()
    assert sample_images.main([*words, "--out", str(tmp_path / "c"), "--steps", "4", "--guidance", "2"]) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert "sample.steps = 4, sample.guidance = 2.0" in warning
    assert "distilled for sample.steps=2, sample.guidance=1.0" in warning
    few = ["--num-images", "20", "--figures", "diversity", "--extractor", "classifier", "--device", "cpu"]
    other = ["--steps", "1", "--start-level", "8"]
    assert evaluate.main(["--checkpoint", str(tmp_path / "run"), *few, *other]) == 0
    said = capsys.readouterr()
    assert "sample.steps = 1, sample.start_level = 8.0" in said.err
    figures = json.loads((checkpoint.path / "evaluation.json").read_text())["figures"]
    assert figures["sample/evaluations"] == 1
    assert figures["eval/diversity_20"] > 0.0


@pytest.mark.parametrize("how", [CONSISTENCY, PROGRESSIVE], ids=["consistency", "progressive"])
def test_a_student_is_not_taken_for_a_denoiser(
    how: dict[str, Any], teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would lose its few steps without a word."""
    trial(tmp_path / "run", how, {"init.checkpoint": str(teacher), "train.steps": 4})
    student = last(tmp_path / "run")
    capsys.readouterr()
    words = ["--checkpoint", str(student.path), "--target", "macs=0.5", "--out", str(tmp_path / "pruned")]
    for more in ([], ["--sensitivity"]):
        assert prune.main([*words, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        sampler = student.config().sample.sampler
        assert f"is a student of 2 steps with {sampler}; prune its teacher, then distil the pruned model" in line
    pytest.importorskip("diffusers")
    assert convert_diffusers.main(["export", str(student.path), str(tmp_path / "pipeline")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"DDPMPipeline cannot sample a student of 2 steps with {sampler}; export its teacher" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_damaged_record_is_one_line(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trial(tmp_path / "run", CONSISTENCY, {"init.checkpoint": str(teacher), "train.steps": 1})
    file = last(tmp_path / "run").path / "checkpoint.json"
    capsys.readouterr()
    damages: list[Any] = [3, {}, {"sampling": []}, {"sampling": {"steps": -1}}, {"sampling": {"nonsense": 1}}]
    for damage in damages:
        metadata = json.loads(file.read_text())
        metadata["extra"]["steps"] = damage
        file.write_text(json.dumps(metadata))
        words = ["--checkpoint", str(file.parent), "--device", "cpu", "--out", str(tmp_path / "out")]
        assert sample_images.main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / "out").exists()


WRONG: list[tuple[dict[str, Any], str]] = [
    (PROGRESSIVE | {"steps.start": 12}, "steps.start = 12: does not halve to steps.target = 2; expected one of 4, 8"),
    (PROGRESSIVE | {"steps.start": 64, "train.steps": 20}, "steps.start = 64: expected at most"),
    (CONSISTENCY | {"steps.target": 51}, "steps.target = 51: expected at most"),
    (CONSISTENCY | {"steps.step": 8}, "steps.step = 8: expected less than train.steps = 8"),
    (CONSISTENCY | {"steps.step": 0}, "steps.step = 0: there is no teacher yet"),
    (
        CONSISTENCY | {"prune.method": "magnitude", "prune.step": 5, "steps.step": 4},
        "steps.step = 4: expected at least 5",
    ),
    (CONSISTENCY | {"prune.method": "lottery"}, "steps.method = 'consistency': not for prune.method=lottery"),
    (CONSISTENCY | {"steps.guidance": 2.0, "train.label_dropout": 0.0}, "steps.guidance = 2.0: guidance other than 1"),
    (PROGRESSIVE | {"train.steps": 2, "init.checkpoint": "x", "steps.target": 1}, "3 stages in 2 steps"),
    (
        PROGRESSIVE | {"steps.weighting": "difference"},
        "steps.weighting = 'difference': not for",
    ),
    (
        CONSISTENCY | {"checkpoint.best_metric": "val/loss"},
        "checkpoint.best_metric = 'val/loss': expected one of",
    ),
    (CONSISTENCY | {"ema.average_from": 4}, "ema.average_from = 4: the last stage restarts the averages 4 steps"),
    ({"sample.start_level": 0.05, "sample.steps": 20}, "sample.steps = 20: expected at most"),
    (
        CONSISTENCY | {"init.checkpoint": "x", "distill.output": 1.0, "distill.checkpoint": "y"},
        "has no effect with steps.step=0",
    ),
]


def test_a_default_that_a_student_lacks_is_called_the_default() -> None:
    unset = {key: value for key, value in QUIET.items() if key != "checkpoint.best_metric"} | {"preset": "mnist"}
    with pytest.raises(ConfigError, match="best_metric = 'val/loss', the default, is not measured here: expected one"):
        build_config(unset, CONSISTENCY)


@pytest.mark.parametrize(("knobs", "problem"), WRONG)
def test_combinations_that_cannot_work_are_refused_at_once(knobs: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_config(QUIET, knobs)
    assert problem in one_line(error.value)


@pytest.mark.parametrize(
    ("knobs", "problem"),
    [
        ({"diffusion.schedule": "linear"}, "diffusion.schedule = 'linear': expected 'cosine', of the teacher"),
        ({"diffusion.timesteps": 40}, "diffusion.timesteps = 40: expected 50, of the teacher"),
        ({"model.channels": 16}, "model.channels = 16: expected 8"),
        ({"data.image_size": 16}, "data.image_size = 16"),
        ({"diffusion.prediction": "v"}, "diffusion.prediction = 'v': expected 'eps'"),
    ],
)
def test_a_teacher_of_another_kind_is_refused_before_training(
    knobs: dict[str, Any], problem: str, teacher: Path, tmp_path: Path
) -> None:
    for method in (CONSISTENCY, PROGRESSIVE):
        with pytest.raises(ConfigError) as error:
            trial(tmp_path / "run", method, {"init.checkpoint": str(teacher)}, knobs)
        assert problem in one_line(error.value)
        assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_student_is_distilled_further_only_by_its_own_method(teacher: Path, tmp_path: Path) -> None:
    start = {"init.checkpoint": str(teacher), "train.steps": 2}
    trial(tmp_path / "four", PROGRESSIVE | {"steps.target": 4}, start)
    further = {"init.checkpoint": str(tmp_path / "four"), "train.steps": 2}
    trial(tmp_path / "two", PROGRESSIVE | {"steps.start": 4}, further)
    assert last(tmp_path / "two").config().sample.steps == 2
    for method in (CONSISTENCY, PROGRESSIVE):
        with pytest.raises(ConfigError, match="the teacher is a student already, of 4 steps with ddim"):
            trial(tmp_path / "other", method, further)


def test_a_consistency_student_is_no_teacher(teacher: Path, tmp_path: Path) -> None:
    """Its clean images are ends of paths, which tuning without a teacher may go on with, and nothing else."""
    start = {"init.checkpoint": str(teacher), "train.steps": 1}
    trial(tmp_path / "student", CONSISTENCY, start)
    further = {"init.checkpoint": str(tmp_path / "student"), "train.steps": 1}
    trial(tmp_path / "more", CONSISTENCY, further)
    for method in ({"steps.method": "consistency_distillation"}, CONSISTENCY | {"steps.guidance": 2.0}):
        with pytest.raises(ConfigError, match="the teacher is a student already, of 2 steps with consistency"):
            trial(tmp_path / "other", method, further)


def test_knobs_without_effect_are_named() -> None:
    said = list(without_effect(StepsConfig(method="consistency", start=8, huber_c=1.0, loss="l2")))
    assert said == [
        "steps.start = 8: has no effect with steps.method=consistency; drop it or use progressive",
        "steps.huber_c = 1.0: has no effect with steps.loss=l2; use pseudo_huber",
    ]
    said = list(without_effect(StepsConfig(target=4)))
    users = "consistency or consistency_distillation or progressive"
    assert said == [f"steps.target = 4: has no effect with steps.method=none; drop it or use {users}"]
    assert not list(without_effect(StepsConfig(start=8, doublings=3), ["none", "consistency", "progressive"]))
    assert not list(without_effect(StepsConfig()))
