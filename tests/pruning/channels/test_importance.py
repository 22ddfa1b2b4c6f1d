"""Importances equal what their papers' formulas say, computed here image by image and channel by channel."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from tiny import digits, tiny_config, tiny_network
from torch import Tensor, nn

from diffusion_core.diffusion.denoiser import Denoiser
from diffusion_core.diffusion.draws import Draws
from diffusion_core.diffusion.losses import diffusion_loss
from diffusion_core.model.unet import UNet
from diffusion_core.randomness import Purpose, generator
from pruning.calibration import Calibration
from pruning.channels.groups import ChannelGroup, channel_groups
from pruning.channels.importance import channel_scores, hessian, timestep_gradients
from pruning.config import PruneConfig
from pruning.registries import IMPORTANCES

FEW_TIMESTEPS: dict[str, Any] = {
    "model__channels": 4,
    "model__norm_groups": 2,
    "model__channel_multipliers": [1, 1],
    "model__attention_resolutions": [],
    "train__batch_size": 3,
    "diffusion__timesteps": 6,
}
CONFIG = tiny_config(**FEW_TIMESTEPS)
BATCHES = 2


@cache
def network() -> UNet:
    return tiny_network(CONFIG)


@cache
def calibration() -> Calibration:
    return Calibration.of(digits().train, CONFIG, torch.device("cpu"))


def knobs(importance: str, **changes: float) -> PruneConfig:
    return PruneConfig.model_validate(
        {"method": "structured", "importance": importance, "calibration_batches": BATCHES} | changes
    )


def scores(importance: str, seed: int = 0) -> dict[str, Tensor]:
    return channel_scores(network(), channel_groups(network()), knobs(importance), seed, calibration())


def gradient(drawn: Draws, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Of the mean loss of a batch, by backward on a copy of the weights, or at other ones."""
    copy = tiny_network(CONFIG)
    if weights is not None:
        copy.load_state_dict(weights)
    denoiser = Denoiser.from_config(copy, CONFIG.diffusion, CONFIG.model, torch.device("cpu"))
    loss_B = diffusion_loss(denoiser, drawn.x0_BCHW, drawn.noise_BCHW, drawn.t_B, drawn.labels_B, CONFIG.diffusion)
    loss_B.mean().backward()
    return {name: parameter.grad for name, parameter in copy.named_parameters() if parameter.grad is not None}


def parts_of(group: ChannelGroup, channel: int, values: dict[str, Tensor], everything: bool) -> list[Tensor]:
    """The entries of one channel in every tensor of the group that holds it, indexed one by one."""
    found = []
    for member in group.members:
        module = network().get_submodule(member.layer)
        place = member.places[channel]
        weight = values[f"{member.layer}.weight"]
        if isinstance(module, nn.Embedding):
            if everything:
                found.append(weight[:, place])
        elif isinstance(module, nn.GroupNorm):
            if everything:
                found += [weight[place], values[f"{member.layer}.bias"][place]]
        elif member.side == "in":
            found.append(weight[:, place])
        else:
            found.append(weight[place])
            if everything:
                found.append(values[f"{member.layer}.bias"][place])
    return found


def check(
    found: dict[str, Tensor], values: dict[str, Tensor], reduce: Callable[[Tensor], Tensor], all_of: bool
) -> None:
    compared = 0
    for group in channel_groups(network()):
        for channel in range(group.width):
            expected = sum(float(reduce(part.double())) for part in parts_of(group, channel, values, all_of))
            assert float(found[group.name][channel]) == pytest.approx(expected, rel=1e-4, abs=1e-9), group.name
            compared += 1
    assert compared == 96


WEIGHTS = {name: parameter.detach() for name, parameter in network().named_parameters()}


def test_magnitudes_are_norms_of_weights() -> None:
    check(scores("l1"), WEIGHTS, lambda part: part.abs().sum(), all_of=False)
    check(scores("l2"), WEIGHTS, lambda part: part.square().sum(), all_of=False)
    assert all(torch.equal(found, scores("l2")[name]) for name, found in scores("reinit").items())


def test_taylor_is_weight_times_gradient() -> None:
    total: dict[str, Tensor] = {}
    for index in range(BATCHES):
        for name, value in gradient(calibration().draws(index, network())).items():
            total[name] = total.get(name, torch.zeros_like(value)) + value / BATCHES
    products = {name: WEIGHTS[name] * total[name] for name in WEIGHTS}
    check(scores("taylor"), products, lambda part: part.abs().sum(), all_of=True)
    check(scores("taylor_multivariable"), products, lambda part: part.sum().abs(), all_of=True)


@pytest.mark.parametrize("stops", [False, True])
def test_diff_pruning_adds_up_the_timesteps_whose_loss_is_large_enough(stops: bool) -> None:
    """Fang et al. 2023, algorithm 1, with fresh images and noise at every timestep."""
    count = CONFIG.diffusion.timesteps
    drawn = [calibration().draws(t, network(), t) for t in range(count)]
    assert [one.t_B.tolist() for one in drawn] == [[t] * 3 for t in range(count)]
    assert len({float(one.noise_BCHW.sum()) for one in drawn}) == count
    losses = [float(calibration().loss(network(), one).mean().detach()) for one in drawn]
    shares = [loss / max(losses[: t + 1]) for t, loss in enumerate(losses)]
    threshold = min(shares) + 1e-3 if stops else 0.0
    visited = list(itertools.takewhile(lambda t: shares[t] >= threshold, range(count)))
    assert 0 < len(visited) < count if stops else len(visited) == count

    total = {name: torch.zeros_like(weight) for name, weight in WEIGHTS.items()}
    for t in visited:
        for name, value in gradient(drawn[t]).items():
            total[name] += value
    products = {name: WEIGHTS[name] * total[name] for name in WEIGHTS}
    chosen = knobs("diff_pruning", threshold=threshold, calibration_batches=count)
    found = channel_scores(network(), channel_groups(network()), chosen, 0, calibration())
    check(found, products, lambda part: part.abs().sum(), all_of=True)
    assert [t for t, _ in timestep_gradients(network(), chosen, calibration())] == visited
    half = chosen.model_copy(update={"calibration_batches": 3, "threshold": 0.0})
    assert [t for t, _ in timestep_gradients(network(), half, calibration())] == [0, 2, 4]


@pytest.mark.parametrize(
    "changes",
    [
        {"diffusion__weighting": "p2", "diffusion__p2_gamma": 3.0},
        {"diffusion__prediction": "v", "diffusion__weighting": "min_snr"},
        {"diffusion__prediction": "x0", "diffusion__loss": "l1"},
    ],
    ids=lambda changes: ", ".join(map(str, changes.values())),
)
def test_diff_pruning_stops_by_the_error_of_the_noise(changes: dict[str, Any]) -> None:
    """Whatever the network predicts and its loss weighs: (x - alpha x0) / sigma against the noise, by hand."""
    config = tiny_config(**FEW_TIMESTEPS, **changes)
    sample = Calibration.of(digits().train, config, torch.device("cpu"))
    errors, losses = [], []
    for t in range(config.diffusion.timesteps):
        drawn = sample.draws(t, network(), t)
        denoiser = Denoiser.from_config(network(), config.diffusion, config.model, torch.device("cpu"))
        alpha, sigma = denoiser.schedule.at(drawn.t_B, drawn.x0_BCHW)
        x_BCHW = alpha * drawn.x0_BCHW + sigma * drawn.noise_BCHW
        with torch.no_grad():
            noise = (x_BCHW - alpha * denoiser(x_BCHW, drawn.t_B, drawn.labels_B)) / sigma
        errors.append(float((noise - drawn.noise_BCHW).square().mean()))
        losses.append(float(sample.loss(network(), drawn).mean().detach()))

    def visited(values: list[float], threshold: float) -> int:
        return next((t for t, value in enumerate(values) if value < threshold * max(values[: t + 1])), len(values))

    # A threshold at which the loss would stop elsewhere.
    threshold = next(
        share / 50 for share in range(49, 0, -1) if visited(errors, share / 50) != visited(losses, share / 50)
    )
    chosen = knobs("diff_pruning", threshold=threshold, calibration_batches=config.diffusion.timesteps)
    assert len(list(timestep_gradients(network(), chosen, sample))) == visited(errors, threshold)


def test_fisher_squares_the_gradient_of_every_image() -> None:
    squares = {name: torch.zeros_like(weight) for name, weight in WEIGHTS.items()}
    for index in range(BATCHES):
        for one in calibration().draws(index, network()).chunks(3):
            for name, value in gradient(one).items():
                squares[name] += value.square() / (3 * BATCHES)
    products = {name: WEIGHTS[name].square() * squares[name] for name in WEIGHTS}
    check(scores("fisher"), products, lambda part: part.abs().sum(), all_of=True)


def test_the_hessian_is_probed_along_random_signs() -> None:
    """``z * Hz``, here by the difference of two gradients; its mean over all signs is the diagonal."""
    step, expected = 3e-3, {name: torch.zeros_like(weight) for name, weight in WEIGHTS.items()}
    for index in range(BATCHES):
        drawn = calibration().draws(index, network())
        source = generator(calibration().config.seed, Purpose.PRUNE, index)
        signs = {name: torch.randint(2, weight.shape, generator=source) * 2.0 - 1.0 for name, weight in WEIGHTS.items()}
        assert {float(sign) for sign in signs["conv_in.weight"].flatten()} == {-1.0, 1.0}
        ahead, behind = (
            gradient(drawn, {name: WEIGHTS[name] + way * step * sign for name, sign in signs.items()})
            for way in (1, -1)
        )
        for name, sign in signs.items():
            expected[name] += (sign * (ahead[name] - behind[name]) / (2 * step)).float() / BATCHES
    found = hessian(network(), knobs("hessian"), calibration())
    for name, weight in WEIGHTS.items():
        torch.testing.assert_close(found[name], weight.square() * expected[name] / 2, rtol=2e-2, atol=3e-3)
    check(scores("hessian"), found, lambda part: part.sum().abs(), all_of=True)


def test_random_follows_its_seed() -> None:
    first, again, other = scores("random", 1), scores("random", 1), scores("random", 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_calibration_draws_from_streams_of_its_own() -> None:
    same = Calibration.of(digits().train, CONFIG, torch.device("cpu"))
    first = calibration().draws(0, network())
    assert torch.equal(first.noise_BCHW, same.draws(0, network()).noise_BCHW)
    assert torch.equal(first.x0_BCHW, same.draws(0, network(), 3).x0_BCHW)
    assert not torch.equal(first.noise_BCHW, calibration().draws(1, network()).noise_BCHW)
    assert calibration().config.seed != CONFIG.seed


@pytest.mark.parametrize("importance", [name for name, record in IMPORTANCES.items() if record.gradients])
def test_no_more_images_pass_through_the_network_at_once_than_in_training(
    importance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores stay the same."""
    sizes: list[int] = []
    forward = UNet.forward

    def watched(self: UNet, x_BCHW: Tensor, *more: Any, **others: Any) -> Any:
        sizes.append(len(x_BCHW))
        return forward(self, x_BCHW, *more, **others)

    monkeypatch.setattr(UNet, "forward", watched)
    found = []
    for accumulation, processes in ((1, 1), (2, 1), (2, 4)):
        config = tiny_config(**{**FEW_TIMESTEPS, "train__batch_size": 16, "train__accumulation": accumulation})
        images = Calibration.of(digits().train, config, torch.device("cpu"), processes=processes)
        sizes.clear()
        found.append(channel_scores(network(), channel_groups(network()), knobs(importance), 0, images))
        assert max(sizes) <= 16 // accumulation // processes
    for name, score in found[0].items():
        torch.testing.assert_close(found[1][name], score, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(found[2][name], score, rtol=1e-4, atol=1e-9)


def test_float32_takes_twice_the_memory_of_training_with_16_bits() -> None:
    config = tiny_config(**{**FEW_TIMESTEPS, "train__batch_size": 16, "train__precision": "bf16"})
    assert Calibration.of(digits().train, config, torch.device("cpu")).at_once == 8
