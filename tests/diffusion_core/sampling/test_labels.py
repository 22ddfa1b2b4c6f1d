"""Which labels users name: by name, by number, with commas and spaces, in any Unicode form, in old checkpoints too."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
import sample_images
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import metadata, one_line, tiny_config, tiny_network

from diffusion_core.checkpoint import Checkpoint, write_checkpoint
from diffusion_core.config import ConfigError
from diffusion_core.data.classes import class_order
from diffusion_core.diffusers_io.exporter import pick_label
from diffusion_core.sampling.labels import find_labels, pick_count
from diffusion_core.sampling.media import MOST_PIXELS, grid, most_rows

NUMBERS = [str(number) for number in range(12)]
AS_TEXT = sorted(NUMBERS)
"""The order of earlier versions: 0, 1, 10, 11, 2, ..."""


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("cat,dog", ["bird", "cat", "dog"], [1, 2]),
        ("2, 0", ["bird", "cat", "dog"], [2, 0]),
        ("dog,dog,2", ["bird", "cat", "dog"], [2]),
        ("2", NUMBERS, [2]),
        ("2", AS_TEXT, [4]),
        ("10,2", AS_TEXT, [2, 4]),
        ("1", ["1", "2", "3"], [0]),
        ("3,01", ["1", "2", "3"], [2, 0]),
        ("2", ["01", "02"], [1]),
        ("1", ["zero", "1", "2 b"], [1]),
        ("2", ["zero", "2", "b"], [1]),
        ("salt, pepper", ["pepper", "salt", "salt, pepper"], [2]),
        ("pepper,salt", ["pepper", "salt", "salt, pepper"], [0, 1]),
        ("salt, pepper,salt, pepper", ["pepper", "salt", "salt, pepper"], [2]),
        ("a b , c", ["a b", "c"], [0, 1]),
        (" lead", ["lead", " lead"], [1]),
        ("\u00e9", ["z", "e\u0301"], [1]),
        ("e\u0301,z", ["z", "\u00e9"], [1, 0]),
    ],
)
def test_a_list_names_these_classes(text: str, names: Sequence[str], expected: list[int]) -> None:
    assert find_labels("--labels", text, names) == expected


@pytest.mark.parametrize(
    ("text", "names", "words"),
    [
        ("3", ["bird", "cat", "dog"], ["--labels = '3'", "0 to 2", "bird, cat, dog"]),
        ("cow", ["bird", "cat"], ["--labels = 'cow'", "expected all, or some of 0 to 1 or of bird, cat"]),
        ("0", ["1", "2"], ["--labels = '0'", "expected all, or some of 1, 2"]),
        ("2", ["2.0", "2.00", "7"], ["--labels = '2'", "of 2.0, 2.00, 7"]),
        ("cat,,dog", ["cat", "dog"], ["--labels = ''"]),
        ("\u00b2", ["a", "b", "c"], ["--labels = '\u00b2'"]),
    ],
)
def test_other_words_are_refused_in_one_line(text: str, names: Sequence[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        find_labels("--labels", text, names)
    message = one_line(caught.value)
    assert all(word in message for word in words), message


NAMES = st.lists(st.text("ab1,\u00e9 ", min_size=1, max_size=5), min_size=1, max_size=6, unique=True)


@settings(max_examples=50)
@given(NAMES, st.data())
def test_each_class_can_be_named_alone(names: list[str], data: st.DataObject) -> None:
    label = data.draw(st.integers(0, len(names) - 1))
    for word in (names[label], unicodedata.normalize("NFD", names[label])):
        assert find_labels("--labels", word, names) == [label]


@settings(max_examples=50)
@given(st.lists(st.text("ab1\u00e9", min_size=1, max_size=5), min_size=1, max_size=6, unique=True), st.data())
def test_lists_of_names_without_commas_are_read_word_by_word(names: list[str], data: st.DataObject) -> None:
    labels = data.draw(st.lists(st.integers(0, len(names) - 1), min_size=1, max_size=4, unique=True))
    assert find_labels("--labels", ", ".join(names[label] for label in labels), names) == labels


@settings(max_examples=50)
@given(st.lists(st.integers(-1000, 1000), unique=True))
def test_numbers_sort_by_value(values: list[int]) -> None:
    assert [int(name) for name in class_order(map(str, values))] == sorted(values)
    assert class_order([*map(str, values), "x"]) == tuple(sorted([*map(str, values), "x"]))


def test_a_long_list_of_labels_is_read_in_time_that_grows_with_its_length() -> None:
    started = time.process_time()
    assert find_labels("--labels", ",".join(["0"] * 20_000), ["cat", "dog"]) == [0]
    assert time.process_time() - started < 10.0


def test_a_picture_with_a_row_an_image_holds_no_more_rows_than_fit() -> None:
    rows = most_rows(64)
    assert grid(torch.zeros(rows, 1, 64, 64, dtype=torch.uint8), 1).height <= MOST_PIXELS
    assert pick_count(None, 1000, rows) == rows
    assert pick_count(str(rows), 1, rows) == rows
    with pytest.raises(ConfigError, match=f"--num-images = '{rows + 1}': .* <= {rows}"):
        pick_count(str(rows + 1), 1, rows)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint of twelve classes in the order of earlier versions."""
    network = tiny_network(num_classes=12)
    content = metadata(network, tiny_config()) | {"class_names": AS_TEXT}
    tensors = dict(network.state_dict())
    return write_checkpoint(tmp_path_factory.mktemp("old"), 0, content, {"ema": tensors, "model": tensors})


def test_a_checkpoint_keeps_the_order_that_it_records(old: Checkpoint, tmp_path: Path) -> None:
    words = ["--checkpoint", str(old.path), "--out", str(tmp_path), "--num-images=2", "--device=cpu"]
    assert sample_images.main([*words, "--labels=2,11"]) == 0
    drawn = {path.name for path in tmp_path.glob("*-0.png")}
    assert drawn == {f"{AS_TEXT.index('2')}-0.png", f"{AS_TEXT.index('11')}-0.png"}


def test_the_export_picks_the_same_classes(old: Checkpoint) -> None:
    for name in NUMBERS:
        label = pick_label(name, old, has_null_class=True)
        assert label is not None
        assert old.class_names[label] == name
    with pytest.raises(ConfigError, match="--label = '12': expected none, or one of 0, 1, 10, 11, 2"):
        pick_label("12", old, has_null_class=True)
