"""Upsampling: the mathematics by brute force, the draws of a step, and that the small image reaches every network."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY, assert_same_tensors, digits, tiny_batches, tiny_config, tiny_network
from torch import Tensor

from agent.config import build_config
from agent.trial import run_trial
from diffusion_core.checkpoint import list_checkpoints, read_checkpoint
from diffusion_core.config import FORMULATIONS, ConfigError, CoreConfig
from diffusion_core.data.datasets import DataError, Dataset, Images, to_uint8, to_unit
from diffusion_core.diffusion.denoiser import Denoiser
from diffusion_core.diffusion.draws import draw
from diffusion_core.diffusion.objective import Denoising
from diffusion_core.diffusion.schedule import build_schedule
from diffusion_core.diffusion.upsampling import given, lowered, raised
from diffusion_core.evaluation.validation import validation_losses
from diffusion_core.model.unet import build_network
from diffusion_core.sampling.generation import Generator, Request, requests
from diffusion_core.sampling.lows import HeldOut
from diffusion_core.step_distillation.teaching import like
from diffusion_core.tracking import MemoryTracker

TWICE = {"upsample__factor": 2}
SOURCE = torch.Generator().manual_seed(0)


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=SOURCE)


def bilinear_by_hand(low_HW: np.ndarray, size: int) -> np.ndarray:
    """Pixel centres are at (i + 0.5) / size of the picture; beyond the outermost centres, the edge goes on."""
    small = len(low_HW)
    result = np.empty((size, size))
    for row in range(size):
        for column in range(size):
            y, x = ((at + 0.5) * small / size - 0.5 for at in (row, column))
            value = 0.0
            for i in (math.floor(y), math.floor(y) + 1):
                for j in (math.floor(x), math.floor(x) + 1):
                    weight = (1 - abs(y - i)) * (1 - abs(x - j))
                    value += weight * low_HW[min(max(i, 0), small - 1), min(max(j, 0), small - 1)]
            result[row, column] = value
    return result


@pytest.mark.parametrize("factor", [2, 4])
def test_a_small_image_has_the_mean_of_each_block(factor: int) -> None:
    x = images(2, 3, 8, 8)
    small = lowered(x, factor)
    for row in range(8 // factor):
        for column in range(8 // factor):
            block = x[:, :, row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
            torch.testing.assert_close(small[:, :, row, column], block.sum((2, 3)) / factor**2)


def test_the_network_is_given_the_noisy_small_image_enlarged_and_its_level() -> None:
    low, noise, level = images(3, 2, 3, 3), images(3, 2, 3, 3), torch.tensor([0.0, 0.6, 1.0])
    found = given(low, level, noise, 6)
    assert found.shape == (3, 3, 6, 6)
    for index, amount in enumerate((0.0, 0.6, 1.0)):
        for channel in range(2):
            noisy = math.sqrt(1 - amount**2) * low[index, channel] + amount * noise[index, channel]
            expected = bilinear_by_hand(noisy.double().numpy(), 6)
            np.testing.assert_allclose(found[index, channel].numpy(), expected, atol=1e-5)
        assert found[index, 2].unique().tolist() == pytest.approx([amount])


def test_the_noise_preserves_the_variance() -> None:
    low, noise = images(1, 1, 100, 100), images(1, 1, 100, 100)
    for amount in (0.3, 0.8):
        found = given(low, torch.tensor([amount]), noise, 100)[:, :1]  # At equal size, nothing is enlarged.
        assert found.var().item() == pytest.approx(1.0, abs=0.08)


def drawn(config: CoreConfig, step: int = 3, **place: Any) -> Any:
    return draw(step, tiny_batches(config, **place), config, build_schedule(config.diffusion))


def test_small_images_are_those_of_the_batch_with_levels_from_zero_to_the_largest() -> None:
    config = tiny_config(train__batch_size=512, upsample__noise=0.4, **TWICE)
    found = drawn(config)
    level = found.given_BCHW[:, 1, 0, 0]
    assert 0.0 <= level.min() < 0.02
    assert 0.38 < level.max() <= 0.4
    assert level.mean().item() == pytest.approx(0.2, abs=5 * 0.4 / math.sqrt(12 * 512))
    # Without noise, it is the small image itself.
    exact = drawn(tiny_config(train__batch_size=512, upsample__noise=0.0, **TWICE))
    torch.testing.assert_close(exact.given_BCHW[:, :1], raised(lowered(exact.x0_BCHW, 2), 8))
    assert not exact.given_BCHW[:, 1].any()


@pytest.mark.parametrize("version", [1, 2, 3])
def test_an_ordinary_model_draws_as_before(version: int) -> None:
    """Small images take their numbers from a stream of their own."""
    plain, upsampling = (drawn(tiny_config(draws=version, diffusion__offset_noise=0.2, **more)) for more in ({}, TWICE))
    for one, other in zip(plain.tensors()[:-1], upsampling.tensors()[:-1], strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert plain.given_BCHW is None
    assert upsampling.given_BCHW is not None


def noises(version: int, size: int, factor: int | None) -> tuple[Tensor, Tensor | None]:
    """Return the noise of an image, and the first channel that the model is shown of a noisy small image (grey)."""
    knobs = {"upsample__factor": factor, "upsample__noise": 0.5, "upsample__sample_noise": 0.5}
    more: dict[str, Any] = knobs if factor else {}
    flat: dict[str, Any] = {"model__channel_multipliers": [1], "model__attention_resolutions": []}
    config = tiny_config(draws=version, data__image_size=size, **flat, **more)
    grey = torch.full((1, 1, 8, 8), 128, dtype=torch.uint8)
    model = Generator(build_network(config, 10), config, "fp32", lows=lambda _: grey)
    wanted = [Request(3, 1)]
    given_BCHW = model.given(wanted, 5)
    return model.noise(wanted, 5)().flatten(), None if given_BCHW is None else given_BCHW[0, 0]


@pytest.mark.parametrize(("version", "shared"), [(1, True), (2, True), (3, False)])
def test_models_of_a_chain_draw_noise_of_their_own(version: int, shared: bool) -> None:
    """From version 3 on. Models of earlier versions keep what they shared."""
    (base, _), (up, low), (large, low_of_large) = (noises(version, *of) for of in ((8, None), (16, 2), (32, 4)))
    first = [numbers[:32].tolist() for numbers in (base, up, large)]
    assert (first[0] == first[1]) == shared
    assert (first[1] == first[2]) == shared
    assert low is not None
    assert low_of_large is not None
    assert (low[0, 0].item() == low_of_large[0, 0].item()) == shared  # A corner is that of the small image.
    assert torch.equal(noises(2, 8, None)[0], noises(3, 8, None)[0])


class Recorder:
    """A network that answers with zeros and keeps its inputs."""

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs
        self.asked: list[Tensor] = []

    def __call__(self, x: Tensor, _t: Tensor, _labels: Tensor | None) -> Tensor:
        self.asked.append(x)
        return torch.zeros(len(x), self.outputs, *x.shape[2:])


@pytest.mark.parametrize("name", FORMULATIONS)
def test_every_formulation_is_given_the_small_image(name: str) -> None:
    config = tiny_config(**{key.replace(".", "__"): value for key, value in FORMULATIONS[name].items()}, **TWICE)
    draws, network = drawn(config), Recorder(2 if config.model.learned_variance else 1)
    denoiser = Denoiser.from_config(network, config.diffusion, config.model, torch.device("cpu"))
    objective = Denoising(config.diffusion, lambda *_: draws)
    objective.loss(denoiser.with_given(draws.given_BCHW), draws)
    taken = tiny_network(config).input_channels
    assert taken == (4 if config.model.self_conditioning else 3)
    for inputs in network.asked:
        assert inputs.shape[1] == taken
        assert torch.equal(inputs[:, -2:], draws.given_BCHW)
    network.asked.clear()
    objective.loss(denoiser, draws)
    assert network.asked[0].shape[1] == taken - 2, "the denoiser itself is not changed"


def test_a_teacher_is_given_the_same_and_a_doubled_batch_twice() -> None:
    config, network = tiny_config(**TWICE), Recorder(1)
    draws = drawn(config)
    denoiser = Denoiser.from_config(network, config.diffusion, config.model, torch.device("cpu"))
    teacher = like(denoiser.with_given(draws.given_BCHW), network)  # type: ignore[arg-type]
    teacher(draws.x0_BCHW.repeat(2, 1, 1, 1), draws.t_B.repeat(2), None)
    assert torch.equal(network.asked[0][:, -2:], draws.given_BCHW.repeat(2, 1, 1, 1))


# Sampling


class Tenths:
    """Small images whose value is the label's, in tenths."""

    def __call__(self, wanted: Any) -> Tensor:
        return torch.stack([torch.full((1, 4, 4), 25 * image.label, dtype=torch.uint8) for image in wanted])


def generator(**changes: Any) -> Generator:
    config = tiny_config(**TWICE, **changes)
    return Generator(tiny_network(config), config, "fp32", lows=Tenths())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_image_depends_on_its_small_image_and_on_no_other(guidance: float) -> None:
    model = generator(sample__guidance=guidance)
    wanted = requests([0, 9], 2)
    whole = model.images(wanted, model.config.sample, 0).int()
    apart = model.config.sample.model_copy(update={"batch_size": 1})
    assert (whole - model.images(wanted, apart, 0).int()).abs().max() <= 1
    model.lows = lambda wanted: 255 - Tenths()(wanted)
    changed = (whole - model.images(wanted, model.config.sample, 0).int()).abs().flatten(1).amax(1)
    assert (changed > 1).all()


def test_noise_of_the_small_image_is_drawn_by_request() -> None:
    model, noisy = generator(), generator(upsample__noise=0.5, upsample__sample_noise=0.5)
    wanted = [Request(2, 0), Request(2, 1), Request(7, 0)]
    plain, found = model.given(wanted, 0), noisy.given(wanted, 0)
    assert plain is not None
    assert found is not None
    assert torch.equal(plain[0], plain[1])
    assert not torch.equal(found[0], found[1])
    assert found[:, 1].unique().tolist() == [0.5]
    assert torch.equal(noisy.given(wanted[1:], 0), found[1:])  # type: ignore[arg-type]
    assert not torch.equal(noisy.given(wanted, 1), found)  # type: ignore[arg-type]


def test_a_weaker_model_that_upsamples_is_given_the_same() -> None:
    model, weak = generator(), generator(seed=1)
    weak.network.load_state_dict(tiny_network(weak.config, seed=5).state_dict())
    sample = model.config.sample.model_copy(update={"guidance": 2.0})
    wanted = requests([3], 2)
    own = Generator(model.network, model.config, "fp32", reference=model, lows=Tenths())
    # Guiding away from itself changes nothing.
    assert (own.images(wanted, sample, 0).int() - model.images(wanted, model.config.sample, 0).int()).abs().max() <= 1
    away = Generator(model.network, model.config, "fp32", reference=weak, lows=Tenths())
    assert (away.images(wanted, sample, 0).int() - own.images(wanted, sample, 0).int()).abs().max() > 1


def test_a_model_that_upsamples_needs_small_images_of_its_size() -> None:
    config = tiny_config(**TWICE)
    with pytest.raises(ConfigError, match="no small images"):
        Generator(tiny_network(config), config, "fp32")
    wrong = Generator(tiny_network(config), config, "fp32", lows=lambda wanted: torch.zeros(len(wanted), 1, 8, 8))
    with pytest.raises(ValueError, match=r"small images of \(1, 8, 8\); expected \(1, 4, 4\)"):
        wrong.images(requests([1], 1), config.sample, 0)


def test_held_out_images_are_taken_by_class_and_index_again_and_again() -> None:
    lows, val = HeldOut(digits(), 4), digits().val
    of_three = (val.labels_N == 3).nonzero()[:, 0].tolist()
    wanted = [Request(3, 0), Request(3, 1), Request(3, len(of_three)), Request(-1, 7)]
    expected = val.images_NCHW[[of_three[0], of_three[1], of_three[0], 7]]
    assert torch.equal(lows.originals(wanted), expected)
    blocks = expected.float().unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5))
    assert (lows(wanted).float() - blocks).abs().max() <= 0.5
    assert torch.equal(lows(wanted), to_uint8(lowered(to_unit(expected), 4)))
    some = val.select((val.labels_N != 3).nonzero()[:, 0])
    with pytest.raises(DataError, match="class '3': no held-out image to upsample"):
        HeldOut(Dataset(digits().train, Images(some.images_NCHW, some.labels_N), digits().class_names), 4)


def test_the_validation_loss_is_that_of_the_level_in_sampling() -> None:
    config = tiny_config(**TWICE)
    network = tiny_network(config)

    def losses(**changes: Any) -> Tensor:
        return validation_losses(network, digits().val, tiny_config(**TWICE, **changes), "fp32")[0]

    assert torch.equal(losses(), losses(upsample__noise=0.9))
    assert torch.equal(losses(), losses())
    assert not torch.equal(losses(), losses(upsample__sample_noise=0.2))


# Whole trials

QUIET: dict[str, Any] = TINY | {
    "model.channel_multipliers": [1],
    "model.attention_resolutions": [],
    "upsample.factor": 2,
    "sample.steps": 2,
    "diffusion.prediction": "v",
    "eval.every": 4,
    "eval.num_images": 20,
    "eval.val_images": 16,
    "eval.consistency_images": 4,
    "checkpoint.keep": 9,
    "checkpoint.best_metric": "train/loss",
    "sample.every": 0,
    "model.dropout": 0.1,
}
TRIALS: dict[str, dict[str, Any]] = {
    "plain": {"model.self_conditioning": True, "sample.guidance": 2.0},
    "masks": {"prune.method": "magnitude", "prune.step": 2},
    "channels and blocks": {"prune.method": "structured", "prune.step": 2, "prune.blocks": ["middle.1"]},
    "taught": {"prune.method": "structured", "prune.step": 2, "distill.output": 1.0, "distill.features": 1.0},
    "consistency": {"steps.method": "consistency", "steps.guidance": 2.0},
    "consistency distillation": {"steps.method": "consistency_distillation"},
    "progressive": {"steps.method": "progressive", "steps.start": 4, "steps.target": 2},
}


def trial(folder: Path, *knobs: dict[str, Any]) -> MemoryTracker:
    tracker = MemoryTracker()
    run_trial(build_config(QUIET, *knobs), tracker, dataset=digits(), folder=folder, run_id=folder.name)
    return tracker


SLOW = ("taught", "consistency distillation", "masks")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in TRIALS])
def test_a_trial_that_upsamples_is_trained_pruned_distilled_and_resumed(name: str, tmp_path: Path) -> None:
    """The resumed run equals the unbroken one bit for bit."""
    every = {"checkpoint.every": 4}
    tracker = trial(tmp_path / "whole", TRIALS[name], every)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    *earlier, newest = list_checkpoints(tmp_path / "cut" / "checkpoints")
    assert earlier
    shutil.rmtree(newest)
    (tmp_path / "cut" / "result.json").unlink()
    again = trial(tmp_path / "cut", TRIALS[name], every)
    whole, cut = (read_checkpoint(list_checkpoints(tmp_path / run / "checkpoints")[-1]) for run in ("whole", "cut"))
    assert set(whole.parts) == set(cut.parts)
    for part in whole.parts:
        assert_same_tensors(whole.tensors(part), cut.tensors(part))
    assert whole.network().input_channels == (4 if name == "plain" else 3)
    last = tracker.rows[-1]
    assert {key: last[key] for key in last if key.startswith(("eval/", "bilinear/"))} == {
        key: again.rows[-1][key] for key in last if key.startswith(("eval/", "bilinear/"))
    }
    assert "upsampled=2x from held-out images" in tracker.figures["protocol/eval/class_agreement"]
    if "prune.method" in TRIALS[name]:
        assert 0.0 < tracker.figures["prune/consistency_mse_4"] < 4.0
        small = whole.tensors("dense_images")["lows"]
        assert torch.equal(small, HeldOut(digits(), 2)([Request(label, 0) for label in range(4)]))


def test_bilinear_interpolation_is_judged_beside_the_model(tmp_path: Path) -> None:
    """By the figures of the classifier on images that are enlarged here."""
    from diffusion_core.evaluation.classifier.classifier import classifier_for

    tracker = trial(tmp_path / "run", {"eval.figures": ["diversity"]})
    lows = HeldOut(digits(), 2)
    wanted = [Request(label, index) for index in range(2) for label in range(10)]
    enlarged = to_uint8(torch.nn.functional.interpolate(to_unit(lows(wanted)), scale_factor=2.0, mode="bilinear"))
    classifier = classifier_for(digits(), "digits", mirrored=False, device=torch.device("cpu"))
    expected = classifier.class_agreement(enlarged, [image.label for image in wanted])
    last = tracker.rows[-1]
    assert last["bilinear/eval/class_agreement"] == pytest.approx(expected)
    assert last["bilinear/eval/diversity_20"] > 0.0
    assert {key for key in last if key.startswith("bilinear/")} == {
        f"bilinear/{key}" for key in last if key.startswith("eval/")
    }


def test_the_grid_shows_small_image_sample_and_held_out_image(tmp_path: Path) -> None:
    from PIL import Image

    trial(tmp_path / "run", {"sample.per_class": 2, "eval.classifier": "none"})
    (grid,) = (tmp_path / "run" / "samples").glob("samples-*.png")
    pixels = np.asarray(Image.open(grid).convert("L"))
    factor, gap = 6, 2  # 8 pixels are shown as 48.
    pitch, lows = 8 * factor + gap, HeldOut(digits(), 2)
    left = pixels.shape[1] - gap - 6 * pitch + gap
    for row, index in ((0, 0), (7, 1)):
        top, lefts = gap + row * pitch, [left + (3 * index + column) * pitch for column in range(3)]
        tiles = [pixels[top : top + 48 : factor, start : start + 48 : factor] for start in lefts]
        request = [Request(row, index)]
        assert np.array_equal(tiles[0], lows(request)[0, 0].numpy().repeat(2, 0).repeat(2, 1))
        assert np.array_equal(tiles[2], lows.originals(request)[0, 0].numpy())
        assert not np.array_equal(tiles[1], tiles[2])
