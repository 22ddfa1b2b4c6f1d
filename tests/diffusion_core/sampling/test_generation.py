"""Drawing images: an image of a (seed, label, index) is the same in whatever company it is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny import tiny_config, tiny_network
from torch import Tensor

from diffusion_core.config import CoreConfig, SampleConfig
from diffusion_core.data.datasets import to_uint8
from diffusion_core.diffusion.schedule import build_schedule
from diffusion_core.model.unet import NO_LABEL, UNet, build_network
from diffusion_core.sampling.generation import Generator, ImageNoise, Request, all_labels, requests
from diffusion_core.terminal import progress
from diffusion_core.training.ema import Ema

CONFIG = tiny_config()
WANTED = requests(range(10), 3)


def drawing(config: CoreConfig = CONFIG) -> Generator:
    """Draws from a network that denoises, if to no end: it sees ``alpha x_t`` and a pattern of its own in the noise.

    An untrained one would leave all noise where it is, and images all black and white, where no difference shows.
    """
    network = tiny_network(config)
    schedule = build_schedule(config.diffusion)

    def pattern(_network: UNet, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        alpha, sigma = schedule.at(inputs[1], inputs[0])
        return sigma * inputs[0] + 0.3 * alpha * output

    network.register_forward_hook(pattern)
    return Generator(network, config, "fp32")


def sample(**changes: object) -> SampleConfig:
    return CONFIG.sample.model_copy(update={"sampler": "ddpm", "steps": 6, **changes})


def draw(wanted: Sequence[Request], seed: int = 0, **changes: object) -> Tensor:
    return drawing().images(wanted, sample(**changes), seed)


def distance(one: Tensor, other: Tensor) -> int:
    return int((one.int() - other.int()).abs().max())


def test_noise_of_an_image_does_not_depend_on_its_company() -> None:
    def noise(wanted: Sequence[Request], shape: tuple[int, int, int], draws: int = 3) -> Tensor:
        source = ImageNoise(wanted, 7, shape, torch.device("cpu"))
        return torch.stack([source() for _ in range(draws)], dim=1)

    for shape in ((1, 8, 8), (3, 5, 7), (1, 3, 3)):  # Also sizes that are no multiple of a vector's.
        together = noise(WANTED, shape)
        backwards = noise(WANTED[::-1], shape)
        for i, image in enumerate(WANTED):
            assert torch.equal(together[i], noise([image], shape)[0])
            assert torch.equal(together[i], backwards[-1 - i])
        flat = together.flatten(1)
        assert len({tuple(row.tolist()) for row in flat}) == len(WANTED)
    many = noise(WANTED, (1, 8, 8), 20)
    assert many.mean().abs() < 0.03
    assert (many.std() - 1).abs() < 0.03
    assert not torch.equal(many[:, 0], many[:, 1])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_images_do_not_depend_on_the_batch_size(sampler: str, guidance: float) -> None:
    whole = draw(WANTED, sampler=sampler, guidance=guidance)
    assert 20 < whole.float().std() < 110
    assert len(whole.unique()) > 100
    assert whole.dtype == torch.uint8
    assert whole.shape == (30, 1, 8, 8)
    for batch_size in (1, 7, 29):
        assert distance(whole, draw(WANTED, sampler=sampler, guidance=guidance, batch_size=batch_size)) <= 1


def test_images_depend_neither_on_neighbours_nor_on_order() -> None:
    whole = draw(WANTED)
    order = torch.randperm(len(WANTED), generator=torch.Generator().manual_seed(0))
    assert distance(draw([WANTED[i] for i in order]), whole[order]) <= 1
    assert distance(draw([Request(4, 2)]), whole[WANTED.index(Request(4, 2))][None]) <= 1
    assert distance(draw(requests([7], 50))[:3], whole[21:24]) <= 1


def test_seeds_labels_and_indices_make_different_images() -> None:
    images = [*draw(WANTED), *draw(WANTED, seed=1), *draw([Request(NO_LABEL, 0)])]
    for i, one in enumerate(images):
        assert all(distance(one, other) > 3 for other in images[:i])


def test_the_label_reaches_the_network() -> None:
    """With the same noise, other labels make other images; with guidance 0 they do not."""
    generator = drawing()
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([30])

    def denoise(label: int, guidance: float) -> Tensor:
        with torch.no_grad():
            denoiser = generator.guided(generator.denoiser(), sample(guidance=guidance, clip_x0=False))
            return denoiser(x, t, torch.tensor([label]))

    assert not torch.allclose(denoise(1, 1.0), denoise(2, 1.0))
    assert torch.equal(denoise(1, 0.0), denoise(2, 0.0))
    plain, strong, none = denoise(1, 1.0), denoise(1, 3.0), denoise(1, 0.0)
    torch.testing.assert_close(strong - none, 3 * (plain - none), rtol=1e-3, atol=1e-4)


def test_clipping_is_the_last_word() -> None:
    config = CONFIG
    wild = tiny_network(config)
    with torch.no_grad():
        wild.conv_out.weight *= 10
    generator = Generator(wild, config, "fp32")
    assert generator.batch(WANTED, sample(clip_x0=True, guidance=5.0), 0).abs().max() == 1.0
    assert generator.batch(WANTED, sample(clip_x0=False), 0).abs().max() > 1.0


def test_trajectory_ends_with_the_images() -> None:
    frames = drawing().trajectory(WANTED[:4], sample(), 0, {0, 2, 5})
    assert len(frames) == 4
    assert all(frame.shape == (4, 1, 8, 8) and frame.dtype == torch.uint8 for frame in frames)
    assert torch.equal(frames[-1], draw(WANTED[:4]))
    noise = ImageNoise(WANTED[:4], 0, (1, 8, 8), torch.device("cpu"))()
    assert torch.equal(frames[0], to_uint8(noise))  # The first one is pure noise.
    assert distance(frames[1], frames[2]) > 3


def test_sampling_has_no_side_effects() -> None:
    generator = drawing()
    before = {name: tensor.clone() for name, tensor in generator.network.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = generator.images(WANTED[:5], sample(), 3)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(6)
    assert torch.equal(first, generator.images(WANTED[:5], sample(), 3))
    assert all(torch.equal(before[name], tensor) for name, tensor in generator.network.state_dict().items())
    assert not generator.batch(WANTED[:2], sample(), 3).requires_grad


def test_dropout_is_off() -> None:
    config = tiny_config(model__dropout=0.9)
    network = build_network(config, 10).train()
    network.load_state_dict(tiny_network(config).state_dict())
    averaged = Ema(network, config.ema).network  # What a trial samples from.
    one, other = (Generator(averaged, config, "fp32").images(WANTED[:3], sample(), 0) for _ in range(2))
    assert torch.equal(one, other)
    assert network.training


def test_requests_go_label_by_label() -> None:
    assert requests([3, 1], 2) == [Request(3, 0), Request(3, 1), Request(1, 0), Request(1, 1)]
    assert all_labels(tiny_network()) == list(range(10))
    assert all_labels(tiny_network(tiny_config(model__class_conditional=False))) == [NO_LABEL]


def test_a_network_without_labels_draws_too() -> None:
    generator = drawing(tiny_config(model__class_conditional=False))
    images = generator.images(requests([NO_LABEL], 4), sample(), 0)
    assert images.shape == (4, 1, 8, 8)
    assert distance(images[0], images[1]) > 3


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    drawing().images(WANTED[:2], sample(), 0, progress=False)
    assert capsys.readouterr() == ("", "")
    drawing().images(WANTED[:2], sample(), 0, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "sampling: 12 of 12" in shown.err
