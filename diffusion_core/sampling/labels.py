"""Which images a user means: labels by names and numbers of classes, and how many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import cache

from diffusion_core.checkpoint import Checkpoint
from diffusion_core.config import ConfigError
from diffusion_core.config.knobs import MOST_IMAGES
from diffusion_core.data.classes import SHOWN, are_numbers, normal
from diffusion_core.messages import listed
from diffusion_core.model.unet import NO_LABEL


def find_labels(option: str, text: str, class_names: Sequence[str]) -> list[int]:
    """Return the labels of a list such as ``0,3,7`` or ``cat,dog``, each once.

    A name may contain commas and spaces. Of several ways to read the list, the one with the longest names counts.

    Raises:
        ConfigError: if there is no such class; the message starts with ``option``.
    """
    words, known = text.split(","), _by_name(class_names)
    longest = 1 + max((name.count(",") for name in known), default=0)
    labels, start, alone = [], 0, cache(lambda word: find_label(option, word, class_names))
    while start < len(words):
        for end in range(min(start + longest, len(words)), start, -1):
            label = _named(",".join(words[start:end]), known)
            if label is not None:
                break
        else:
            label, end = alone(words[start]), start + 1
        labels.append(label)
        start = end
    return list(dict.fromkeys(labels))


def find_label(option: str, word: str, class_names: Sequence[str], others: str = "all, or some") -> int:
    """Return the label of a class, by its name or its number from 0.

    A name counts before a number. If all names are numbers, a number is a name, also written otherwise (``07``).

    Args:
        option: for messages.
        word: what the user typed.
        class_names: by label.
        others: for messages, what else is accepted.

    Raises:
        ConfigError: if there is no such class.
    """
    label = _named(word, _by_name(class_names))
    if label is not None:
        return label
    word, numbers = word.strip(), are_numbers(class_names)
    if numbers and are_numbers([word]):
        equal = [label for label, name in enumerate(class_names) if Decimal(name) == Decimal(word)]
        if len(equal) == 1:
            return equal[0]
    elif word.isascii() and word.isdecimal() and int(word) < len(class_names):
        return int(word)
    known = f"of {listed(class_names, SHOWN)}"
    numbered = "" if numbers else f"of 0 to {len(class_names) - 1} or "
    raise ConfigError(f"{option} = {word!r}: expected {others} {numbered}{known}")


def pick_labels(text: str, checkpoint: Checkpoint) -> list[int]:
    """Return the labels that ``--labels`` names, by number or class name, in its order."""
    number = checkpoint.metadata["num_classes"]
    if not number:
        if text != "all":
            raise ConfigError(f"--labels = {text!r}: the model knows no labels; expected all")
        return [NO_LABEL]
    if text == "all":
        return list(range(number))
    return find_labels("--labels", text, checkpoint.class_names[:number])


def pick_count(text: str | None, default: int, rows: int | None = None) -> int:
    """Return how many images ``--num-images`` asks for, or the default, or fewer where that is too many.

    Args:
        text: what the user typed, or None.
        default: used for None.
        rows: most rows of the picture, where an image is a row of it; None: images are single files.
    """
    most = MOST_IMAGES if rows is None else rows
    if text is None:
        return min(default, most)
    if not text.isdecimal() or not 1 <= int(text) <= most:
        why = "" if rows is None else ", rows of one picture; draw more pictures with another --seed and --out"
        raise ConfigError(f"--num-images = {text!r}: expected an integer >= 1 and <= {most:,}{why}")
    return int(text)


def _by_name(class_names: Sequence[str]) -> dict[str, int]:
    """Return the labels of classes, the first of each name."""
    return {normal(name): label for label, name in reversed(list(enumerate(class_names)))}


def _named(word: str, known: Mapping[str, int]) -> int | None:
    """Return the label of the class of this name, or of the only one that differs in spaces around it; None if none."""
    return known.get(normal(word), known.get(normal(word.strip())))
