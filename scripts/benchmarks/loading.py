"""Measure training images per second from a folder of 32 x 32 files, from the second epoch on."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measurement.options import Options
from benchmarks.measurement.rows import Row
from benchmarks.measurement.timing import alternating
from diffusion_core.config import DataConfig, TrainConfig
from diffusion_core.data.batches import Batches
from diffusion_core.data.datasets import load_data
from diffusion_core.hardware import pick_device

SUBJECT = "loading"
TARGET = 20.0
IMAGES, SHORT_IMAGES, BATCH, WORKERS = 4096, 256, 64, 2


def write_images(folder: Path, count: int) -> None:
    """Write images of two classes. They are noise, which PNG does not decode faster than photographs."""
    source = np.random.default_rng(0)
    for index in range(count):
        path = folder / str(index % 2) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


def measure(options: Options) -> list[Row]:
    """Measure a whole epoch, against denoising-diffusion-pytorch's data set with a loader of two workers."""
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Dataset as PeerDataset
    from torch.utils.data import DataLoader

    count = SHORT_IMAGES if options.short else IMAGES
    device = pick_device(TrainConfig())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, count)
        dataset = load_data(DataConfig(name="folder", path=name, val_fraction=0.1))
        epoch = len(dataset.train) // BATCH
        batches = Batches(dataset.train, batch_size=BATCH, seed=0, horizontal_flip=True, device=device)
        peer = PeerDataset(name, 32, exts=["png"], augment_horizontal_flip=True)
        loader = DataLoader(peer, batch_size=BATCH, shuffle=True, pin_memory=torch.cuda.is_available(),
                            num_workers=WORKERS, persistent_workers=True)  # fmt: skip

        def ours() -> None:
            for step in range(epoch):
                batches.at(step)

        def theirs() -> None:
            for images in loader:
                images.to(device)

        times = alternating({"ours": ours, "denoising-diffusion-pytorch": theirs}, options.rounds, options.say)
    our_rate = epoch * BATCH / times["ours"]
    peer_rate = count / times["denoising-diffusion-pytorch"]
    return [
        Row(
            SUBJECT,
            f"{count} PNG files of 32 x 32, batch {BATCH}, against denoising-diffusion-pytorch's data set and loader",
            our_rate / peer_rate,
            target=TARGET,
            ours=f"{our_rate:,.0f} images/s",
            peer=f"{peer_rate:,.0f} images/s",
            details=times,
        )
    ]
