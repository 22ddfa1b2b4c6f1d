"""The notebooks run from top to bottom on small settings, and are committed with the pictures that they show."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
HOUSE = ROOT / "tests" / "fixtures" / "house"
MOST_BYTES = 700_000
TINY = {"model.channels": 8, "model.norm_groups": 4, "train.warmup_steps": 1, "train.batch_size": 8, "sample.steps": 2}
SMALL: dict[str, dict[str, Any]] = {
    "quickstart": {"STEPS": 10, "MORE": TINY | {"eval.num_images": 20}},
    "sweep": {"SWEEP": str(HOUSE / "sweeps" / "house")},
    "tickets": {
        "STEPS": 4,
        "ROUNDS": 1,
        "MORE": TINY | {"eval.classifier": "none", "checkpoint.best_metric": "val/loss"},
    },
    "sampling": {"CHECKPOINT": str(HOUSE / "half"), "IMAGES": 20},
    "diffusers": {"CHECKPOINT": str(HOUSE / "half")},
}
"""Settings of the tests, by notebook and by the names in its cell of settings."""

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def with_settings(notebook: Any, settings: dict[str, Any]) -> None:
    """Change the notebook's cell of settings."""
    (cell,) = [cell for cell in notebook.cells if "settings" in cell.metadata.get("tags", [])]
    for name, value in settings.items():
        cell.source, changed = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", cell.source, flags=re.MULTILINE)
        assert changed == 1, name


def offline_environment(home: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return kept | {"HOME": str(home), "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@notebooks
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = read(path)
    with_settings(notebook, SMALL[path.stem])
    for name, value in offline_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert pictures(notebook)


def pictures(notebook: Any) -> list[str]:
    """Kinds of the pictures in a notebook's outputs."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [kind for output in outputs for kind in output.get("data", {}) if kind.startswith("image/")]


@notebooks
def test_it_is_committed_with_pictures_and_without_paths_or_errors(path: Path) -> None:
    text, notebook = path.read_text(encoding="utf-8"), read(path)
    assert path.stat().st_size < MOST_BYTES
    assert pictures(notebook)
    assert '"stderr"' not in text
    assert not re.search(r"/home/|/root/|/tmp/|Traceback", re.sub(r'"image/\w+": "[^"]*"', "", text))
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"


@notebooks
def test_it_has_no_training_code_of_its_own(path: Path) -> None:
    code = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")
    assert not re.search(r"\.backward\(|optim\.|zero_grad|loss\s*=", code)


def test_the_readme_lists_them() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in NOTEBOOKS} == set(re.findall(r"\(notebooks/(\w+\.ipynb)\)", text))
    assert SMALL.keys() == {path.stem for path in NOTEBOOKS}
