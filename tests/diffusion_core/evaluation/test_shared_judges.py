"""Two processes judge with the same networks, or without; one cache stays consistent, whoever writes it."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from forks.ranks import run_ranks
from tiny import digits

from diffusion_core import cache
from diffusion_core.evaluation.classifier import classifier as module
from diffusion_core.evaluation.classifier.classifier import classifier_for, read_classifier
from diffusion_core.evaluation.classifier.training import RECIPES, Recipe

CPU = torch.device("cpu")
QUICK = Recipe(width=4, epochs=1, batch_size=64, lr=0.1)

JUDGING = """
import json, os, sys
from dataclasses import replace
import torch
from accelerate import PartialState
from tiny import digits
from diffusion_core.config import DataConfig, EvalConfig, build
from diffusion_core.evaluation.classifier.training import RECIPES, Recipe
from diffusion_core.evaluation.suite import Suite

if "MOVED" in os.environ:
    os.chdir(os.environ["DIFFUSION_SWEEPS_CACHE"])
state = PartialState(cpu=True)
rank = state.process_index
RECIPES["tiny"] = Recipe(width=4, epochs=1, batch_size=64, lr=0.1)
from diffusion_core.evaluation.classifier import classifier, training
real = classifier.train_classifier
def otherwise(images, classes, recipe, **more):  # As another kind of GPU does.
    return real(images, classes, replace(recipe, seed=rank), **more)
classifier.train_classifier = otherwise
extractors = sys.argv[1].split(",")
config = build(EvalConfig, {"figures": ["frechet"], "extractors": extractors, "num_images": 64})
said = []
data = replace(digits(), train=digits().train.select(torch.arange(200)))
cpu = torch.device("cpu")
suite = Suite(DataConfig(name="digits"), config, data, with_classifier=True, device=cpu, say=said.append)
found = suite.classifier
weight = float(sum(tensor.double().sum() for tensor in found.network.state_dict().values()))
images = data.val.images_NCHW[rank:64:2], data.val.labels_N[rank:64:2]
figures = suite.judge([images], 64, "held out").figures
told = {"weights": found.weights, "accuracy": found.accuracy, "sum": weight, "figures": figures, "said": said}
print("told " + json.dumps(told | {"kept": [extractor.name for extractor in suite.extractors]}))
"""


class Flat(torch.nn.Module):
    """A feature network: pixels times a weight."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Return features."""
        return images_BCHW.flatten(1)[:, :8] * self.factor


def judged(
    forks: Forks, folder: Path, extractors: str, caches: tuple[str, str], *, moved: bool = False
) -> list[dict[str, Any]]:
    """What both processes say. Files are looked for in their caches, if they are moved there."""
    (folder / "judging.py").write_text(JUDGING)
    env = [{cache.VARIABLE: str(folder / name)} | ({"MOVED": "yes"} if moved else {}) for name in caches]
    ended = run_ranks(forks, folder, ["judging.py", extractors], env=env)
    assert [status for status, _, _ in ended] == [0, 0], ended
    return [json.loads(out.partition("told ")[2]) for _, out, _ in ended]


@pytest.mark.slow
@pytest.mark.parametrize("caches", [("one", "one"), ("one", "two")])
def test_all_processes_have_the_first_ones_classifier_and_record(
    caches: tuple[str, str], tmp_path: Path, forks: Forks
) -> None:
    """Also with caches of their own; the statistics in a cache are those of the network that their name has."""
    first, second = judged(forks, tmp_path, "classifier", caches)
    assert first == second
    (file,) = (tmp_path / "one" / "classifiers").iterdir()
    kept = read_classifier(file, CPU)
    assert (kept.weights, kept.accuracy) == (first["weights"], first["accuracy"])
    again = judged(forks, tmp_path, "classifier", ("one", "one"))  # With warm caches.
    assert again[0] == again[1] == first
    assert not (tmp_path / "two" / "classifiers").exists()


@pytest.mark.slow
def test_a_network_that_one_process_lacks_judges_in_none(tmp_path: Path, forks: Forks) -> None:
    """The first one says which it is and why, and others are used."""
    for name, factor in (("whole", 1.0), ("else", 2.0)):
        for cache_folder in ("one", "two"):
            place = tmp_path / cache_folder / f"{name}.pt"
            place.parent.mkdir(exist_ok=True)
            scale = factor if cache_folder == "two" else 1.0
            torch.jit.script(Flat(scale)).save(str(place))
    (tmp_path / "one" / "alone.pt").write_bytes((tmp_path / "one" / "whole.pt").read_bytes())
    first, second = judged(forks, tmp_path, "alone.pt,classifier,else.pt,whole.pt", ("one", "two"), moved=True)
    assert first["kept"] == second["kept"] == ["classifier-digits", "whole"]
    assert first == second
    alone, other = first["said"]
    assert alone.startswith("no figures in features of alone.pt: process 1 on ")
    assert "alone.pt': No such file" in alone
    assert other.startswith("no figures in features of else.pt: process 1 on ")
    assert "other weights" in other


def test_of_classifiers_trained_at_the_same_time_the_first_one_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setitem(RECIPES, "tiny", QUICK)
    small = replace(digits(), train=digits().train.select(torch.arange(200)))
    together, seeds, real = threading.Barrier(3), iter(range(3)), module.train_classifier

    def otherwise(images, classes, recipe, **more):  # type: ignore[no-untyped-def]
        network = real(images, classes, replace(recipe, seed=next(seeds)), **more)
        together.wait()
        return network

    monkeypatch.setattr(module, "train_classifier", otherwise)
    found = []

    def train() -> None:
        found.append(classifier_for(small, "digits", mirrored=False, device=CPU))

    threads = [threading.Thread(target=train) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (file,) = (tmp_path / "classifiers").iterdir()
    assert {one.weights for one in found} == {read_classifier(file, CPU).weights}
    assert len({one.accuracy for one in found}) == 1


def test_a_disk_without_hard_links_keeps_the_first_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refused)
    for content in (b"first", b"second"):
        assert cache.keep(tmp_path / "file", partial(Path.write_bytes, data=content), replace=False)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["first"]
