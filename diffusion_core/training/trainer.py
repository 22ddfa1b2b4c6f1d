"""The training loop. Logging, evaluation and pruning are callbacks.

A callback is a function ``(state, row) -> None``, called after every optimizer step. ``row`` holds the step's figures
(empty on most steps), and callbacks may add to it. Axes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_core.checkpoint import Checkpoint, CheckpointError, student_knobs
from diffusion_core.config import CoreConfig, EmaConfig, SampleConfig, TrainConfig
from diffusion_core.data.batches import Batches
from diffusion_core.diffusion.denoiser import Denoiser
from diffusion_core.diffusion.draws import Draws, draw
from diffusion_core.diffusion.objective import Denoising, Objective
from diffusion_core.hardware import Precision, algorithms, autocast, memory_format, pick_precision
from diffusion_core.model.compilation import compile_network, pick_compilation
from diffusion_core.model.cuda_graphs import Replayed, is_replayed
from diffusion_core.model.optimizers import AdamW
from diffusion_core.model.unet import UNet
from diffusion_core.randomness import Purpose, stream_seed
from diffusion_core.terminal.progress import progress_of
from diffusion_core.training.distillation import Distillation
from diffusion_core.training.ema import Ema, profiles, sampled_profile
from diffusion_core.training.learning_rate import Phase, learning_rate, set_learning_rate
from diffusion_core.training.loss_scale import LossScale
from diffusion_core.training.sums import RowSums

Callback = Callable[["TrainState", dict[str, Any]], None]


class TrainingDiverged(RuntimeError):
    """The loss is not finite. The message is one line for the user."""


@dataclass
class TrainState:
    """All state that training changes. A checkpoint holds all of it. There is no generator: see randomness.py."""

    network: UNet
    ema: Ema
    optimizer: torch.optim.AdamW
    step: int = 0
    extra_parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Further tensors to store in checkpoints, by part, such as pruning masks."""
    extra_metadata: dict[str, Any] = field(default_factory=dict)
    """Further JSON to store in checkpoints."""
    revision: int = 0
    """Incremented when something changes what a step computes, such as masks. A recorded CUDA graph is then renewed."""
    since_row: RowSums = field(default_factory=RowSums)
    """Sums over the steps since the last row."""
    loss_scale: LossScale = field(default_factory=LossScale)
    """The scale of losses in fp16."""

    @classmethod
    def start(cls, network: UNet, train: TrainConfig, ema: EmaConfig, step: int = 0) -> TrainState:
        """Return a state with new averages and a new optimizer. The network keeps its device."""
        device = next(network.parameters()).device
        network = network.to(memory_format=memory_format(device, pick_precision(train, device)))
        return cls(network, Ema(network, ema), build_optimizer(network, train), step)

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of a checkpoint, by part."""
        averages = {ema_part(profile, self.ema.config): network for profile, network in self.ema.networks.items()}
        return {
            **{part: dict(network.state_dict()) for part, network in averages.items()},
            **{precise_part(profile): dict(tensors) for profile, tensors in self.ema.precise.items()},
            "model": dict(self.network.state_dict()),
            "optimizer": self._optimizer_tensors(),
            **self.extra_parts,
        }

    def sampling(self, config: SampleConfig) -> SampleConfig:
        """Return how the network is sampled: as configured, but a student of step distillation in few steps."""
        knobs = student_knobs(self.extra_metadata)
        return config.model_copy(update={name.removeprefix("sample."): value for name, value in knobs.items()})

    def metadata(self) -> dict[str, Any]:
        """Return the JSON of a checkpoint that depends on training."""
        described = {
            "ema_updates": self.ema.updates,
            "extra": self.extra_metadata,
            "since_row": self.since_row.stored(),
        }
        scale = self.loss_scale.stored()
        return described if scale is None else described | {"loss_scale": scale}

    @classmethod
    def restore(cls, checkpoint: Checkpoint, train: TrainConfig, ema: EmaConfig, device: torch.device) -> TrainState:
        """Return the state that was saved in a checkpoint.

        Raises:
            CheckpointError: if the checkpoint has no training state, or that of another network.
        """
        averages = {profile: ema_part(profile, ema) for profile in profiles(ema)}
        own_parts = {"model", "optimizer", *averages.values()}
        missing = own_parts - set(checkpoint.parts)
        if missing:
            raise CheckpointError(f"{str(checkpoint.path)!r}: cannot resume without {', '.join(sorted(missing))}")
        state = cls.start(checkpoint.network("model").to(device), train, ema, checkpoint.step)
        for profile, part in averages.items():
            precise = precise_part(profile)
            tensors = checkpoint.tensors(precise) if precise in checkpoint.parts else None
            own_parts.add(precise)
            try:
                state.ema.load(profile, checkpoint.network(part).state_dict(), tensors)
            except (KeyError, RuntimeError):
                raise CheckpointError(
                    f"{str(checkpoint.path)!r}: its part {precise!r} is of another network; take another checkpoint"
                ) from None
        state.ema.updates = int(checkpoint.metadata["ema_updates"])
        state._load_optimizer(checkpoint.tensors("optimizer"))
        state.extra_parts = {part: checkpoint.tensors(part) for part in set(checkpoint.parts) - own_parts}
        state.extra_metadata = dict(checkpoint.metadata["extra"])
        try:
            key = "since_row"
            state.since_row = RowSums.restored(checkpoint.metadata.get(key))
            key = "loss_scale"
            state.loss_scale = LossScale.restored(checkpoint.metadata.get(key))
        except ValueError as error:
            raise CheckpointError(f"{str(checkpoint.path)!r}: {key}: {error}; take another checkpoint") from None
        return state

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        names = [name for name, _ in self.network.named_parameters()]
        state = self.optimizer.state_dict()["state"]
        return {f"{names[i]}:{key}": value for i, values in state.items() for key, value in values.items()}

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        parameters = dict(self.network.named_parameters())
        index = {name: i for i, name in enumerate(parameters)}
        state: dict[int, dict[str, Tensor]] = {}
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition(":")
            if name not in index or (tensor.ndim and tensor.shape != parameters[name].shape):
                raise CheckpointError(f"optimizer state of {name!r}: the network has no such weight of that shape")
            # Use the memory layout of the weight: the fused optimizer indexes both by address.
            placed = torch.empty_like(parameters[name]).copy_(tensor) if tensor.ndim else tensor
            state.setdefault(index[name], {})[key] = placed
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})


def ema_part(profile: str, config: EmaConfig) -> str:
    """Return the checkpoint's part of an average: ``ema`` for the one that is sampled, else ``ema-<profile>``."""
    return "ema" if profile == sampled_profile(config) else f"ema-{profile}"


def precise_part(profile: str) -> str:
    """Return the checkpoint's part of an average in float64 (:attr:`Ema.precise`)."""
    return f"float64-{profile}"


def build_optimizer(network: UNet, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov & Hutter 2019) over all weights."""
    optimizer = AdamW(
        network.parameters(),
        lr=config.lr,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    device = next(network.parameters()).device
    if device.type == "cuda":  # A tensor, so that a recorded CUDA graph reads its current value.
        for group in optimizer.param_groups:
            group["lr"] = torch.full((), config.lr, device=device)
    return optimizer


def set_capturable(optimizer: torch.optim.Optimizer, recording: bool) -> None:
    """Tell an optimizer whether its step is being recorded as a CUDA graph. Without a recording it would warn."""
    for group in optimizer.param_groups:
        group["capturable"] = recording


def is_due(step: int, every: int, last: int) -> bool:
    """Return whether a step is a multiple of ``every`` (0: never) or the last one."""
    return step == last or (every > 0 and step % every == 0)


def train(
    state: TrainState,
    batches: Batches,
    config: CoreConfig,
    callbacks: Sequence[Callback] = (),
    *,
    accelerator: Accelerator,
    until: int | None = None,
    distillation: Distillation | None = None,
    objective: Objective | None = None,
    phase: Phase | None = None,
) -> TrainState:
    """Train from ``state.step`` to step ``until``. The state is changed in place.

    Every ``log.every`` steps, and at the last one, the row holds ``train/loss`` (mean over the steps since the last
    row, also those before a checkpoint that the state was restored from), ``train/lr``, ``train/grad_norm`` (likewise,
    before clipping), ``train/images_per_second`` (likewise, without the time of callbacks) and ``train/epoch``. In fp16
    it also holds ``train/loss_scale``, and ``train/skipped_steps``, the number of steps since the last row whose
    gradients overflowed: they changed neither weights nor averages, and do not count in ``train/grad_norm``.

    Args:
        state: what to train.
        batches: the images of each step.
        config: configuration of the run.
        callbacks: called after every step.
        accelerator: processes and devices.
        until: step to stop at; None: ``train.steps``.
        distillation: a loss to add to that of the images, also in ``train/loss``.
        objective: what the network is trained for; None: denoising.
        phase: the learning rate's schedule; None: that of the whole run.

    Raises:
        TrainingDiverged: if the loss is not finite. It is checked whenever a row is made.
    """
    settings, device = config.train, accelerator.device
    until = settings.steps if until is None else until
    if objective is None:
        objective = Denoising(config.diffusion, lambda step, given, schedule: draw(step, given, config, schedule))
    precision = pick_precision(settings, device)
    compile_network(state.network, pick_compilation(settings, state.network, device))
    network, clip = state.network, torch.nn.utils.clip_grad_norm_
    if accelerator.num_processes > 1:  # For one, accelerate changes nothing, and imports distributed tensors to tell.
        network, clip = accelerator.prepare_model(network), accelerator.clip_grad_norm_
    network.train()
    weights = list(network.parameters())
    denoiser = Denoiser.from_config(network, config.diffusion, config.model, device)
    sums, resumed_at = state.since_row, time.perf_counter()
    sums.place(accelerator)
    shown = config.log.progress and accelerator.is_main_process
    bar = progress_of("training", settings.steps, "step", shown=shown, initial=state.step)
    scale = state.loss_scale
    scale.place(device, precision)

    def update_weights(*draws: Any) -> tuple[Tensor, ...]:
        loss = _accumulate_gradients(
            denoiser, objective, Draws(*draws), settings.accumulation, accelerator, precision, distillation, scale
        )
        norm = scale.step(state.optimizer, lambda: clip(weights, settings.grad_clip or math.inf))
        state.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    update: Callable[..., tuple[Tensor, ...]] = update_weights
    if is_replayed(settings.cuda_graphs and precision != "fp16", device, accelerator.num_processes):
        update = Replayed(update_weights, partial(set_capturable, state.optimizer))
    revision = state.revision
    with ExitStack() as stack:
        stack.enter_context(bar)
        stack.enter_context(algorithms(settings, precision))
        if network is not state.network:
            stack.callback(accelerator.free_memory)  # It keeps every network that it prepared, until the process ends.
        while state.step < until:
            if config.model.dropout:
                torch.manual_seed(stream_seed(config.seed, Purpose.DROPOUT, state.step, accelerator.process_index))
            rate = learning_rate(state.step, settings, phase)
            set_learning_rate(state.optimizer, rate)
            if state.revision != revision and isinstance(update, Replayed):
                update.forget()
            revision = state.revision
            loss, norm = update(*objective.draw(state.step, batches, denoiser.schedule).tensors())
            if not scale.skipped:
                state.ema.update(state.network)
            state.step += 1
            sums.add(loss, norm, skipped=scale.skipped)
            bar.update()

            row: dict[str, Any] = {}
            mean_loss = mean_norm = 0.0
            if due := is_due(state.step, config.log.every, until):  # The only GPU synchronisation.
                mean_loss, mean_norm = accelerator.reduce(sums.means(), "mean").tolist()
            sums.seconds += time.perf_counter() - resumed_at
            if due:
                if not math.isfinite(mean_loss) or scale.is_exhausted:
                    raise TrainingDiverged(
                        f"train/loss = {mean_loss} at step {state.step}: {scale.describe()}training diverged; lower "
                        f"train.lr ({settings.lr:g}), lengthen train.warmup_steps ({settings.warmup_steps}), or set "
                        f"train.precision=fp32 ({precision} now)"
                    )
                row = {
                    "train/loss": mean_loss,
                    "train/lr": rate,
                    "train/grad_norm": mean_norm,
                    "train/images_per_second": sums.steps * batches.batch_size / sums.seconds,
                    "train/epoch": state.step * batches.batch_size / len(batches.images),
                }
                if scale.value is not None:
                    row |= {"train/loss_scale": scale.value, "train/skipped_steps": sums.skipped}
                bar.set_postfix_str(
                    f"loss {mean_loss:.4f}, {row['train/images_per_second']:.0f} images/s", refresh=False
                )
                sums.reset()
            if is_due(state.step, config.checkpoint.every, settings.steps):
                sums.share(accelerator)
            for callback in callbacks:
                callback(state, row)
            resumed_at = time.perf_counter()
    return state


def _accumulate_gradients(
    denoiser: Denoiser,
    objective: Objective,
    draws: Draws,
    parts: int,
    accelerator: Accelerator,
    precision: Precision,
    distillation: Distillation | None,
    scale: LossScale,
) -> Tensor:
    """Accumulate the gradients of a batch's mean loss, scaled, over its parts. Return that loss, detached."""
    total = torch.zeros((), device=draws.x0_BCHW.device)
    for index, part in enumerate(draws.chunks(parts)):
        last = index == parts - 1
        with nullcontext() if last else accelerator.no_sync(denoiser.network):
            with autocast(accelerator.device, precision):
                loss_B = objective.loss(denoiser.with_given(part.given_BCHW), part)
                if distillation is not None:
                    loss_B = loss_B + distillation.loss()
            loss = loss_B.mean() / parts
            accelerator.backward(scale.scaled(loss))
        total += loss.detach()
    return total
