"""Say which images a command works with, and warn of data that are hardly what the user meant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from diffusion_core.config import DataConfig, ModelConfig, TrainConfig
from diffusion_core.data.classes import shown_classes
from diffusion_core.data.datasets import DataError, Dataset, DatasetRecord, downloads_of, load_data
from diffusion_core.messages import counted
from diffusion_core.redact import redact
from diffusion_core.registries import DATASETS
from diffusion_core.terminal.progress import say

WARNING = "warning: "


def announce_data(config: DataConfig, dataset: Dataset, warnings: Iterable[str] = ()) -> None:
    """Print to stderr how many images and classes there are, which are held out, what was not read, and warnings."""
    for line in (*describe_images(config, dataset), *warnings):
        say(redact(line))


def look_at_data(config: DataConfig, *, progress: bool = False) -> tuple[list[str], int]:
    """Return the lines that a run would print of its images, and the number of classes. Download nothing.

    Raises:
        DataError: if the data set cannot be found or decoded.
    """
    record: DatasetRecord = DATASETS[config.name]
    if record.path == "cache" and record.num_classes is not None:
        place = downloads_of(config)
        if place.exists() and not place.is_dir():
            raise DataError(f"data.path = {str(place)!r}: is no folder; expected one to keep downloads in")
        line = f"data: {config.name}: {record.num_classes} classes; a run reads or downloads it below {str(place)!r}"
        return [redact(line)], record.num_classes
    dataset = load_data(config, progress=progress)
    return [redact(line) for line in describe_images(config, dataset)], dataset.num_classes


def describe_images(config: DataConfig, dataset: Dataset) -> Iterator[str]:
    """Yield the lines of :func:`announce_data`."""
    name = f"{config.name} {config.path!r}" if config.path else config.name
    held_out = f"{len(dataset.val):,} held out{f' ({dataset.held_out})' if dataset.held_out else ''}"
    count = counted(len(dataset.train), "image")
    yield f"data: {name}: {count} for training, {held_out}; {shown_classes(dataset.class_names)}"
    for note in dataset.notes:
        yield note if note.startswith(WARNING) else f"data: {note}"


def advise(model: ModelConfig, train: TrainConfig, dataset: Dataset) -> Iterator[str]:
    """Yield warnings of images that can hardly teach a model."""
    if dataset.num_classes == 1 and model.class_conditional:
        yield (
            f"{WARNING}model.class_conditional = True: there is one class, {dataset.class_names[0]!r}, so labels mean "
            "nothing; put the images of each class into a folder of its own, or set it to false"
        )
    total, images = train.images_per_step, len(dataset.train)
    if total > images:
        yield (
            f"{WARNING}train.batch_size = {total}: more than the {counted(images, 'training image')}, so a step "
            f"shows each {total / images:.2g} times; lower it, or add images"
        )
