"""Every block of code in the documents is run here or by another test, or a comment above it says why it is not.

The comment is ``<!-- not run: REASON -->``. Commands run in this process, in a folder as a user has it, in the order of
the document. Those that train are run with ``--dry-run``, which checks all that a run checks.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from commands import run_command
from PIL import Image

from agent import report
from agent.config import build_config
from agent.sweep.file import check_sweep

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"<!-- not run: \w[^>]*\w -->")
BLOCK = re.compile(r"(?:^(<!--[^\n]*-->)\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELSEWHERE = {("extending.md", "python"), ("extending.md", "py")}
"""Blocks that tests/test_extending.py runs."""

TRAINING = {"agent", "agent.sweep", "train_cifar", "lottery_ticket"}
"""Commands that are run with --dry-run."""
QUICK: dict[str, list[str]] = {
    "sample_images": ["--num-images=2", "--steps=2"],
    "evaluate": ["--num-images=20", "--steps=2", "--extractor=classifier"],
    "prune": ["--num-images=2", "--sample.steps=2"],
    "train_cifar": ["--preset=digits"],
    "export_model": ["--format=torch"],
    "agent.sweep": ["--name=another"],
}
"""Words added to the commands, so that they take a moment and need no download. The last of equal words counts."""


class Block(NamedTuple):
    """A block of code: its document, the comment above it, its language and its text."""

    document: Path
    mark: str
    language: str
    text: str

    @property
    def runs_elsewhere(self) -> bool:
        return (self.document.name, self.language) in ELSEWHERE

    def commands(self) -> list[str]:
        return [line for line in self.text.splitlines() if line and not line.startswith("#")]


def blocks(document: Path) -> Iterator[Block]:
    for mark, language, text in BLOCK.findall(document.read_text(encoding="utf-8")):
        yield Block(document, mark, language, text)


ALL = [block for document in DOCUMENTS for block in blocks(document)]
TO_RUN = [block for block in ALL if not MARK.fullmatch(block.mark) and not block.runs_elsewhere]


def test_there_are_blocks_and_reasons() -> None:
    assert len(ALL) > 40
    assert len(TO_RUN) > 15
    for block in ALL:
        if "not run" in block.mark:
            assert MARK.fullmatch(block.mark), f"{block.document.name}: {block.mark}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_all_fences_are_blocks(document: Path) -> None:
    """A fence that the pattern misses would hide what is between it and the next."""
    text = document.read_text(encoding="utf-8")
    assert text.count("\n```") == 2 * len(list(blocks(document)))


def test_blocks_that_are_run_are_commands_or_known_languages() -> None:
    for block in TO_RUN:
        if block.language == "sh":
            for line in block.commands():
                assert line.startswith("python "), (
                    f"{block.document.name}: {line!r} is not run: say why above its block"
                )
        else:
            assert block.language in ("python", "yaml"), f"{block.document.name}: a block is not run: say why above it"


@pytest.mark.parametrize(
    "block", [block for block in TO_RUN if block.language == "yaml"], ids=lambda b: b.document.name
)
def test_yaml_blocks_are_sweeps_or_parts_of_one(block: Block) -> None:
    values = yaml.safe_load(block.text)
    sweep = {"method": "grid", "command": ["${env}", "python", "-m", "agent", "${args}"]} | values
    sweep["parameters"].setdefault("preset", {"value": "digits"})
    check_sweep(sweep, "block", "block")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("trained") / "ID"
    config = build_config({"preset": "digits", "train.steps": 2, "train.warmup_steps": 0, "train.batch_size": 8,
                           "eval.num_images": 20, "sample.steps": 2, "sample.per_class": 1, "log.progress": False,
                           "log.every": 1, "log.dir": str(folder)})  # fmt: skip
    from agent.trial import run_trial
    from diffusion_core.data.datasets import load_data
    from diffusion_core.tracking import NullTracker

    run_trial(config, NullTracker(), dataset=load_data(config.data), folder=folder, run_id="ID")
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, without an account."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return tmp_path


@pytest.fixture
def workplace(elsewhere: Path, trained: Path) -> Path:
    """A checkout with runs, images and a sweep in it, without an account."""
    (elsewhere / "sweeps").symlink_to(ROOT / "sweeps")
    (elsewhere / "scripts").symlink_to(ROOT / "scripts")
    for name in ("ID", "A", "B", "STUDENT"):
        shutil.copytree(trained, elsewhere / "runs" / name)
    house = ROOT / "tests" / "fixtures" / "house" / "sweeps" / "house"
    shutil.copytree(house, elsewhere / "runs" / "sweeps" / "quickstart")
    (elsewhere / "runs" / "sweeps" / "NAME").symlink_to(house)
    draw = np.random.default_rng(0)
    for folder in ("photos/cat", "photos/dog", "DIR/cat", "DIR/dog"):
        (elsewhere / folder).mkdir(parents=True)
        for number in range(12):
            pixels = draw.integers(0, 255, (70, 66, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(elsewhere / folder / f"{number}.png")
    return elsewhere


def run(line: str) -> None:
    """Run a command of a document, which must succeed. A model on W&B is replaced by one on the disk."""
    line = (
        re.sub(r"--artifact \S+", "--checkpoint runs/ID", line)
        .replace(" --upload", "")
        .replace(" ... ", " --preset=digits ")
    )
    words = shlex.split(re.sub(r"--init\.artifact=\S+", "--init.checkpoint=runs/ID", line), comments=True)
    name, words = (words[2], words[3:]) if words[1] == "-m" else (Path(words[1]).stem, words[2:])
    more = [*QUICK.get(name, []), *(["--dry-run"] if name in TRAINING and "--overlap" not in words else [])]
    if "--data.name=folder" in words:
        more = [word for word in more if word == "--dry-run"]
    status = report.main(words) if name == "agent.report" else run_command(name, *words, *more)
    assert status == 0, line


DOCUMENTS_WITH_COMMANDS = sorted({block.document for block in TO_RUN if block.language == "sh"})


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS_WITH_COMMANDS, ids=lambda path: path.name)
def test_commands_run(document: Path, workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for block in TO_RUN:
        if block.document == document and block.language == "sh":
            for line in block.commands():
                run(line)


@pytest.mark.slow
def test_the_python_of_the_readme_runs(elsewhere: Path) -> None:
    (block,) = [block for block in TO_RUN if block.language == "python" and block.document.name == "README.md"]
    short = '"train.steps": 20, "sample.steps": 2, "eval.num_images": 20, "sample.per_class": 1, "log.progress": False'
    source = block.text.replace('"preset": "digits"', f'"preset": "digits", {short}')
    assert source != block.text
    exec(compile(source, "README.md", "exec"), {})
    with Image.open(elsewhere / "digits.png") as drawn:
        assert drawn.height > 90
