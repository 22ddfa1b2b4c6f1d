"""Export a model as a file that other programs run without this project.

  python scripts/export_model.py --checkpoint runs/abc123 --format onnx --out exported
  python scripts/export_model.py --artifact model-abc123:best --format torch --steps 20 --guidance 2 --out exported

The folder holds model.onnx (ONNX; needs  pip install "diffusion-sweeps[onnx]") or model.pt2 (torch.export), and
model.json: class names, and what a sampler needs at each of --steps timesteps. Guidance is part of the file. Pruned
channels stay removed, and pruned weights zero. The file is run and compared with the network before it is kept.

Sample from it with NumPy and ONNX Runtime alone:

  import json, numpy as np, onnxruntime
  model = onnxruntime.InferenceSession("exported/model.onnx")
  info = json.load(open("exported/model.json"))
  alphas, sigmas, classes = info["alphas"], info["sigmas"], info["class_names"]
  inputs = {"labels": np.arange(8) % len(classes)} if classes else {}
  normal, shape = np.random.default_rng(0).standard_normal, info["image_shape"]
  x = info["start"] * normal((8, *shape), np.float32)
  for i, t in enumerate(info["timesteps"]):
      inputs |= {"x": x, "t": np.full(8, t, info["timestep_type"])}
      x0, = model.run(None, inputs)
      noise = (x - alphas[i] * x0) / sigmas[i]  # DDIM
      if info["sampler"] == "consistency":
          noise = normal(x.shape, np.float32)
      x = (alphas[i + 1] * x0 + sigmas[i + 1] * noise).astype(np.float32)
  images = ((x + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
"""

from __future__ import annotations

if __name__ == "__main__":
    from diffusion_core.signals import leave_at_once

    leave_at_once()  # Until main handles signals: the imports take seconds.

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from agent.command import fail, run_and_leave
from agent.tracking.artifacts import open_source
from diffusion_core.choice import add_which_flag, announce, check_weights
from diffusion_core.config import CoreConfig, build, flatten
from diffusion_core.config.plugins import add_plugins_flag
from diffusion_core.files import new_folder
from diffusion_core.messages import Parser, UserError, out_folder, size_in_words
from diffusion_core.sampling.flags import student_note
from diffusion_core.sampling.portable import FORMATS, write_model

KNOBS = ("steps", "spacing", "guidance", "guidance_interval")
"""Knobs of ``sample.*`` that the file holds."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--artifact", metavar="NAME:ALIAS", help="a `model` artifact on W&B, such as model-abc123:best")
    source.add_argument("--checkpoint", type=Path, metavar="PATH", help="a checkpoint, or a run's folder")
    add_which_flag(parser, "a run's folder, or version of an artifact without alias")
    parser.add_argument("--format", choices=sorted(FORMATS), default="onnx", help="see above (onnx)")
    parser.add_argument(
        "--out", type=out_folder, default=Path("exported"), metavar="DIR", help="a new folder (exported)"
    )
    parser.add_argument("--weights", default="ema", help="ema: the average that was validated; model: as trained; or "
                        "another average of the checkpoint, such as ema-power0_1")  # fmt: skip
    own = parser.add_argument_group("sampling (default: the settings of the training run)")
    for knob in KNOBS:
        own.add_argument(f"--{knob.replace('_', '-')}", metavar="VALUE", help=f"sample.{knob}")
    add_plugins_flag(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 if the model cannot be exported."""
    arguments = parse_arguments(argv)
    try:
        source = open_source(arguments.checkpoint, arguments.artifact, "--", arguments.which)
        assert source is not None
        checkpoint = source.checkpoint
        given = {f"sample.{knob}": value for knob in KNOBS if (value := getattr(arguments, knob)) is not None}
        config = build(CoreConfig, flatten(checkpoint.config()), given)
        check_weights(checkpoint, arguments.weights)
        network = checkpoint.network(arguments.weights)
        with new_folder(arguments.out, "--out") as folder:
            announce(checkpoint)
            if note := student_note(checkpoint, config):
                print(note, file=sys.stderr)
            difference = write_model(network, config, checkpoint.class_names, folder, arguments.format)
            size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{arguments.out}: {arguments.format}, {size_in_words(size)}, {config.sample.steps} steps, "
              f"guidance {config.sample.guidance:g}; differs from the network by {difference:.1e}")  # fmt: skip
    except UserError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    run_and_leave(main, interruptible=True)
