"""Models to and from Diffusers. Needs it installed:  pip install "diffusion-sweeps[diffusers]"

  python scripts/convert_diffusers.py import google/ddpm-cifar10-32 runs/ddpm-cifar10-32
  python scripts/sample_images.py --checkpoint runs/ddpm-cifar10-32 --sampler ddim --steps 50
  python scripts/convert_diffusers.py export runs/abc123 exported

import  reads a DDPMPipeline (a folder, or its name on the Hugging Face hub) or the folder of a UNet2DModel alone, and
        writes a checkpoint. A network or noise schedule that ours cannot be is refused, with the key that is to blame.
export  writes a folder that DDPMPipeline.from_pretrained reads. Weights pass bit for bit, zeros of pruning masks among
        them; a network whose channels were removed cannot be a UNet2DModel and is refused.

Either way, both networks are run on the same noise and compared before anything is written.

A DDPMPipeline passes no labels, so that of a class-conditional model loads, but samples only if it is given some:

  pipeline = DDPMPipeline.from_pretrained("exported")
  pipeline.unet.forward = functools.partial(pipeline.unet.forward, class_labels=torch.tensor([0, 1, 2]))
  images = pipeline(batch_size=3).images

The last class stands for "no class" (classes.json lists the others), unless train.label_dropout was 0 and it was never
trained. For a pipeline that needs no labels, export a single class, or none, with --label: its embedding moves into
the bias of the time embedding, which changes nothing but rounding. Guidance is not part of a DDPMPipeline.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config import ConfigError
from diffusion_core.config.plugins import add_plugins_flag
from diffusion_core.diffusers_io.exporter import export_model
from diffusion_core.diffusers_io.importer import import_model
from diffusion_core.diffusers_io.names import CLASSES_FILE


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    reading = directions.add_parser("import", help="a Diffusers model becomes a checkpoint", allow_abbrev=False)
    reading.add_argument("source", metavar="SOURCE", help="folder of a DDPMPipeline or UNet2DModel, or a hub name")
    reading.add_argument("target", type=Path, metavar="TARGET", help="folder of the checkpoint; must not exist")
    reading.add_argument("--null-class", action="store_true", help='the last class stands for "no class"; needed only '
                         f"where no {CLASSES_FILE} says so")  # fmt: skip
    writing = directions.add_parser("export", help="a checkpoint becomes a DDPMPipeline", allow_abbrev=False)
    writing.add_argument("source", type=Path, metavar="SOURCE", help="a checkpoint, or a run's folder (its newest)")
    writing.add_argument("target", type=Path, metavar="TARGET", help="folder of the pipeline; must not exist")
    writing.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged weights, or as trained")
    writing.add_argument("--label", metavar="CLASS", help="of a class-conditional model: this class alone, by number "
                         "or name, or none; the pipeline then needs no labels")  # fmt: skip
    add_plugins_flag(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 if something cannot be converted."""
    arguments = parse_arguments(argv)
    try:
        need_diffusers()
        with new_folder(arguments.target) as folder:
            if arguments.direction == "import":
                lines = list(import_model(arguments.source, folder, null_class=arguments.null_class))
            else:
                lines = list(export_model(arguments.source, folder, weights=arguments.weights, label=arguments.label))
        print(f"{arguments.target}: " + "\n".join(lines))
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def need_diffusers() -> None:
    """Make Diffusers available, and quiet: what it would warn of is looked at here.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        reason = "" if error.name == "diffusers" else f" ({' '.join(str(error).split())[:200]})"
        raise ConfigError(f'Diffusers is needed{reason}: pip install "diffusion-sweeps[diffusers]"') from None
    diffusers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place if all goes well, and is gone if not.

    Raises:
        ConfigError: if there is something at ``target``, or the disk takes no more.
    """
    final = Path(os.path.abspath(target))
    temporary = final.parent / f".{final.name}.partial"
    try:
        if final.is_symlink() or (final.exists() and not (final.is_dir() and not any(final.iterdir()))):
            raise ConfigError(f"TARGET = {str(target)!r}: is there already; choose another folder")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(final)
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[:300]
        raise ConfigError(f"TARGET = {str(target)!r}: {reason}; choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
