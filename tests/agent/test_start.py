"""Runs that start from a checkpoint: what they take over, what they refuse, what they say of their parent; teachers."""

from __future__ import annotations

import copy
import gc
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, assert_same_tensors, digits, lively, one_line
from torch import Tensor

from agent.config import TrialConfig, build_config
from agent.trial import TrialResult, run_trial
from diffusion_core.checkpoint import Checkpoint, CheckpointError, list_checkpoints, read_checkpoint
from diffusion_core.config import ConfigError
from diffusion_core.model import compilation
from diffusion_core.model.compilation import compile_network
from diffusion_core.model.unet import build_network
from diffusion_core.tracking import MemoryTracker
from diffusion_core.training.checkpoints import SaveCheckpoints
from diffusion_core.training.distillation import Distillation, activation_map
from diffusion_core.training.resume import check_same_labels, describe_longer, drawing_as, find_checkpoint
from pruning.channels.removal import prune_channels
from pruning.config import PruneConfig

BASE: dict[str, Any] = {
    **TINY,
    "model.channels": 16,
    "train.steps": 3,
    "eval.every": 0,
    "eval.classifier": "none",
    "sample.every": 0,
    "checkpoint.every": 0,
    "seed": 4,
}
NARROW = {"prune.method": "structured", "prune.step": 0}


def trial(folder: Path, **changes: Any) -> tuple[TrialResult, Checkpoint, MemoryTracker]:
    """A run in a folder; a dot is written as two underscores."""
    return tracked_trial(folder, MemoryTracker(), **changes)


def tracked_trial(
    folder: Path, tracker: MemoryTracker, **changes: Any
) -> tuple[TrialResult, Checkpoint, MemoryTracker]:
    """The same with a tracker."""
    config = build_config(BASE, {key.replace("__", "."): value for key, value in changes.items()})
    result = run_trial(config, tracker, dataset=digits(), folder=folder, run_id=folder.name)
    return result, read_checkpoint(folder), tracker


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run from nothing."""
    folder = tmp_path_factory.mktemp("runs") / "dense"
    trial(folder)
    return folder


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "masked"
    trial(folder, init__checkpoint=str(dense), prune__method="magnitude", prune__keep=0.4, prune__step=1)
    return folder


def test_it_starts_from_the_averaged_weights_and_names_its_parent(dense: Path, tmp_path: Path) -> None:
    parent = read_checkpoint(dense)
    for weights, part in (("ema", "ema"), ("model", "model")):
        config = {"init__checkpoint": str(dense), "init__weights": weights, "train__lr": 1e-12, "train__steps": 1}
        result, checkpoint, _ = trial(tmp_path / weights, **config)
        assert result.step == 1
        for name, tensor in checkpoint.tensors("model").items():
            torch.testing.assert_close(tensor, parent.tensors(part)[name], rtol=0, atol=1e-9)
        assert checkpoint.metadata["extra"]["parent"] == {
            "checkpoint": str(parent.path),
            "artifact": None,
            "step": 3,
            "sha256": parent.metadata["files"]["ema.safetensors"]["sha256"],
        }
    assert "parent" not in parent.metadata["extra"]


class LaterTracker(MemoryTracker):
    """One whose uploads reach nobody while training runs, as W&B's offline."""

    live = False


@pytest.mark.parametrize(("kind_of_tracker", "upload", "steps"), [
    (MemoryTracker, True, [1, 2, 3, 4]), (LaterTracker, True, [3, 4]), (LaterTracker, False, []),
])  # fmt: skip
def test_checkpoints_are_logged_as_they_come_or_at_the_end_those_that_are_kept(
    kind_of_tracker: type[MemoryTracker], upload: bool, steps: list[int], tmp_path: Path
) -> None:
    tracker = kind_of_tracker()
    knobs = {"train__steps": 4, "checkpoint__every": 1, "checkpoint__keep": 2, "checkpoint__upload": upload}
    tracked_trial(tmp_path / "run", tracker, **knobs, checkpoint__best_metric="val/loss")
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-00000003", "step-00000004",
    ]  # fmt: skip
    for kind in ("model", "training-state"):
        logged = [artifact for artifact in tracker.artifacts if artifact["type"] == kind]
        assert [artifact["metadata"]["step"] for artifact in logged] == steps
        assert ["best" in artifact["aliases"] for artifact in logged[-1:]] == [True] * bool(steps)


def test_the_newest_checkpoint_stands_for_a_best_one_that_is_not_there(tmp_path: Path) -> None:
    saving = SaveCheckpoints(build_config(BASE), digits(), MemoryTracker(), tmp_path, "r", None)
    saving.saved_step, saving.best = 4, {"metric": "val/loss", "value": 0.5, "step": 3}
    assert saving.best_path == tmp_path / "step-00000004"
    (tmp_path / "step-00000003").mkdir()
    assert saving.best_path == tmp_path / "step-00000003"
    saving.forget_best()
    assert saving.best_path == tmp_path / "step-00000004"


def test_what_a_run_did_to_its_model_is_told_apart_from_what_it_found(dense: Path, tmp_path: Path) -> None:
    """A pruned model is fine-tuned, then pruned again: the records add up, and each run prunes once."""
    _, once, tracker = trial(tmp_path / "once", init__checkpoint=str(dense), **_dotted(NARROW))
    assert [record["step"] for record in once.metadata["extra"]["pruning"]] == [0]
    assert once.metadata["structure"]
    assert ("model", "pruned-once") in tracker.used  # Lineage: the pruned model, then what became of it.
    pruned = next(artifact for artifact in tracker.artifacts if artifact["name"] == "pruned-once")
    assert pruned["metadata"]["parent"]["checkpoint"] == str(read_checkpoint(dense).path)

    _, tuned, tracker = trial(tmp_path / "tuned", init__checkpoint=str(tmp_path / "once"))
    assert tuned.metadata["extra"]["pruning"] == once.metadata["extra"]["pruning"]
    assert tuned.metadata["structure"] == once.metadata["structure"]
    assert tracker.figures["model/params"] == once.metadata["extra"]["pruning"][0]["after"]["params"]
    assert not any(artifact["name"].startswith("pruned-") for artifact in tracker.artifacts)

    again = {"prune__method": "structured", "prune__keep": 0.6, "prune__step": 1}
    _, twice, _ = trial(tmp_path / "twice", init__checkpoint=str(tmp_path / "tuned"), **again)
    assert [record["step"] for record in twice.metadata["extra"]["pruning"]] == [0, 1]
    first, second = twice.metadata["extra"]["pruning"]
    assert second["before"]["params"] == first["after"]["params"] > second["after"]["params"]


def test_masks_stay_whether_they_are_at_hand_or_not(masked: Path, tmp_path: Path) -> None:
    """An artifact holds no masks: there the zeros tell."""
    source = read_checkpoint(masked)
    masks = source.tensors("masks")
    (source.path / "masks.safetensors").rename(tmp_path / "masks.safetensors")
    try:
        _, without, _ = trial(tmp_path / "without", init__checkpoint=str(masked), train__weight_decay=0.1)
    finally:
        (tmp_path / "masks.safetensors").rename(source.path / "masks.safetensors")
    _, having, _ = trial(tmp_path / "having", init__checkpoint=str(masked), train__weight_decay=0.1)
    for checkpoint in (without, having):
        assert_same_tensors(checkpoint.tensors("masks"), masks)
        for part in ("model", "ema"):
            weights = checkpoint.tensors(part)
            assert not any(weights[name][~mask].any() for name, mask in masks.items())


@pytest.mark.parametrize(("changes", "message"), [
    ({"train__lr": 0.5}, "train.lr = 0.5: the run in .* was started with 0.001"),
    ({"draws": 1}, "draws = 1: the run in .* was started with 3"),
    ({"checkpoint__resume": False}, "checkpoint.resume = False: .* holds checkpoints already"),
])  # fmt: skip
def test_a_run_of_another_configuration_does_not_go_on(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    trial(tmp_path / "run")
    with pytest.raises(ConfigError, match=message) as refusal:
        trial(tmp_path / "run", **changes)
    one_line(refusal.value)
    _, checkpoint, _ = trial(tmp_path / "run", eval__every=2)  # Which decides nothing of what is trained.
    assert checkpoint.step == BASE["train.steps"]


@pytest.mark.parametrize(("changes", "longer", "refused"), [
    ({"train.steps": 5}, True, None),
    ({"train.steps": 5}, False, "train.steps = 5: the run in .* was started with 3; choose another"),
    ({"train.steps": 2}, True, "train.steps = 2: the run in .* was started with 3; it may only grow; choose another"),
    ({"train.steps": 5, "train.lr": 0.5}, True, "train.lr = 0.5: .* was started with 0.001"),
])  # fmt: skip
def test_a_run_grows_where_it_may_and_nothing_else_changes(
    changes: dict[str, Any], longer: bool, refused: str | None, dense: Path
) -> None:
    """A round of a chain may not: the masks of the next one are of its last step."""
    config, folder = build_config(BASE, changes), dense / "checkpoints"
    if refused is None:
        found = find_checkpoint(config, folder, longer=longer)
        assert found is not None
        said = "train.steps = 5: the run was started with 3 and continues from step 3; "
        for schedule, rest in {
            "constant": "the learning rate goes on as before",
            "cosine": "from there the cosine of the learning rate follows the new length, which one long run would "
            "not have done",
        }.items():
            longer_config = build_config(BASE, changes | {"train.lr_schedule": schedule})
            assert describe_longer(longer_config, found) == said + rest
        assert describe_longer(build_config(BASE), found) is None
    else:
        with pytest.raises(ConfigError, match=refused):
            find_checkpoint(config, folder, **({"longer": True} if longer else {}))


def test_a_teacher_has_the_labels_of_the_network_to_start_from(dense: Path) -> None:
    ours = read_checkpoint(dense)
    turned = replace(ours, metadata={**ours.metadata, "class_names": ours.metadata["class_names"][::-1]})
    check_same_labels(ours, read_checkpoint(dense))
    with pytest.raises(ConfigError, match=r"distill\.checkpoint = .*, in another order than .*; choose a teacher"):
        check_same_labels(ours, turned)
    # Those of another data set have no order in common.
    check_same_labels(ours, replace(ours, metadata={**ours.metadata, "class_names": ["others"]}))


@pytest.mark.parametrize(
    ("now", "then", "draws"),
    [
        ({}, {}, 1),
        ({"draws": 3}, {}, 1),  # There were no versions to choose.
        ({}, {"draws": 1}, 1),
        ({}, {"draws": 2}, 2),
        ({}, {"draws": 3}, 3),
        ({"draws": 2}, {"draws": 1}, 2),  # The check of knobs refuses it.
    ],
)
def test_a_run_keeps_its_version_of_draws(now: dict[str, Any], then: dict[str, Any], draws: int) -> None:
    assert drawing_as(build_config(BASE, now), then | {"seed": 4}).draws == draws


@pytest.mark.parametrize("version", [1, 2])
def test_a_run_of_earlier_draws_goes_on_with_them(version: int, tmp_path: Path) -> None:
    longer = {"train__steps": BASE["train.steps"] + 1}
    _, unbroken, _ = trial(tmp_path / "unbroken", draws=version, **longer)
    trial(tmp_path / "run", draws=version)
    _, resumed, _ = trial(tmp_path / "run", **longer)
    assert resumed.config().draws == version
    assert_same_tensors(unbroken.tensors("model"), resumed.tensors("model"))


def stopped_trial(folder: Path, step: int, settings: dict[str, Any]) -> TrialConfig:
    """A run that ends after a step, with a checkpoint of each step. Return its configuration."""

    class Stop(Exception):
        pass

    class Stopping:
        def check(self, state: Any, _row: Any) -> None:
            if state.step == step:
                raise Stop

    every = {"checkpoint.every": 1, "checkpoint.keep": 9}
    config = build_config(BASE, {key.replace("__", "."): value for key, value in settings.items()}, every)
    with pytest.raises(Stop):
        run_trial(config, MemoryTracker(), dataset=digits(), folder=folder, run_id="r", stop=Stopping())  # type: ignore[arg-type]
    return config


def test_a_run_that_started_from_a_checkpoint_resumes(dense: Path, tmp_path: Path) -> None:
    """Also with a teacher, from its own folder alone: the parent may be gone."""
    settings = {"init__checkpoint": str(dense), "distill__output": 1.0, **_dotted(NARROW), "train__steps": 4}
    _, unbroken, _ = trial(tmp_path / "unbroken", **settings)
    folder = tmp_path / "stopped"
    config = stopped_trial(folder, 2, settings)
    hidden = dense.rename(dense.with_name("hidden"))
    try:
        run_trial(config, MemoryTracker(), dataset=digits(), folder=folder, run_id="r")
    finally:
        hidden.rename(dense)
    for part in unbroken.parts:
        assert_same_tensors(read_checkpoint(folder).tensors(part), unbroken.tensors(part))
    assert "teacher" in unbroken.parts


@pytest.mark.parametrize("stopped_at", [2, 3])
def test_gradual_pruning_learns_from_the_network_before_it(stopped_at: int, tmp_path: Path) -> None:
    gradual = {"prune.method": "gradual", "prune.step": 2, "prune.until": 5, "prune.interval": 1, "prune.keep": 0.2}
    settings = gradual | {"train.steps": 7, "distill.output": 1.0, "train.lr": 0.02}
    config = stopped_trial(tmp_path / "run", stopped_at, settings)
    run_trial(config, MemoryTracker(), dataset=digits(), folder=tmp_path / "run", run_id="r")
    dense, last = (read_checkpoint(tmp_path / f"run/checkpoints/step-{step:08d}") for step in (2, 7))
    assert_same_tensors(last.tensors("teacher"), dense.tensors("ema"))
    unbroken = build_config(BASE, settings, {"checkpoint.every": 1})
    run_trial(unbroken, MemoryTracker(), dataset=digits(), folder=tmp_path / "unbroken", run_id="r")
    assert_same_tensors(last.tensors("model"), read_checkpoint(tmp_path / "unbroken").tensors("model"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__channels": 8}, "model.channels = 8: expected 16, as in init.checkpoint"),
        ({"model__num_heads": 2}, "model.num_heads = 2: expected 1"),
        ({"diffusion__prediction": "v"}, "diffusion.prediction = 'v': expected 'eps'"),
        (
            {"model__attention_resolutions": [], "data__image_size": 16},
            "model.attention_resolutions = []: expected [4]",
        ),
    ],
)
def test_another_architecture_is_refused(changes: dict[str, Any], message: str, dense: Path, tmp_path: Path) -> None:
    for section in ("init", "distill"):
        distill = {"distill__output": 1.0} if section == "distill" else {}
        with pytest.raises(ConfigError) as caught:
            trial(tmp_path / "run", **{f"{section}__checkpoint": str(dense)}, **changes, **distill)
        assert one_line(caught.value).startswith(message.replace("init.checkpoint", f"{section}.checkpoint"))
        assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_is_not_there_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        trial(tmp_path / "run", init__checkpoint=str(tmp_path))
    sampling_alone = tmp_path / "artifact"
    sampling_alone.mkdir()
    for name in ("checkpoint.json", "ema.safetensors"):
        shutil.copy(read_checkpoint(dense).path / name, sampling_alone)
    with pytest.raises(CheckpointError, match=r"init\.weights = 'model': .* holds ema"):
        trial(tmp_path / "run", init__checkpoint=str(sampling_alone), init__weights="model")


# Teachers.


def test_distillation_is_the_distance_to_the_teacher() -> None:
    config = build_config(BASE)
    student, teacher = (_lively(config, seed) for seed in (0, 1))
    smaller = prune_channels(student, PruneConfig(method="structured", keep=0.4))[0]
    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 5, 9])
    labels = torch.tensor([1, 2, -1])
    expected = (smaller(x, t, labels) - teacher(x, t, labels)).square().mean(dim=(1, 2, 3))
    for output, features in ((2.0, 0.0), (0.0, 1.0), (2.0, 1.0)):
        distillation = Distillation(teacher, smaller, output, features)
        smaller(x, t, labels)
        loss = distillation.loss()
        assert loss.shape == (3,)
        if not features:
            torch.testing.assert_close(loss, output * expected)
        assert (loss > output * expected - 1e-6).all()
        gradients = torch.autograd.grad(loss.sum(), list(smaller.parameters()), allow_unused=True)
        assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients) > 40
        assert all(parameter.grad is None for parameter in teacher.parameters())
        distillation.close()
    assert smaller.watch is None
    assert teacher.watch is None
    itself = Distillation(teacher, teacher, 1.0, 1.0)
    teacher(x, t, labels)
    assert not itself.loss().any()
    itself.close()


@pytest.mark.parametrize(("how", "compiled"), [("network", "both"), ("blocks", "both")])
def test_distillation_sees_into_networks_that_are_compiled_already(
    how: str, compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense phase compiles the network; the distillation begins after the pruning."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    config = build_config(BASE, {"model.channel_multipliers": [1], "model.attention_resolutions": [8]})
    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 5, 9])
    labels = torch.tensor([1, 2, -1])

    def taught(chosen: str) -> tuple[Tensor, list[Tensor]]:
        torch._dynamo.reset()
        student, teacher = (_lively(config, seed) for seed in (0, 1))
        for name, network in (("student", student), ("teacher", teacher)):
            if chosen in (name, "both"):
                compile_network(network, how)
                network(x, t, labels)
        distillation = Distillation(teacher, student, 0.5, 1.0)
        for _ in range(2):
            student(x, t, labels)
            loss = distillation.loss()
        gradients = torch.autograd.grad(loss.sum(), list(student.parameters()), allow_unused=True)
        distillation.close()
        return loss, [gradient for gradient in gradients if gradient is not None]

    expected, expected_gradients = taught("none")
    loss, gradients = taught(compiled)
    assert torch.equal(loss, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_a_copy_of_a_student_is_not_watched() -> None:
    config = build_config(BASE)
    student, teacher = (_lively(config, seed) for seed in (0, 1))
    distillation = Distillation(teacher, student, 1.0, 1.0)
    x, t = torch.zeros(2, 1, 8, 8), torch.tensor([0, 5])
    student(x, t)
    expected = distillation.loss()
    student(x, t)
    copied = copy.deepcopy(student)
    copied(x + 1.0, t)
    assert copied.watch is None
    assert torch.equal(distillation.loss(), expected)


def test_a_step_of_distillation_leaves_no_graph_behind() -> None:
    """Kept until the next step, it would take memory, and tie the next step to the stream of this one on a GPU."""
    config = build_config(BASE)
    student, teacher = (_lively(config, seed) for seed in (0, 1))
    distillation = Distillation(teacher, student, 1.0, 1.0)
    made: list[weakref.ref[Tensor]] = []
    student.conv_out.register_forward_hook(lambda _module, _given, output: made.append(weakref.ref(output)))
    student(torch.zeros(2, 1, 8, 8), torch.tensor([0, 5]))
    distillation.loss().sum().backward()
    assert len(made) == 1
    gc.collect()
    assert made[0]() is None


def test_activation_maps_do_not_ask_how_wide_a_layer_is() -> None:
    one = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(activation_map(one), activation_map(5 * torch.cat([one, one], dim=1)))
    torch.testing.assert_close(activation_map(one).square().mean(dim=1), torch.ones(2))


def _lively(config: Any, seed: int) -> Any:
    return lively(build_network(config, 10), seed).eval()


def _dotted(settings: dict[str, Any]) -> dict[str, Any]:
    return {key.replace(".", "__"): value for key, value in settings.items()}
