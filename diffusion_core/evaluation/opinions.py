"""Generated images with their labels and what the classifier takes them for: rows of a table to look at.

A file of rows is JSON, and holds its images as PNG in base64, so that it can be sent again from the run's folder.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffusion_core.evaluation.classifier.classifier import Classifier
from diffusion_core.files import write_json
from diffusion_core.sampling import media

SHOWN = 40
"""Images in a table: four of each of ten classes."""
COLUMNS = ("image", "label", "opinion", "confidence")
"""What a row holds: the image, the class that was asked for, the class that is seen, and its probability."""


def first_images(
    batches: Iterable[tuple[Tensor, Tensor | None]], kept: list[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield batches as they are, and keep the first ``SHOWN`` images and their labels."""
    left = SHOWN
    for images_BCHW, labels_B in batches:
        if left > 0 and labels_B is not None:
            kept.append((images_BCHW[:left], labels_B[:left]))
            left -= len(images_BCHW)
        yield images_BCHW, labels_B


def write_opinions(
    path: Path, kept: Sequence[tuple[Tensor, Tensor]], classifier: Classifier, class_names: Sequence[str]
) -> bool:
    """Write what a classifier thinks of uint8 images; return False and write nothing if they have no labels.

    Args:
        path: the file, JSON.
        kept: batches of images, ``(B, C, H, W)``, and their labels, ``(B,)``; -1 is no label.
        classifier: the classifier.
        class_names: names of the classes, by label.
    """
    if not kept or any(bool((labels_B < 0).any()) for _, labels_B in kept):
        return False
    images_NCHW = torch.cat([images_BCHW for images_BCHW, _ in kept])
    labels_N = torch.cat([labels_B for _, labels_B in kept])
    logits_NK = classifier(images_NCHW).logits_BK
    assert logits_NK is not None
    confidence_N, seen_N = logits_NK.softmax(1).cpu().max(1)
    rows = [
        {
            "image": png_text(pixels_CHW),
            "label": class_names[label],
            "opinion": class_names[seen],
            "confidence": round(confidence, 4),
        }
        for pixels_CHW, label, seen, confidence in zip(
            images_NCHW, labels_N.tolist(), seen_N.tolist(), confidence_N.tolist(), strict=True
        )
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, rows)
    return True


def png_text(pixels_CHW: Tensor) -> str:
    """Return a uint8 image, enlarged as in grids, as PNG in base64."""
    buffer = io.BytesIO()
    media.enlarged(pixels_CHW).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
