"""What a run takes from outside: its images, and the checkpoints that it starts and learns from.

Trials that are ranked together must take the same. A path or an alias does not tell: a folder of images grows, and a
run goes on. PyTorch is not imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_core.checkpoint import METADATA_FILE
from diffusion_core.config import ConfigError
from diffusion_core.data.fingerprint import RECORDED
from diffusion_core.run_folder import CHECKPOINTS, ROUNDS, SWEEP_STATE, SWEEP_TRIALS

PARENT_KEY, TEACHER_KEY = "parent", "taught_by"
"""Keys of a checkpoint's extra metadata for the checkpoints that its run started from and learned from."""

NAMED_BY = {
    "data": ("data.path", "data.name", "data.image_size", "data.val_fraction"),
    "init": ("init.checkpoint", "init.artifact"),
    "distill": ("distill.checkpoint", "distill.artifact"),
}
"""The knobs that say which input to take."""
ERROR = "error: "
"""How the line with which a trial ends begins."""
DIGITS = 12
"""Digits of a hash in a message."""


class OtherInput(ConfigError):
    """An input of a sweep's trial is another one than that of the trials before it."""


@dataclass(frozen=True)
class Input:
    """Something that a run takes from outside.

    Attributes:
        key: the knob that names it.
        named: the values of all knobs that name it.
        sha256: hash of its content.
        words: what it is, for messages.
        classes: of images, the names of the classes by label; empty if they are unknown.
    """

    key: str
    named: tuple[Any, ...]
    sha256: str
    words: str
    classes: tuple[str, ...] = ()

    def differs(self, other: Input) -> bool:
        """Return whether two runs that name the same input have taken different ones.

        Images whose classes are only in another order, which is that of a checkpoint, cannot be compared.
        """
        reordered = self.classes != other.classes and sorted(self.classes) == sorted(other.classes)
        return self.named == other.named and self.sha256 != other.sha256 and not reordered


def inputs_of(metadata: Mapping[str, Any]) -> dict[str, Input]:
    """Return what a run has taken, by the section of the knobs that name it: ``data``, ``init`` and ``distill``.

    Args:
        metadata: that of one of its checkpoints. What is missing or damaged is left out.
    """
    found: dict[str, Input] = {}
    with suppress(KeyError, TypeError, ValueError, AttributeError):
        config, extra = metadata["config"], metadata["extra"]
        records = {"data": metadata.get(RECORDED), "init": extra.get(PARENT_KEY), "distill": extra.get(TEACHER_KEY)}
        for section, record in records.items():
            named = {key: config.get(key) for key in NAMED_BY[section]}
            key = next((key for key, value in named.items() if value is not None), None)
            if record is None or key is None:
                continue
            if section == "data":
                what = f"{record['train_images']:,} images for training and {record['val_images']:,} held out"
            else:
                what = f"step {record['step']:,}"
            content = str(record["sha256"])
            classes = tuple(metadata.get("class_names", ())) if section == "data" else ()
            words = f"{what} (sha256 {content[:DIGITS]})"
            found[section] = Input(key, tuple(named.values()), content, words, classes)
    return found


def recorded_inputs(folder: Path) -> dict[str, Input]:
    """Return what the run of a folder has taken, as its newest checkpoint says; empty if it has none.

    A chain of tickets has the checkpoints of its rounds. Nothing is verified: another process may work on the run.
    """
    checkpoints = f"{CHECKPOINTS}/step-*/{METADATA_FILE}"
    files = [
        *sorted(folder.glob(f"{ROUNDS}/*/{checkpoints}"), reverse=True),
        *sorted(folder.glob(checkpoints), reverse=True),
    ]
    for file in files:
        with suppress(OSError, ValueError, RecursionError):
            return inputs_of(json.loads(file.read_text(encoding="utf-8")))
    return {}


def other_trials(folder: Path) -> list[Path]:
    """Return the folders of the other trials of the offline sweep that a run belongs to; empty if it is of none."""
    trials = folder.absolute().parent
    if trials.name != SWEEP_TRIALS or not (trials.parent / SWEEP_STATE).is_file():
        return []
    return sorted(path for path in trials.iterdir() if path.name != folder.name)


def check_as_others(folder: Path, described: Callable[[], Mapping[str, Any]]) -> None:
    """Check that a new trial of an offline sweep takes what the other trials have taken that name the same.

    Args:
        folder: the trial's folder. That of a run that is no trial of a sweep is not checked.
        described: returns what the trial would take, as the metadata of its checkpoints would describe it.

    Raises:
        OtherInput: at the first difference.
    """
    others = other_trials(folder)
    if not others:
        return
    metadata = described()
    now = inputs_of(metadata)
    left = set(now)
    for other in others:
        then = recorded_inputs(other)
        for section in sorted(left & then.keys()):
            mine, theirs = now[section], then[section]
            if mine.differs(theirs):
                raise OtherInput(
                    f"{mine.key} = {metadata['config'][mine.key]!r}: is {mine.words} now, and was {theirs.words} for "
                    f"trial {other.name}, with which this one would be ranked; restore that, or give the sweep another "
                    "--name"
                )
            if mine.named == theirs.named and mine.sha256 == theirs.sha256:
                left.discard(section)  # Each trial was compared with those before it.
        if not left:
            return


def refusal_in(log: Path | None) -> str:
    """Return why a trial was refused, as the file of its output says it; None: it was printed."""
    text = log.read_text(encoding="utf-8", errors="replace") if log is not None and log.is_file() else ""
    said = [line.removeprefix(ERROR) for line in text.splitlines() if line.startswith(ERROR)]
    return (
        said[-1] if said else "would take another input than the trials before it, as it says; nothing more is started"
    )


def differing_inputs(trials: Iterable[Mapping[str, Input]]) -> Iterator[tuple[str, list[str]]]:
    """Yield each knob by which trials have taken different inputs, and what these are, in words."""
    taken = [inputs for inputs in trials if inputs]
    for section in NAMED_BY:
        found = [inputs[section] for inputs in taken if section in inputs]
        by_knobs: dict[tuple[Any, ...], list[Input]] = {}
        for one in found:
            by_knobs.setdefault(one.named, []).append(one)
        for alike in by_knobs.values():
            others = [one for one in alike if any(one.differs(other) for other in alike)]
            if others:
                yield others[0].key, list(dict.fromkeys(one.words for one in others))
