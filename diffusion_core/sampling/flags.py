"""Command-line flags of scripts that sample. Each sets a knob of ``sample.*``."""

from __future__ import annotations

import argparse
from typing import Any

from diffusion_core.config import SampleConfig, explained

FLAGS = {
    "sampler": "sampler",
    "steps": "steps",
    "guidance": "guidance",
    "guidance_interval": "guidance-interval",
    "eta": "eta",
    "variance": "variance",
    "spacing": "spacing",
    "start_level": "start-level",
    "batch_size": "micro-batch",
    "compile": "compile",
}
"""Maps knobs of ``sample.*`` to the flags that set them."""


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags, each with the help of its knob."""
    own = parser.add_argument_group("sampling (default: the settings of the training run)")
    for knob, flag in FLAGS.items():
        help_text = explained(SampleConfig.model_fields[knob])
        own.add_argument(f"--{flag}", dest=f"sample_{knob}", metavar=flag.upper(), help=help_text)


def sampling_knobs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the knobs that the flags set."""
    return {f"sample.{knob}": value for knob in FLAGS if (value := getattr(arguments, f"sample_{knob}")) is not None}
