"""Train one model on this machine: the CIFAR-10 preset, and any knob of ``python -m agent``."""

from __future__ import annotations

if __name__ == "__main__":
    from diffusion_core.signals import leave_at_once, remember_if_handed_out

    remember_if_handed_out()
    leave_at_once()  # Until main handles signals: the imports take seconds.

from agent.__main__ import main
from agent.command import run_and_leave

USAGE = """\
usage: python scripts/train_cifar.py [--config FILE.yaml] [--KNOB=VALUE ...]

Trains the class-conditional DDPM of Ho et al. 2020 on CIFAR-10 (downloaded once), as one local run.

  python scripts/train_cifar.py                                     as published: 800,000 steps of 128 images
  python scripts/train_cifar.py --train.steps=1000 --train.warmup_steps=100
  python scripts/train_cifar.py --data.name=folder --data.path=DIR  your own images, one sub-folder a class
  python scripts/train_cifar.py --log.dir=runs/cifar                stop it (Ctrl-C), run it again: it goes on
  accelerate launch --num_processes 8 scripts/train_cifar.py        one model on eight GPUs"""

if __name__ == "__main__":
    run_and_leave(lambda: main(usage=USAGE, defaults=["--preset=cifar10"]))
