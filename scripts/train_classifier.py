"""Train the small classifier that judges images of a data set: class agreement, distances in its features.

  python scripts/train_classifier.py --data.name=digits
  python scripts/train_classifier.py --data.name=cifar10 --recipe colour
  python scripts/train_classifier.py --data.name=folder --data.path=DIR --recipe cpu --out classifier.safetensors

It is kept in the cache, where evaluation finds it, and written to --out. All other words are knobs of data.*.
"""

from __future__ import annotations

if __name__ == "__main__":
    from diffusion_core.signals import leave_at_once

    leave_at_once()  # Until main handles signals: the imports take seconds.

import time
from collections.abc import Sequence

from agent.command import fail, run_and_leave
from agent.config import config_from_words
from diffusion_core.config import ConfigError, TrainConfig, split_argv
from diffusion_core.config.usage import check_data_named
from diffusion_core.data.announcement import announce_data
from diffusion_core.data.datasets import load_data
from diffusion_core.evaluation.classifier.classifier import classifier_for
from diffusion_core.evaluation.classifier.training import RECIPES, recipe_for
from diffusion_core.files import new_file
from diffusion_core.hardware import pick_device
from diffusion_core.messages import Parser, UserError, out_file


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 if something asked for cannot be had."""
    parser = Parser(description=__doc__)
    parser.add_argument("--recipe", choices=RECIPES, help="how it is trained (default: what suits images and device)")
    parser.add_argument("--out", type=out_file, metavar="FILE", help="write it here as well (.safetensors)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments, words = parser.parse_known_args(argv)
    try:
        values = split_argv(words)
        foreign = [key for key in values if not key.startswith("data.")]
        if foreign:
            raise ConfigError(f"{foreign[0]} = {values[foreign[0]]!r}: expected knobs of data.*, such as --data.name")
        check_data_named(values, "data.name")
        # The network of the diffusion model has no say here; its defaults would refuse small images.
        data = config_from_words({**values, "model.channel_multipliers": "1", "model.attention_resolutions": "[]"}).data
        device = pick_device(TrainConfig(device=arguments.device))
        dataset = load_data(data, progress=True)
        announce_data(data, dataset)
        recipe = arguments.recipe or recipe_for(dataset.shape_CHW, device.type == "cuda")
        started = time.perf_counter()
        classifier = classifier_for(
            dataset, data.name, mirrored=data.flips, device=device, recipe=recipe, progress=True
        )
        seconds = time.perf_counter() - started
        if arguments.out:
            with new_file(arguments.out, "--out") as temporary:
                classifier.save(temporary)
    except UserError as error:
        return fail(str(error))
    print(
        f"classifier:       {classifier.name}, recipe {recipe}, seed {classifier.recipe.seed}, weights "
        f"{classifier.weights}"
    )
    print(f"training images:  {len(dataset.train):,} in {seconds:.1f} s on {device} (or from the cache)")
    print(f"held-out images:  {classifier.accuracy:.2%} of {len(dataset.val):,} right")
    return 0


if __name__ == "__main__":
    run_and_leave(main, interruptible=True)
