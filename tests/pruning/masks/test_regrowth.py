"""RigL: updates as the paper's algorithm does them by hand, masks that stay exact, and the same after a stop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_tensors, digits, one_line, tiny_config

from agent.config import TrialConfig, build_config
from agent.trial import run_trial
from diffusion_core.checkpoint import list_checkpoints, read_checkpoint
from diffusion_core.config import ConfigError, flatten
from diffusion_core.model.structure import maskable
from diffusion_core.tracking import MemoryTracker
from diffusion_core.training.stopping import Stopped
from diffusion_core.training.trainer import TrainState
from pruning.config import unheard
from pruning.masks.mask import counts, held_masks
from pruning.masks.regrowth import Regrowth, drop_fraction, regrown


def config(**changes: Any) -> TrialConfig:
    tiny = flatten(tiny_config(train__steps=16, train__weight_decay=0.1, train__lr=3e-3, log__every=100))
    knobs = {"method": "rigl", "keep": 0.2, "until": 12, "interval": 3, "scope": "layer", "profile": "erk"} | changes
    return build_config(tiny, {"eval.classifier": "none"}, {f"prune.{key}": value for key, value in knobs.items()})


def test_what_is_dropped_and_grown_is_that_of_the_paper() -> None:
    """Algorithm 1 of Evci et al. 2020, layer by layer, with lists."""
    source = torch.Generator().manual_seed(4)
    for step in (0, 100, 399):
        fraction = drop_fraction(step, 400, 0.3)
        assert fraction == pytest.approx(0.15 * (1 + math.cos(step * math.pi / 400)))
        weights, masks, gradients = {}, {}, {}
        for name, shape in (("a", (7, 5, 3, 3)), ("b", (11, 4)), ("full", (3, 3)), ("empty", (2, 2))):
            masks[name] = torch.rand(shape, generator=source) < {"full": 2.0, "empty": -1.0}.get(name, 0.3)
            weights[name] = torch.randn(shape, generator=source) * masks[name]
            gradients[name] = torch.randn(shape, generator=source)
        updated = regrown(weights, masks, gradients, fraction)
        for name, mask in masks.items():
            flat = list(zip(weights[name].flatten().tolist(), gradients[name].flatten().tolist(), strict=True))
            active = [i for i, stays in enumerate(mask.flatten().tolist()) if stays]
            k = int(fraction * len(active))
            dropped = sorted(active, key=lambda i: abs(flat[i][0]))[:k]
            left = set(active) - set(dropped)
            others = [i for i in range(len(flat)) if i not in left]
            grown = sorted(others, key=lambda i: -abs(flat[i][1]))[:k]
            assert updated[name].flatten().nonzero()[:, 0].tolist() == sorted(left | set(grown)), name
        assert counts(updated) == counts(masks)
        assert step == 399 or not torch.equal(updated["a"], masks["a"])


def trial(settings: TrialConfig, folder: Path, watch: Any) -> Any:
    run_trial(settings, MemoryTracker(), dataset=digits(), folder=folder, run_id="r", callbacks=[watch])
    return read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])


def test_masks_move_at_their_steps_and_stay_exact(tmp_path: Path) -> None:
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def watch(state: TrainState, _row: dict[str, Any]) -> None:
        seen[state.step] = masks = {name: mask.clone() for name, mask in (held_masks(state) or {}).items()}
        for network in (state.network, state.ema.network):
            for name, weight in maskable(network).items():
                assert not weight[~masks[name]].any(), name
        before = seen.get(state.step - 1, masks)
        for name, parameter in state.network.named_parameters():
            if name in masks:
                grown = masks[name] & ~before[name]
                assert not parameter[grown].any(), name
                for moment in (state.optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")):
                    assert not moment[~masks[name] | grown].any(), name

    last = trial(config(), tmp_path / "run", watch)
    total = sum(mask.numel() for mask in seen[1].values())
    moved = [step for step in range(2, 17) if any((seen[step][n] != seen[step - 1][n]).any() for n in seen[1])]
    assert moved == [3, 6, 9]
    for masks in seen.values():
        assert counts(masks) == counts(seen[1])
        assert sum(counts(masks).values()) == round(0.2 * total)
    stored = last.tensors("masks")
    assert all(torch.equal(stored[name].bool(), mask) for name, mask in seen[16].items())
    (record,) = last.metadata["extra"]["pruning"]
    assert (record["method"], record["step"], record["knobs"]["regrow"]) == ("rigl", 0, 0.3)


def test_growth_follows_the_gradient_of_all_weights(tmp_path: Path) -> None:
    """Of the batch of that step, without masks in the way: by finite differences of the loss."""
    compared = []

    def watch(state: TrainState, _row: dict[str, Any]) -> None:
        masks = held_masks(state)
        if state.step != 2 or masks is None:
            return
        from pruning.calibration import Calibration

        sample = Calibration.of(digits().train, config(), torch.device("cpu"))
        grow = Regrowth(sample, start=0, end=12, interval=3, alpha=0.3)
        assert [step for step in range(20) if grow.is_due(step)] == [3, 6, 9]
        import copy

        network = copy.deepcopy(state.network).double()
        gradient = sample.gradient(copy.deepcopy(state.network), 3)["conv_in.weight"]
        drawn = sample.draws(3, network)
        noisy = sample._denoiser(network).schedule.add_noise(drawn.x0_BCHW, drawn.noise_BCHW, drawn.t_B).double()
        weight = network.conv_in.weight.detach().view(-1)
        for index in (~masks["conv_in.weight"]).flatten().nonzero()[:3, 0].tolist():
            losses = []
            for change in (-1e-5, 1e-5):
                weight[index] = change
                with torch.no_grad():
                    answer = network(noisy, drawn.t_B, drawn.labels_B)
                losses.append(float((answer - drawn.noise_BCHW).square().mean()))
            weight[index] = 0.0
            expected = (losses[1] - losses[0]) / 2e-5
            compared.append(abs(expected))
            assert float(gradient.flatten()[index]) == pytest.approx(expected, rel=1e-2, abs=1e-6)

    trial(config(profile="uniform"), tmp_path / "run", watch)
    assert len(compared) == 3
    assert max(compared) > 0


def test_stopped_on_the_way_masks_move_as_if_it_had_not_been(tmp_path: Path) -> None:
    def stop_at(step: int | None) -> Any:
        def stop(state: TrainState, _row: dict[str, Any]) -> None:
            if state.step == step:
                raise Stopped(15)

        return stop

    unbroken = trial(config(), tmp_path / "unbroken", stop_at(None))
    for step in (4, 6):  # Between two updates, and right after one.
        with pytest.raises(Stopped):
            trial(config(), tmp_path / "broken", stop_at(step))
    broken = trial(config(), tmp_path / "broken", stop_at(None))
    assert broken.parts == unbroken.parts
    for part in unbroken.parts:
        assert_same_tensors(broken.tensors(part), unbroken.tensors(part))
    assert broken.metadata["extra"] == unbroken.metadata["extra"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"until": 16}, "prune.until = 16: expected more than prune.step = 0 and less than train.steps = 16"),
        ({"regrow": 0.0}, "prune.regrow = 0.0: expected a number > 0 and <= 1"),
    ],
)
def test_wrong_knobs_are_refused_in_one_line(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert expected in one_line(caught.value)


def test_regrow_is_for_rigl_alone() -> None:
    assert not list(unheard(config(regrow=0.5).prune))
    (problem,) = unheard(config(method="gradual", step=1, regrow=0.5).prune)
    assert problem == "prune.regrow = 0.5: has no effect with prune.method=gradual; drop it or use rigl"
