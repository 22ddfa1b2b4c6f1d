"""Convert models to and from Diffusers. Needs:  pip install "diffusion-sweeps[diffusers]"

  python scripts/convert_diffusers.py import google/ddpm-cifar10-32 runs/ddpm-cifar10-32
  python scripts/sample_images.py --checkpoint runs/ddpm-cifar10-32 --sampler ddim --steps 50
  python scripts/convert_diffusers.py export runs/abc123 exported

import  reads a DDPMPipeline (a folder, or its name on the Hugging Face hub) or the folder of a UNet2DModel, and writes
        a checkpoint. Weights may be in one file or in shards, as safetensors or .bin (read without running code), in
        float32 or as an fp16 or bf16 variant. If our network or noise schedule cannot represent the model, the error
        names the key.
export  writes a folder for DDPMPipeline.from_pretrained. Weights stay equal bit for bit, including the zeros of pruning
        masks. A network with removed channels has to have widths that a UNet2DModel can have, as with
        prune.widths=diffusers; otherwise the error names a layer that has not.

Both directions run the two networks on the same noise and compare them before anything is written.

A DDPMPipeline passes no labels, so a class-conditional one loads, but samples only with labels added:

  pipeline = DDPMPipeline.from_pretrained("exported")
  pipeline.unet.forward = functools.partial(pipeline.unet.forward, class_labels=torch.tensor([0, 1, 2]))
  images = pipeline(batch_size=3).images

The last class stands for "no class" (classes.json lists the others), unless the model was trained with
train.label_dropout=0. For a pipeline that needs no labels, export a single class, or none, with --label: its embedding
is added to the bias of the time embedding, which changes only rounding. A DDPMPipeline has no guidance.
"""

from __future__ import annotations

if __name__ == "__main__":
    from diffusion_core.signals import leave_at_once

    leave_at_once()  # Until main handles signals: the imports take seconds.

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from agent.command import fail, run_and_leave
from diffusion_core.choice import add_which_flag
from diffusion_core.config import ConfigError
from diffusion_core.config.plugins import add_plugins_flag
from diffusion_core.diffusers_io import CLASSES_FILE, export_model, import_model
from diffusion_core.files import new_folder
from diffusion_core.messages import Parser, UserError, one_line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    directions = parser.add_subparsers(dest="direction", required=True)
    reading = directions.add_parser("import", help="convert a Diffusers model to a checkpoint")
    reading.add_argument("source", metavar="SOURCE", help="folder of a DDPMPipeline or UNet2DModel, or a hub name")
    reading.add_argument("target", type=Path, metavar="TARGET", help="folder of the checkpoint; must not exist")
    reading.add_argument("--null-class", action="store_true", help='the last class stands for "no class"; needed only '
                         f"without {CLASSES_FILE}")  # fmt: skip
    reading.add_argument("--image-size", type=int, metavar="N", help="height and width of the images; needed only for "
                         "a model without sample_size")  # fmt: skip
    writing = directions.add_parser("export", help="convert a checkpoint to a DDPMPipeline")
    writing.add_argument("source", type=Path, metavar="SOURCE", help="a checkpoint, or a run's folder")
    writing.add_argument("target", type=Path, metavar="TARGET", help="folder of the pipeline; must not exist")
    writing.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="averaged weights (default), or as trained"
    )
    add_which_flag(writing)
    writing.add_argument("--label", metavar="CLASS", help="export only this class, by number or name, or none; "
                         "the pipeline then needs no labels")  # fmt: skip
    add_plugins_flag(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 if the model cannot be converted."""
    arguments = parse_arguments(argv)
    try:
        need_diffusers()
        with new_folder(arguments.target) as folder:
            if arguments.direction == "import":
                lines = list(
                    import_model(
                        arguments.source, folder, null_class=arguments.null_class, image_size=arguments.image_size
                    )
                )
            else:
                lines = list(
                    export_model(
                        arguments.source,
                        folder,
                        weights=arguments.weights,
                        label=arguments.label,
                        which=arguments.which,
                    )
                )
        print(f"{arguments.target}: " + "\n".join(lines))
    except SafetensorError as error:  # The disk is full, for example.
        return fail(f"TARGET = {str(arguments.target)!r}: {one_line(error)}; choose another folder")
    except UserError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def need_diffusers() -> None:
    """Check that Diffusers is installed, and silence its warnings: this script checks the same things.

    Raises:
        ConfigError: if Diffusers is missing.
    """
    try:
        import diffusers
    except ImportError as error:
        reason = "" if error.name == "diffusers" else f" ({one_line(error)})"
        raise ConfigError(f'Diffusers is needed{reason}: pip install "diffusion-sweeps[diffusers]"') from None
    diffusers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


if __name__ == "__main__":
    run_and_leave(main, interruptible=True)
