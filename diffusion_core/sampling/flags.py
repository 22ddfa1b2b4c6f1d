"""Command-line flags of scripts that sample. Each sets a knob of ``sample.*``, or of ``upsample.*``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from diffusion_core.checkpoint import Checkpoint, student_knobs
from diffusion_core.config import CoreConfig, SampleConfig, UpsampleConfig, explained, flatten

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
LOW_NOISE = "upsample.sample_noise"
"""Maps knobs of ``sample.*`` to the flags that set them."""


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags, each with the help of its knob."""
    own = parser.add_argument_group("sampling (default: the settings of the training run)")
    for knob, flag in FLAGS.items():
        help_text = explained(SampleConfig.model_fields[knob])
        own.add_argument(f"--{flag}", dest=f"sample_{knob}", metavar=flag.upper(), help=help_text)
    help_text = explained(UpsampleConfig.model_fields["sample_noise"])
    own.add_argument("--low-noise", dest=LOW_NOISE, metavar="LOW-NOISE", help=f"models that upsample: {help_text}")


def sampling_knobs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the knobs that the flags set."""
    known = {f"sample.{knob}": getattr(arguments, f"sample_{knob}") for knob in FLAGS}
    known[LOW_NOISE] = getattr(arguments, LOW_NOISE)
    return {key: value for key, value in known.items() if value is not None}


def student_note(checkpoint: Checkpoint, config: CoreConfig) -> str | None:
    """Return one line if a student of step distillation is to be sampled otherwise than it was made for, else None.

    Args:
        checkpoint: what is sampled.
        config: how it is sampled.
    """
    made_for, now = student_knobs(checkpoint.metadata["extra"]), flatten(config)
    changed = [key for key, value in made_for.items() if now[key] != value]
    if not changed:
        return None
    asked = ", ".join(f"{key} = {now[key]!r}" for key in changed)
    expected = ", ".join(f"{key}={made_for[key]}" for key in changed)
    return f"warning: {asked}: the student {str(checkpoint.path)!r} was distilled for {expected}"


def tell_students(*sampled: tuple[Checkpoint, CoreConfig]) -> None:
    """Print which students of step distillation are sampled otherwise than they were made for."""
    for note in filter(None, (student_note(*each) for each in sampled)):
        print(note, file=sys.stderr)
