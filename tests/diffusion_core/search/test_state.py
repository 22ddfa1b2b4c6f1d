"""What the command of a sweep gave its trials is noted, and trials with other settings are refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from stub_sweep import STUB, stub_content

from agent.sweep.file import check_sweep
from agent.sweep.offline import offline_sweep
from diffusion_core.search.offline import OfflineSweep
from diffusion_core.search.sweep import SweepError


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stub trial whose name says that it reads knobs."""
    (tmp_path / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STUB_NOTES", str(tmp_path / "notes"))
    return shutil.copyfile(STUB, tmp_path / "train_cifar.py")


def coordinator(*words: str, **base: object) -> OfflineSweep:
    Path("base.yaml").write_text(yaml.safe_dump(base))
    content = stub_content(3, [0.3, 0.2])
    content["command"] = ["${interpreter}", "-S", "train_cifar.py", "--config=base.yaml", *words, "${args}"]
    return offline_sweep(check_sweep(content, "mine.yaml", "mine"), Path("sweep"))


BASE = {"model": {"dropout": 0.1}, "train.weight_decay": 0.01}


@pytest.mark.parametrize(
    ("base", "had", "key", "has"),
    [
        ({"model.dropout": 0.2, "train.weight_decay": 0.01}, "0.1", "model.dropout", "0.2"),
        ({"model.dropout": 0.1}, "0.01", "train.weight_decay", "no value"),
        (BASE | {"train.grad_clip": 2.0}, "no value", "train.grad_clip", "2.0"),
    ],
)
def test_an_edited_base_file_is_refused(base: dict[str, object], had: str, key: str, has: str) -> None:
    first = coordinator(**BASE)
    first.run(count=1)
    with pytest.raises(SweepError) as caught:
        coordinator(**base)
    assert str(caught.value) == (
        f"{key} = {has}: the trials in 'sweep' have {had}, by the files and words of the command; "
        "set it back, or give this sweep another --name"
    )
    again = coordinator(**BASE)
    again.run()
    assert [trial.state for trial in again.state.trials] == ["finished"] * 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"metric": {"name": "train/loss", "goal": "minimize"}}, "metric.name = 'train/loss': {} has 'val/loss'"),
        ({"method": "random"}, "method = 'random': {} has 'grid'"),
        ({"name": "new"}, "name = 'new': {} has no value"),
    ],
)
def test_an_edited_sweep_file_is_refused_by_its_first_difference(changed: dict[str, object], said: str) -> None:
    content = stub_content(3, [0.3, 0.2])
    offline_sweep(check_sweep(content, "mine.yaml", "mine"), Path("sweep")).run(count=1)
    with pytest.raises(SweepError) as caught:
        offline_sweep(check_sweep(content | changed | {"run_cap": 5}, "mine.yaml", "mine"), Path("sweep"))
    remedy = "; set it back in the sweep file, or give this sweep another --name"
    assert str(caught.value) == said.format("the sweep in 'sweep'") + remedy


@pytest.mark.parametrize(("rates", "key"), [([0.3, 0.1], "values = [0.3, 0.1]"), ([0.3], "values = [0.3]")])
def test_an_edited_parameter_is_named(rates: list[float], key: str) -> None:
    first, edited = (check_sweep(stub_content(3, each), "mine.yaml", "mine") for each in ([0.3, 0.2], rates))
    offline_sweep(first, Path("sweep")).run(count=1)
    with pytest.raises(SweepError, match=re.escape(f"parameters.train.lr.{key}: the sweep in 'sweep' has [0.3, 0.2]")):
        offline_sweep(edited, Path("sweep"))


def test_a_base_file_that_says_the_same_is_none_that_was_edited() -> None:
    """Its parameters come after it, so what it says of them has no effect."""
    coordinator(**BASE).run(count=1)
    again = coordinator(**{"model.dropout": 0.1, "train": {"weight_decay": 0.01, "lr": 0.7, "steps": 50}})
    again.run()
    assert [trial.state for trial in again.state.trials] == ["finished"] * 2


def test_a_variable_of_the_command_counts_and_a_secret_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "mellon-mellon-mellon")
    monkeypatch.setenv("DATA", "data/mellon-mellon-mellon")
    words = ("--eval.inception_weights=${envvar:DATA}",)
    coordinator(*words, **BASE).run(count=1)
    assert "mellon" not in Path("sweep/sweep.json").read_text()
    coordinator(*words, **BASE).run(count=1)
    monkeypatch.setenv("DATA", "data/two")
    with pytest.raises(SweepError, match=r"eval\.inception_weights = 'data/two': the trials in 'sweep' have 'data/"):
        coordinator(*words, **BASE)


def test_a_state_of_an_earlier_version_loads_and_is_completed() -> None:
    coordinator(**BASE).run(count=1)
    file = Path("sweep/sweep.json")
    state = json.loads(file.read_text())
    assert state.pop("fixed") == {"model.dropout": 0.1, "train.weight_decay": 0.01}
    file.write_text(json.dumps(state))
    again = coordinator(**BASE | {"train.weight_decay": 0.02})
    again.run()
    assert [trial.state for trial in again.state.trials] == ["finished"] * 2
    assert json.loads(file.read_text())["fixed"]["train.weight_decay"] == 0.02
