"""Guidance within an interval, guidance by a weaker model, and the estimate that a network is shown of its own work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import NUM_CLASSES, cpu, lively, tiny_batches, tiny_config, tiny_network, tiny_state
from torch import Tensor, nn

from diffusion_core.config import CoreConfig, SampleConfig
from diffusion_core.diffusion.denoiser import Denoiser
from diffusion_core.diffusion.losses import diffusion_loss
from diffusion_core.diffusion.predictions import SIGMA_DATA
from diffusion_core.diffusion.schedule import build_schedule
from diffusion_core.model.unet import NO_LABEL, build_network
from diffusion_core.sampling.generation import Generator, requests
from diffusion_core.sampling.guidance import between_levels, decided, guided
from diffusion_core.training.trainer import TrainState, train

CPU = torch.device("cpu")


def inputs(batch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    return torch.randn(batch, 1, 8, 8, generator=source), torch.full((batch,), 20), torch.arange(batch)


def labelled(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """A denoiser whose answer shows label, timestep and image."""
    assert labels is not None
    return torch.tanh(x) + labels.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 50


def weaker(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    assert labels is not None
    return 0.5 * torch.sin(x) + 0.3 * labels.view(-1, 1, 1, 1)


# Within an interval of noise levels.


def test_between_levels_is_open_below_and_closed_above() -> None:
    schedule = build_schedule(tiny_config().diffusion)
    levels = schedule.levels
    applies = between_levels(schedule, float(levels[10]) * (1 + 1e-5), float(levels[30]) * (1 + 1e-5))
    assert applies(torch.arange(50)).nonzero().flatten().tolist() == list(range(11, 31))
    assert applies(torch.tensor([10.5, 29.5, 30.5])).tolist() == [True, True, False]
    pure = build_schedule(
        tiny_config(diffusion__prediction="v", diffusion__zero_terminal_snr=True).diffusion
    )  # An infinite level lies in no interval.
    assert not between_levels(pure, 0.0, 1e30)(torch.tensor([49])).item()


def test_guidance_is_left_off_outside_its_interval() -> None:
    schedule = build_schedule(tiny_config().diffusion)
    applies = between_levels(schedule, float(schedule.levels[10]), float(schedule.levels[30]))
    batches: list[int] = []

    def counted(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        batches.append(len(x))
        return labelled(x, t, labels)

    steps = schedule.steps(50)
    everywhere = guided(labelled, 3.0)
    within = guided(counted, 3.0, applies=applies, known=decided(applies, steps))
    x, _, labels = inputs()
    for step, inside in ((5, False), (20, True), (40, False)):
        t = steps.t(49 - step, x)
        assert t.tolist() == [step] * 4
        found = within(x, t, labels)
        assert torch.equal(found, everywhere(x, t, labels) if inside else labelled(x, t, labels))
        assert batches.pop() == (8 if inside else 4)  # Nor does it cost anything there.
        assert not batches
    mixed = torch.tensor([5, 20, 40, 25])
    found = within(x, mixed, labels)
    assert batches.pop() == 8
    assert torch.equal(found[[0, 2]], labelled(x, mixed, labels)[[0, 2]])
    assert torch.equal(found[[1, 3]], everywhere(x, mixed, labels)[[1, 3]])


def test_a_scale_of_zero_within_an_interval_guides_there_alone() -> None:
    x, t, labels = inputs()
    found = guided(labelled, 0.0, applies=lambda t_B: t_B > 30)(x, t, labels)
    assert torch.equal(found, labelled(x, t, labels))
    found = guided(labelled, 0.0, applies=lambda t_B: t_B < 30)(x, t, labels)
    torch.testing.assert_close(found, labelled(x, t, torch.full_like(labels, NO_LABEL)))


def test_the_interval_of_a_configuration_is_one_of_noise_levels() -> None:
    config = tiny_config(diffusion__timesteps=50)
    network = tiny_network(config)
    batches: list[int] = []
    network.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    settings = SampleConfig(sampler="ddim", steps=50, guidance=2.0, guidance_interval=[0.5, 3.0])
    Generator(network, config, "fp32").batch(requests([3], 2), settings, 0)
    levels = build_schedule(config.diffusion).levels.flip(0)
    assert batches == [4 if 0.5 < level <= 3.0 else 2 for level in levels.tolist()]
    assert 2 < batches.count(4) < 48


def test_steps_know_the_timesteps_that_they_returned_and_no_others() -> None:
    steps = build_schedule(tiny_config().diffusion).steps(5)
    small, large = torch.zeros(2, 1, 8, 8), torch.zeros(7, 1, 8, 8)
    for index in range(5):
        for images in (small, large):
            t_B = steps.t(index, images)
            assert t_B.tolist() == [steps.timesteps[index]] * len(images)
            assert steps.index_of(t_B) == index
            assert steps.index_of(t_B.clone()) is None  # Equal numbers, which only a look would tell.
            assert steps.index_of(t_B.repeat(2)) is None


# By a weaker model.


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_autoguidance_goes_away_from_the_weaker_model(scale: float) -> None:
    """Karras et al. 2024: both see the same label."""
    x, t, labels = inputs()
    found = guided(labelled, scale, reference=weaker)(x, t, labels)
    expected = (1 - scale) * weaker(x, t, labels) + scale * labelled(x, t, labels)
    torch.testing.assert_close(found, expected)
    assert guided(labelled, 1.0, reference=weaker) is labelled


def test_autoguidance_within_an_interval() -> None:
    x, _, labels = inputs()
    t = torch.tensor([5, 20, 5, 20])
    found = guided(labelled, 3.0, reference=weaker, applies=lambda t_B: t_B > 10)(x, t, labels)
    plain, other = labelled(x, t, labels), weaker(x, t, labels)
    torch.testing.assert_close(found[1::2], (other + 3 * (plain - other))[1::2])
    assert torch.equal(found[::2], plain[::2])


MEAN, DEVIATION = 0.2, 0.4


class GaussianNetwork(nn.Module):
    """What the best network would predict if images were independent pixels of N(MEAN, DEVIATION^2)."""

    in_channels, image_size, num_classes = 1, 8, 10

    def __init__(self, config: CoreConfig) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.schedule = build_schedule(config.diffusion)
        self.prediction = config.diffusion.prediction

    def forward(self, inputs: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        alpha, sigma = self.schedule.at(t, inputs)
        level = sigma / alpha
        total = level**2 + SIGMA_DATA**2
        x = inputs * alpha * total.sqrt() if self.prediction == "edm" else inputs
        x0 = clean(x / alpha, level)
        eps = (x - alpha * x0) / sigma
        if self.prediction == "edm":
            return (x0 - SIGMA_DATA**2 / total * x / alpha) / (level * SIGMA_DATA / total.sqrt())
        return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[self.prediction]


def gaussian_generator(config: CoreConfig, **more: Any) -> Generator:
    network: Any = GaussianNetwork(config)
    return Generator(network, config, "fp32", **more)


def clean(y: Tensor, level: Tensor) -> Tensor:
    """The posterior mean, given y = x / alpha."""
    return MEAN + DEVIATION**2 / (DEVIATION**2 + level**2) * (y - MEAN)


FORMULATIONS: dict[str, dict[str, Any]] = {
    "linear eps": {"diffusion__schedule": "linear", "diffusion__timesteps": 1000},
    "cosine v": {"diffusion__schedule": "cosine", "diffusion__prediction": "v", "diffusion__timesteps": 300},
    "sigmoid x0": {"diffusion__schedule": "sigmoid", "diffusion__prediction": "x0", "diffusion__timesteps": 100},
    "karras edm": {"diffusion__schedule": "karras", "diffusion__prediction": "edm", "diffusion__timesteps": 200},
}


@pytest.mark.parametrize("other", FORMULATIONS)
@pytest.mark.parametrize("own", FORMULATIONS)
@torch.no_grad()
def test_a_model_of_another_schedule_denoises_the_images_of_this_one(own: str, other: str) -> None:
    config, theirs = tiny_config(**FORMULATIONS[own]), tiny_config(**FORMULATIONS[other])
    schedule = build_schedule(config.diffusion)
    translated = gaussian_generator(theirs).at_levels_of(schedule)
    # Levels beyond those that it was trained with it takes for the nearest of them.
    lowest = max(0.05, float(build_schedule(theirs.diffusion).levels[0]))
    inside = (schedule.levels > lowest) & (schedule.levels < 20)
    t = inside.nonzero().flatten()
    t = t[:: max(1, len(t) // 20)]
    x0 = torch.rand(len(t), 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    for told in (t, t[:-1].float() + 0.3):  # Also where this one's sampler visits positions between timesteps.
        x = schedule.add_noise(x0[: len(told)], noise[: len(told)], told)
        alpha, sigma = schedule.at(told, x)
        found = translated(x, told, None)
        torch.testing.assert_close(found, clean(x / alpha, sigma / alpha), rtol=1e-3, atol=2e-4)


@torch.no_grad()
def test_a_model_of_another_schedule_is_shown_pure_noise_as_strong_as_it_knows_it() -> None:
    """At zero terminal SNR there is no signal to scale by; the other model's last timestep stands in."""
    config = tiny_config(diffusion__prediction="v", diffusion__zero_terminal_snr=True)
    schedule = build_schedule(config.diffusion)
    assert schedule.alphas[-1] == 0.0
    noise, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((3,), 49)
    for theirs in (tiny_config(**FORMULATIONS["linear eps"]), tiny_config(**FORMULATIONS["karras edm"])):
        own, last = build_schedule(theirs.diffusion), theirs.diffusion.timesteps - 1
        other = gaussian_generator(theirs)
        expected = other.denoiser()(noise * own.alphas[-1].hypot(own.sigmas[-1]).float(), torch.full((3,), last), None)
        torch.testing.assert_close(other.at_levels_of(schedule)(noise, t, None), expected, rtol=1e-3, atol=1e-3)
    reference = Generator(tiny_network(tiny_config(), seed=1), tiny_config(), "fp32")
    settings = SampleConfig(sampler="ddim", steps=4, guidance=2.0)
    images = Generator(tiny_network(config), config, "fp32", reference).batch(requests([1], 2), settings, 0)
    assert torch.isfinite(images).all()


@torch.no_grad()
def test_a_reference_reaches_the_sampler() -> None:
    config, theirs = tiny_config(**FORMULATIONS["linear eps"]), tiny_config(**FORMULATIONS["karras edm"])
    same = gaussian_generator(theirs)
    plain = gaussian_generator(config)
    beside_itself = gaussian_generator(config, reference=same)
    wanted = requests([1], 4)
    settings = SampleConfig(sampler="euler", steps=20, clip_x0=False, spacing="karras")
    expected = plain.batch(wanted, settings, 0)
    # One that knows as much changes nothing; another one does.
    found = beside_itself.batch(wanted, settings.model_copy(update={"guidance": 2.0}), 0)
    assert (found - expected).abs().max() < 0.02
    trained = tiny_config()
    away = Generator(tiny_network(trained), trained, "fp32", reference=Generator(tiny_network(seed=1), trained, "fp32"))
    one, other = (away.batch(wanted, settings.model_copy(update={"guidance": scale}), 0) for scale in (1.0, 2.0))
    assert (one - other).abs().max() > 0.05


# Self-conditioning.


class Recorder:
    """A self-conditioned network that keeps what it is shown."""

    def __init__(self) -> None:
        self.shown: list[Tensor] = []

    def __call__(self, inputs: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        image, estimate = inputs.chunk(2, dim=1)
        self.shown.append(estimate)
        assert labels is not None
        return 2.0 * torch.tanh(image) + 0.1 * labels.view(-1, 1, 1, 1) + 0.1 * estimate


def self_conditioned() -> tuple[Recorder, Denoiser]:
    network = Recorder()
    return network, Denoiser(network, build_schedule(tiny_config().diffusion), "x0", self_conditioning=True)


def test_the_first_call_sees_nothing_and_each_other_one_the_last_estimate() -> None:
    network, denoiser = self_conditioned()
    x, t, labels = inputs()
    first = denoiser(x, t, labels)
    second = denoiser(x, t - 1, labels)
    denoiser(x, t - 2, labels)
    assert not network.shown[0].any()
    assert first.abs().max() > 1.0
    assert torch.equal(network.shown[1], first.clamp(-1, 1))
    assert torch.equal(network.shown[2], second.clamp(-1, 1))
    fresh, again = self_conditioned()
    again(x, t, labels)
    assert not fresh.shown[0].any()


def test_under_guidance_each_half_sees_its_own_estimate_and_the_labelled_one_outlives_the_interval() -> None:
    network, denoiser = self_conditioned()
    x, _, labels = inputs()
    steps = denoiser.schedule.steps(50)

    def applies(t_B: Tensor) -> Tensor:
        return (t_B > 10) & (t_B < 30)

    within = guided(denoiser, 2.0, applies=applies, known=decided(applies, steps))
    for step in (40, 20, 15, 5):
        within(x, steps.t(49 - step, x), labels)
    assert [len(shown) for shown in network.shown] == [4, 8, 8, 4]
    alone = network.shown[1]
    assert torch.equal(alone[:4], alone[4:])  # Doubled: both start from the estimate of before.
    with_label, without = network.shown[2].chunk(2)
    assert (with_label - without).abs().max() > 0.05
    # Halved again: it goes on with the labels' estimate.
    raw = Recorder()(torch.cat([x, with_label], dim=1), torch.full((4,), 15), labels)
    torch.testing.assert_close(network.shown[3], raw.clamp(-1, 1))


def test_in_training_who_is_shown_an_estimate_sees_that_of_a_first_pass_without_gradient() -> None:
    config = tiny_config(model__self_conditioning=True)
    network = tiny_network(config)
    seen: list[tuple[Tensor, bool]] = []
    network.register_forward_pre_hook(lambda _, given: seen.append((given[0], torch.is_grad_enabled())))
    denoiser = Denoiser.from_config(network, config.diffusion, config.model, CPU)
    source = torch.Generator().manual_seed(0)
    x0, noise = torch.rand(4, 1, 8, 8, generator=source) * 2 - 1, torch.randn(4, 1, 8, 8, generator=source)
    t, labels = torch.tensor([5, 15, 25, 30]), torch.arange(4)
    shown = torch.tensor([True, False, True, False])
    diffusion_loss(denoiser, x0, noise, t, labels, config.diffusion, shown).sum().backward()
    (first, first_learns), (second, second_learns) = seen
    assert (first_learns, second_learns) == (False, True)
    x = denoiser.schedule.add_noise(x0, noise, t)
    assert torch.equal(first, torch.cat([x, torch.zeros_like(x)], dim=1))
    with torch.no_grad():
        expected = denoiser.clean(network(first, t, labels), x, t).clamp(-1, 1)
    assert torch.equal(second[:, :1], x)
    torch.testing.assert_close(second[shown][:, 1:], expected[shown])
    assert expected[shown].abs().max() > 0.1
    assert not second[~shown][:, 1:].any()


def test_training_shows_about_half_of_the_images_an_estimate() -> None:
    config = tiny_config(model__self_conditioning=True, train__steps=12, train__batch_size=32)
    state = TrainState.start(lively(build_network(config, NUM_CLASSES)), config.train, config.ema)
    given: list[Tensor] = []
    state.network.register_forward_pre_hook(
        lambda _, inputs: given.append(inputs[0][:, 1]) if torch.is_grad_enabled() else None
    )
    train(state, tiny_batches(config), config, accelerator=cpu())
    shown = torch.cat(given).flatten(1).abs().amax(dim=1) > 0
    assert len(shown) == 12 * 32
    assert shown.float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / len(shown) ** 0.5)
    assert not torch.equal(shown[:32], shown[32:64])


def test_images_of_a_self_conditioned_network_do_not_depend_on_the_batch_size() -> None:
    config = tiny_config(model__self_conditioning=True)
    network = tiny_network(config)

    def images(batch_size: int) -> Tensor:
        settings = SampleConfig(
            sampler="ddim", steps=5, guidance=2.0, guidance_interval=[0.1, 3.0], batch_size=batch_size
        )
        return Generator(network, config, "fp32").images(requests([2, 5], 3), settings, 0).int()

    whole = images(6)
    for batch_size in (1, 4):
        assert (images(batch_size) - whole).abs().max() <= 1


def test_a_network_without_self_conditioning_is_shown_nothing() -> None:
    state = tiny_state(tiny_config())
    widths: list[int] = []
    state.network.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    train(state, tiny_batches(tiny_config()), tiny_config(), accelerator=cpu(), until=2)
    assert widths == [1, 1]
