"""Measure the whole training loop on digits, with W&B offline, against a bare loop around the same network."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from agent.config import TrialConfig, build_config
from agent.tracking.run import start_wandb
from agent.tracking.tracker import WandbTracker
from benchmarks.measurement.options import Options
from benchmarks.measurement.rows import Row, seconds
from benchmarks.measurement.timing import alternating
from diffusion_core.config import flatten
from diffusion_core.data.batches import Batches
from diffusion_core.data.datasets import Dataset, load_data, to_unit
from diffusion_core.diffusion.schedule import build_schedule
from diffusion_core.distributed import make_accelerator
from diffusion_core.hardware import autocast, pick_precision
from diffusion_core.model.unet import build_network
from diffusion_core.training.callbacks import LogHistory
from diffusion_core.training.trainer import TrainState, train

SUBJECT = "training-loop"
TARGET = 0.95
STEPS, SHORT_STEPS = 100, 5


class BareLoop:
    """A training loop with noise, network, squared error and AdamW only."""

    def __init__(self, config: TrialConfig, dataset: Dataset, device: torch.device) -> None:
        self.network = build_network(config, dataset.num_classes).to(device).train()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=config.train.lr, fused=True)
        self.images = to_unit(dataset.train.images_NCHW).to(device)
        self.labels = dataset.train.labels_N.to(device)
        self.schedule = build_schedule(config.diffusion).to(device)
        self.precision = pick_precision(config.train, device)
        self.batch, self.device = config.train.images_per_step, device

    def run(self, steps: int) -> None:
        for _ in range(steps):
            chosen = torch.randint(len(self.images), (self.batch,), device=self.device)
            x0_BCHW = self.images[chosen]
            noise_BCHW = torch.randn_like(x0_BCHW)
            t_B = torch.randint(self.schedule.timesteps, (self.batch,), device=self.device)
            alpha, sigma = self.schedule.at(t_B, x0_BCHW)
            with autocast(self.device, self.precision):
                output = self.network(alpha * x0_BCHW + sigma * noise_BCHW, t_B, self.labels[chosen])
            F.mse_loss(output.float(), noise_BCHW).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def measure(options: Options) -> list[Row]:
    """Measure the steps of both loops, in the default precision."""
    steps = SHORT_STEPS if options.short else STEPS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"WANDB_SILENT": "true", "WANDB_DIR": name, "WANDB_DATA_DIR": name}
        config = build_config({"preset": "digits", "train.steps": 10**6, "log.progress": False})
        accelerator = make_accelerator(config.train)
        dataset = load_data(config.data)
        state = TrainState.start(
            build_network(config, dataset.num_classes).to(accelerator.device), config.train, config.ema
        )
        batches = Batches(
            dataset.train,
            batch_size=config.train.images_per_step,
            seed=0,
            horizontal_flip=False,
            device=accelerator.device,
        )
        tracker = WandbTracker(start_wandb("benchmark", folder, flatten(config), "offline"))
        history = LogHistory(tracker, folder, None)
        bare = BareLoop(config, dataset, accelerator.device)

        def ours() -> None:
            train(state, batches, config, [history], accelerator=accelerator, until=state.step + steps)

        times = alternating({"ours": ours, "bare": lambda: bare.run(steps)}, options.rounds, options.say)
        tracker.close()
    return [
        Row(
            SUBJECT,
            f"digits, batch {config.train.batch_size}: data, step, average, history, W&B offline; against a bare loop",
            times["bare"] / times["ours"],
            target=TARGET,
            ours=f"{seconds(times['ours'] / steps)} a step",
            peer=f"{seconds(times['bare'] / steps)} a step",
            details=times,
        )
    ]
