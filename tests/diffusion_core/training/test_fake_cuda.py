"""What would go wrong on a GPU, seen without one: mixed devices, hidden synchronisations, recompilations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, OneDevice, cuda_autocast, fake_tensors
from tiny import NUM_CLASSES, cpu, digits, lively, tiny_batches, tiny_config, tiny_network, tiny_state
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException

from diffusion_core.config import CoreConfig, SampleConfig, StepsConfig
from diffusion_core.diffusion.denoiser import Denoiser
from diffusion_core.diffusion.draws import Draws, draw
from diffusion_core.diffusion.losses import diffusion_loss
from diffusion_core.diffusion.objective import Denoising, Objective
from diffusion_core.diffusion.schedule import build_schedule
from diffusion_core.model import compilation
from diffusion_core.model.structure import maskable
from diffusion_core.model.unet import UNet, build_network
from diffusion_core.sampling.generation import Generator, requests
from diffusion_core.sampling.guidance import between_levels, decided, guided
from diffusion_core.sampling.samplers import steps_of
from diffusion_core.step_distillation.consistency import ConsistencyTuning
from diffusion_core.step_distillation.progressive import ProgressiveDistillation
from diffusion_core.step_distillation.teaching import Lesson
from diffusion_core.training.distillation import Distillation
from diffusion_core.training.ema import Ema
from diffusion_core.training.trainer import TrainState, build_optimizer, train
from pruning.masks.mask import hold_masks
from pruning.masks.strategies import global_magnitude

BATCH = 8
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"model__dropout": 0.1},
    "everything": {
        "model__self_conditioning": True,
        "model__learned_variance": True,
        "model__conditioning": "scale_shift",
        "ema__power_widths": [0.1],
        "ema__average_from": 1,
        "upsample__factor": 2,
    },
    "edm": {"diffusion__prediction": "edm", "diffusion__schedule": "linear"},
    "unlabelled": {"model__class_conditional": False},
}


def on_gpu(config: CoreConfig) -> UNet:
    with CUDA:
        return build_network(config, NUM_CLASSES)


def state_of(network: UNet, config: CoreConfig) -> TrainState:
    optimizer = build_optimizer(network, config.train)
    for group in optimizer.param_groups:
        group["lr"] = config.train.lr  # Fake tensors have no fused step whose learning rate is a tensor.
    return TrainState(network.train(), Ema(network, config.ema), optimizer)


def some_draws(config: CoreConfig) -> Draws:
    channels, size, _ = config.data.image_shape
    with CUDA:
        x_BCHW = torch.zeros(BATCH, channels, size, size)
        shown_B = torch.arange(BATCH) > 3 if config.model.self_conditioning else None
        labels_B, given_BCHW = torch.zeros(BATCH, dtype=torch.long), None
        if config.upsample.wanted:
            given_BCHW = torch.zeros(BATCH, config.upsample.channels(channels), size, size)
        return Draws(x_BCHW, torch.zeros_like(x_BCHW), torch.arange(BATCH), labels_B, shown_B, given_BCHW=given_BCHW)


def differentiate(loss: Tensor, network: UNet) -> None:
    """Gradients by a backward pass, or made up: autograd of a torch that is built for GPUs asks for the real one."""
    try:
        with torch.autograd.set_multithreading_enabled(False):
            loss.backward()
    except RuntimeError as error:
        if torch.cuda.is_available() or "hasPrimaryContext" not in str(error):
            raise
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter)


def take_step(state: TrainState, config: CoreConfig, distillation: Distillation | None = None) -> Tensor:
    """A step as training takes it, from what was drawn on."""
    drawn = some_draws(config)
    denoiser = Denoiser.from_config(state.network, config.diffusion, config.model, CUDA).with_given(drawn.given_BCHW)
    with cuda_autocast():
        loss_B = diffusion_loss(
            denoiser, drawn.x0_BCHW, drawn.noise_BCHW, drawn.t_B, drawn.labels_B, config.diffusion, drawn.shown_B
        )
        if distillation is not None:
            loss_B = loss_B + distillation.loss()
    loss = loss_B.mean()
    differentiate(loss, state.network)
    torch.nn.utils.clip_grad_norm_(list(state.network.parameters()), 1.0, foreach=True)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.update(state.network)
    return loss


def test_fake_tensors_show_what_they_are_for() -> None:
    with fake_tensors():
        one = torch.zeros(3, device=CUDA)
        with pytest.raises(RuntimeError, match="mixes"):
            torch._foreach_mul_([one], [torch.zeros(3, device="cpu")])
        with pytest.raises(RuntimeError, match="waits"):
            one.cpu()
        with pytest.raises(DataDependentOutputException):
            one.sum().item()
        with cuda_autocast():
            assert (torch.zeros(2, 2, device=CUDA) @ torch.zeros(2, 2, device=CUDA)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_stays_on_the_gpu(kind: str) -> None:
    config = tiny_config(**KINDS[kind])
    with fake_tensors() as noted:
        state = state_of(on_gpu(config), config)
        loss = take_step(state, config)
        assert (loss.device, loss.dtype) == (CUDA, torch.float32)
        check_whole_step(noted)


@pytest.mark.parametrize("memory", [2**40, 0], ids=["images on the GPU", "images on the processor"])
@pytest.mark.parametrize("kind", [*KINDS, "lognormal", "progressive", "consistency"])
def test_the_draws_of_a_step_wait_for_no_gpu(kind: str, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait leaves the GPU idle while the next step's kernels are launched; small data sets have short epochs."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)  # It asks for a GPU.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (memory, memory))
    lognormal = {"diffusion__timestep_sampling": "lognormal"}
    config = tiny_config(**KINDS.get(kind, lognormal if kind == "lognormal" else {}))
    lesson = Lesson(config, StepsConfig(), 0, 10, 4, 1.0, None, tiny_network(config))
    objective: Objective = Denoising(
        config.diffusion, lambda step, given, schedule: draw(step, given, config, schedule)
    )
    if kind == "progressive":
        objective = ProgressiveDistillation(lesson)
    elif kind == "consistency":
        objective = ConsistencyTuning(lesson)
    images, on_cpu = digits().train, build_schedule(config.diffusion)
    with fake_tensors() as noted:
        schedule = on_cpu.to(CUDA)
        # Without mirroring: how many images are mirrored is counted on the processor, whose numbers are fake here too.
        batches = tiny_batches(config, images, horizontal_flip=False, device=CUDA)
        assert noted.waits or not memory, "data are copied once, and tests see it"
        noted.waits.clear()
        for step in range(3):
            drawn = objective.draw(step, batches, schedule)
            assert {tensor.device for tensor in drawn.tensors() if tensor is not None} == {CUDA}
        assert not noted.waits


def check_whole_step(noted: OneDevice) -> None:
    names = " ".join(noted.operations)
    for part in ("aten.convolution.", "fused_adamw", "foreach_mul", "foreach_norm"):
        assert part in names


def test_a_step_of_a_pruned_student_stays_on_the_gpu() -> None:
    """Its masks come from a checkpoint, that is from the processor."""
    config = tiny_config()
    with fake_tensors() as noted:
        network = on_gpu(config)
        teacher = copy.deepcopy(network)
        state = state_of(network, config)
        take_step(state, config)
        masks = {
            name: torch.ones(weight.shape, dtype=torch.bool, device="cpu") for name, weight in maskable(network).items()
        }
        hold_masks(state, masks)
        take_step(state, config, Distillation(teacher, network, 1.0, 1.0))
        check_whole_step(noted)
        lying = {(weight.device, weight.dtype) for weight in network.parameters()}
        assert lying == {(CUDA, torch.float32)}


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_a_sampling_step_stays_on_the_gpu(kind: str, guidance: float) -> None:
    """But for the samplers' sums, whose factors are numbers of the processor."""
    config = tiny_config(**KINDS[kind], sample__guidance=guidance)
    lows = (lambda wanted: torch.zeros(len(wanted), 1, 4, 4)) if config.upsample.wanted else None
    # It moves its weights, which fake ones cannot be.
    drawing = Generator(tiny_network(config), config, "fp32", lows=lows)
    with fake_tensors() as noted, torch.no_grad(), cuda_autocast():
        network = on_gpu(config).eval()
        given = some_draws(config)
        drawing.network, drawing.device = network, CUDA
        denoiser = drawing.guided(drawing.denoiser(given_BCHW=given.given_BCHW), config.sample)
        x_BCHW = given.x0_BCHW
        for _ in range(2):  # Self-conditioned ones remember the first estimate.
            noted.operations.clear()
            x_BCHW = 0.5 * x_BCHW + 0.5 * denoiser(x_BCHW, given.t_B, given.labels_B)
            assert (x_BCHW.device, x_BCHW.dtype, x_BCHW.shape) == (CUDA, torch.float32, given.x0_BCHW.shape)
            convolutions = sum(name.startswith("aten.convolution") for name in noted.operations)
            # Both halves of guidance are one batch.
            assert convolutions == sum(isinstance(module, torch.nn.Conv2d) for module in network.modules())


@pytest.mark.parametrize("spacing", ["uniform", "karras"])
def test_guidance_in_an_interval_waits_for_no_gpu(spacing: str) -> None:
    """Fake tensors fail where a number is read. What is known on the processor saves the second evaluation."""
    config = tiny_config(diffusion__timesteps=100)
    settings = SampleConfig.model_validate({"spacing": spacing, "steps": 12})
    drawing = Generator(tiny_network(config), config, "fp32")
    steps = steps_of(settings, drawing.schedule)
    known = decided(between_levels(drawing.schedule, 0.3, 3.0), steps)
    batches: list[int] = []
    with fake_tensors(), torch.no_grad(), cuda_autocast():
        network = on_gpu(config).eval()
        network.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
        drawing.network, drawing.device = network, CUDA
        given, denoiser = some_draws(config), drawing.denoiser()
        within = guided(denoiser, 2.0, applies=between_levels(denoiser.schedule, 0.3, 3.0), known=known)
        x_BCHW = given.x0_BCHW
        for index in range(len(steps)):
            x_BCHW = 0.5 * x_BCHW + 0.5 * within(x_BCHW, steps.t(index, x_BCHW), given.labels_B)
        assert (x_BCHW.device, x_BCHW.shape) == (CUDA, given.x0_BCHW.shape)
    assert batches == [2 * BATCH if 0.3 < level <= 3.0 else BATCH for level in steps.levels[:-1]]
    assert len(set(batches)) == 2


def test_guidance_at_unknown_timesteps_waits_for_no_gpu_either() -> None:
    """They are random in step distillation: both are evaluated, and chosen from image by image."""
    config = tiny_config(sample__guidance=2.0, sample__guidance_interval=[0.3, 3.0])
    drawing = Generator(tiny_network(config), config, "fp32")
    with fake_tensors(), torch.no_grad(), cuda_autocast():
        drawing.network, drawing.device = on_gpu(config).eval(), CUDA
        given = some_draws(config)
        within = drawing.guided(drawing.denoiser(), config.sample)
        assert within(given.x0_BCHW, given.t_B, given.labels_B).device == CUDA


# The compiler, whose backend here computes as written.

SMALL: dict[str, Any] = {"model__channel_multipliers": [1], "model__attention_resolutions": [8]}


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()


def compiled_graphs() -> int:
    """Graphs that were compiled since the test began; none of them is broken off."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("compiler")
def test_training_compiles_one_graph_and_one_more_to_distill() -> None:
    config = tiny_config(train__compile="network", model__dropout=0.1, **SMALL)
    state, batches = tiny_state(config), tiny_batches(config)
    lively(state.network)
    train(state, batches, config, accelerator=cpu(), until=2)
    assert compiled_graphs() == 1
    teacher = copy.deepcopy(state.ema.network)
    hold_masks(state, global_magnitude(maskable(state.network), None, 0.5))
    train(state, batches, config, accelerator=cpu(), until=4)
    assert compiled_graphs() == 1
    for until in (6, 8):
        distillation = Distillation(teacher, state.network, 1.0, 1.0)
        train(state, batches, config, accelerator=cpu(), until=until, distillation=distillation)
        distillation.close()
        assert compiled_graphs() == 2
    train(state, batches, config, accelerator=cpu(), until=10)
    assert compiled_graphs() == 2


@pytest.mark.usefixtures("compiler")
def test_self_conditioning_compiles_with_and_without_gradients() -> None:
    config = tiny_config(train__compile="network", model__self_conditioning=True, **SMALL)
    train(tiny_state(config), tiny_batches(config), config, accelerator=cpu(), until=3)
    assert compiled_graphs() == 2


@pytest.mark.usefixtures("compiler")
def test_guided_sampling_compiles_one_graph() -> None:
    config = tiny_config(
        sample__compile="network", sample__batch_size=8, sample__steps=3, sample__guidance=2.0, **SMALL
    )
    generator = Generator(tiny_network(config), config, "fp32")
    for seed in (0, 1):
        generator.images(requests(range(4), 2), config.sample, seed)
    assert compiled_graphs() == 1


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("spacing", ["uniform", "karras"])
def test_guidance_in_an_interval_compiles_one_graph(spacing: str) -> None:
    knobs: dict[str, Any] = {"batch_size": 8, "steps": 6, "guidance": 2.0, "guidance_interval": [0.3, 3.0]}
    config, wanted = tiny_config(**SMALL), requests(range(4), 2)
    generator = Generator(tiny_network(config), config, "fp32")
    settings = config.sample.model_copy(update={**knobs, "spacing": spacing})
    expected = generator.images(wanted, settings.model_copy(update={"compile": "none"}), 0)
    found = generator.images(wanted, settings.model_copy(update={"compile": "network"}), 0)
    assert compiled_graphs() == 1
    assert (found.int() - expected.int()).abs().max() <= 1
