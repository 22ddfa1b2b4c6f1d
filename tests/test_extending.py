"""The recipes of docs/extending.md, run as they stand: inside the project, and as a plugin outside of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forks import Forks

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
RECIPE = re.compile(r"`([\w/]+\.py)`\.[^`]*(?:`[^`\n]+`[^`]*)*?```python\n# recipe: ([^\n]+)\n(.*?)```", re.DOTALL)
RECIPES = {knobs.split()[0]: (file, knobs.split(), code) for file, knobs, code in RECIPE.findall(TEXT)}
TINY = [
    "--preset=digits",
    "--model.channels=8",
    "--model.norm_groups=4",
    "--train.steps=4",
    "--train.batch_size=8",
    "--train.warmup_steps=1",
    "--train.precision=fp32",
    "--sample.steps=3",
    "--sample.per_class=1",
    "--eval.classifier=none",
    "--eval.val_images=8",
    "--eval.consistency_images=0",
    "--checkpoint.best_metric=val/loss",
    "--log.progress=false",
]


def environment(folder: Path, path: Path) -> dict[str, str]:
    """Of a command of the project that lies in ``path``."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(path), str(folder)]),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "OMP_NUM_THREADS": "1",
    }


def run(words: list[str], folder: Path, path: Path) -> str:
    """Run a command, which must succeed; returns what it printed."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment(folder, path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_there_is_a_recipe_for_each_registry() -> None:
    assert len(RECIPES) == TEXT.count("```python") == 6


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_works_as_a_plugin(recipe: str, tmp_path: Path, forks: Forks) -> None:
    def run(words: list[str], *, fails: bool = False) -> str:
        command = forks.python(words, tmp_path, environment(tmp_path, ROOT))
        assert (command.wait() != 0) == fails, command.output
        return command.output

    _, knobs, code = RECIPES[recipe]
    key, _, value = recipe.partition("=")
    (tmp_path / "my_plugin.py").write_text(code, encoding="utf-8")
    words = [f"--{knob}" for knob in knobs]
    run(["-m", "agent", *TINY, "--plugins=my_plugin", *words, "--log.dir=run"])
    if key == "eval.figures":
        history = (tmp_path / "run" / "history.jsonl").read_text(encoding="utf-8")
        assert f'"eval/{value}_20"' in history
    script = str(ROOT / "scripts" / "sample_images.py")
    sampling = [script, "--checkpoint", "run", "--num-images", "1", "--out", "images"]
    if key in (
        "sample.sampler",
        "diffusion.schedule",
        "data.name",
        "eval.figures",
    ):  # What the core's configuration names.
        said = run(sampling, fails=True)
        assert said.count("\n") == 1
        assert "--plugins=my_plugin" in said
        assert not (tmp_path / "images").exists()
        run([*sampling, "--plugins=my_plugin"])
    else:
        run(sampling)
    said = run(["-m", "agent", *TINY, *words, "--dry-run"], fails=True)
    assert re.search(rf"{key} = .*{value}.*: expected (one of|a list)", said)
    (tmp_path / "my_plugin.py").unlink()
    said = run(["-m", "agent", *TINY, "--plugins=my_plugin", *words], fails=True)
    assert said.startswith("error: plugins = 'my_plugin': cannot import it (No module named 'my_plugin')")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_all_recipes_work_inside_the_project(tmp_path: Path) -> None:
    project = tmp_path / "project"
    for package in ("diffusion_core", "pruning", "agent"):
        shutil.copytree(ROOT / package, project / package, ignore=shutil.ignore_patterns("__pycache__"))
    words = []
    for file, knobs, code in RECIPES.values():
        with (project / file).open("a", encoding="utf-8") as module:
            module.write("\n\n" + code)
        words += [f"--{knob}" for knob in knobs if knob != "prune.method=away_from_zero"]
    run(["-m", "agent", *TINY, *words, "--log.dir=run"], tmp_path, project)
    run(["-m", "agent", *TINY, "--prune.method=away_from_zero", "--log.dir=other"], tmp_path, project)
    told = run(["-m", "agent", "--help", "sample"], tmp_path, project)
    assert "halfway: half of the noise" in " ".join(told.split())
