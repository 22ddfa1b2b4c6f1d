"""What commands show in a terminal: help that fits, the version, tables that fit, bars and lines of progress."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from commands import COMMANDS, ROOT, run_command
from tiny import TINY

import diffusion_core
from agent.config import TrialConfig
from diffusion_core.config import PRESETS, list_knobs
from diffusion_core.config.parsing import COMMAND_FLAGS
from diffusion_core.config.presets import PRESET_HELP
from diffusion_core.config.usage import FLAGS, USUAL, sections
from diffusion_core.evaluation.leaderboard import entry, show
from diffusion_core.search.results import TrialRecord
from diffusion_core.search.results import table as sweep_table
from diffusion_core.tables import short_names, text_table
from diffusion_core.terminal import progress
from diffusion_core.terminal.progress import Lines, Shown, progress_of
from diffusion_core.terminal.wrapping import wrapped

WORDS = [f"--{key}={','.join(map(str, value)) if isinstance(value, list) else value}" for key, value in TINY.items()]
HELPS = [[name, "--help"] for name in COMMANDS] + [
    ["agent", "--help", "all"],
    ["agent", "--help", "prune"],
    ["lottery_ticket", "--overlap", "a", "b", "--help"],
    ["convert_diffusers", "import", "--help"],
    ["convert_diffusers", "export", "--help"],
]


def longest(text: str) -> int:
    return max(map(len, text.splitlines()))


@pytest.mark.parametrize("width", [40, 60, 80])
def test_help_does_not_split_a_quoted_word(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert run_command("agent.sweep", "--help") == 0
    assert "'--partition=gpu --time=08:00:00'" in capsys.readouterr().out


def test_help_names_the_default_of_the_folder_of_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("sample_images", "--help") == 0
    assert "folder of images (samples)" in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_fits_the_terminal(
    words: list[str], width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert run_command(*words) == 0
    out = capsys.readouterr().out
    assert "usage: " in out or words[2:] == ["prune"]
    assert longest(out) <= width


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_tells_its_version(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(name, "--version") == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert capsys.readouterr().out == f"{project['name']} {project['version']}\n"
    assert diffusion_core.__version__ == project["version"]


def test_wrapping_keeps_every_word_and_the_lines_of_examples() -> None:
    text = "A paragraph that is\nlong enough to wrap.\n\n"
    text += "  python scripts/a.py --flag=1 --other=2   what it does\n  short   x"
    for width in (24, 40, 200):
        lines = wrapped(text, width).splitlines()
        assert all(len(line) <= width for line in lines)
        words = [word for word in " ".join(lines).split() if word != "\\"]
        assert words == text.split(), width
    assert "  short   x" in wrapped(text, 40).splitlines()
    # A shell puts the two lines of a command together again.
    joined = re.sub(r" \\\n\s*", " ", wrapped(text, 30))
    assert "  python scripts/a.py --flag=1 --other=2\n" in joined


# The help of commands with knobs.


def test_the_first_page_of_help_is_short_and_leads_to_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("agent", "--help") == 0
    page = capsys.readouterr().out
    assert len(page.splitlines()) <= 80
    fields = dict(list_knobs(TrialConfig))
    assert set(USUAL) <= fields.keys()
    for name in (*PRESETS, *sections(TrialConfig)):
        assert re.search(rf"^  {name} +\S", page, re.MULTILINE), name
    assert page.index("digits") < page.index("--prune.method")
    assert PRESET_HELP.keys() == PRESETS.keys()
    assert FLAGS[0] == "--config"
    assert set(FLAGS) == set(COMMAND_FLAGS)
    assert sections(TrialConfig).keys() == {key.partition(".")[0] for key in fields if "." in key}
    assert all(sections(TrialConfig).values())


@pytest.mark.parametrize("topic", [*sections(TrialConfig), "train.lr", "seed"])
def test_the_help_of_a_section_shows_it_alone(topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help", topic], [f"--help={topic}"], ["-h", topic, "--preset=digits"]):
        assert run_command("agent", *words) == 0
        shown = re.findall(r"^  --(\S+?)=", capsys.readouterr().out, re.MULTILINE)
        assert shown == [key for key, _ in list_knobs(TrialConfig) if key == topic or key.startswith(f"{topic}.")]


def test_the_first_page_of_help_imports_no_torch() -> None:
    code = (
        "import sys; from agent.__main__ import main; main(['--help']); main(['--version']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


# Tables.


class Terminal:
    """Stands for stdout in tests of tables: it says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def leaderboard() -> str:
    """A leaderboard of three models, two of which were measured in the same way."""
    protocols = {"eval/fid50k_train": "50,000 images against the training set, " + "by a long story " * 10}
    entries = []
    for number in range(3):
        ways = protocols if number < 2 else {"eval/fid50k_train": "another way"}
        ways = ways | {"eval/kid_inception_train": "subsets of 100", "eval/precision_inception_train": "k = 3"}
        figures = dict.fromkeys(ways, 0.5 + number) | {"val/loss": 0.1, "eval/class_agreement": number / 3}
        costs = {"model/params": 35_746_307, "model/macs": 6_060_000_000 + number, "model/latency": 0.01}
        entries.append(entry(f"run-{number}", 500, costs, figures, ways))
    return show(entries)


def sweep() -> str:
    """The closing table of a sweep as wide as that of the demo."""
    varied = ["diffusion.schedule", "prune.method", "train.lr", "sample.guidance"]
    same = {"val/loss": 0.1, "prune/sparsity": 0.5, "model/macs": 1e7, "model/nonzero_params": 123_456}
    records = []
    for number in range(6):
        parameters = dict(zip(varied, ("cosine", "structured", 2e-3, float(number)), strict=True))
        figures = {**same, "eval/class_agreement": 0.9 + number / 100}
        records.append(
            TrialRecord(f"quickstart-{number:03d}-0a1b", "finished", parameters, figures, seconds=30 + number)
        )
    return sweep_table(records, varied, "eval/class_agreement")


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("table", [leaderboard, sweep])
def test_tables_fit_the_terminal(table: Any, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    whole = table()
    assert longest(whole) > 120, "without a terminal: one line a row"
    with monkeypatch.context() as within:
        within.setattr(sys, "stdout", Terminal())
        fitted = table()
    assert longest(fitted) <= width
    numbers = set(re.findall(r"\d[\d.,e+]*\d", whole))
    # Nothing is lost, and no cell is broken in two: every number is there.
    assert all(number in fitted for number in numbers), numbers


def test_a_table_too_wide_for_the_terminal_loses_no_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    columns = ["id", *(f"section.{letter * 12}" for letter in "abcdef"), "same/constant"]
    rows = [[f"r{i}", *(f"{i}{letter}{letter}" for letter in "abcdef"), "7"] for i in range(3)]
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stdout", Terminal())
    lines = text_table(columns, rows).splitlines()
    assert max(map(len, lines)) <= 40
    assert lines[-1] == "in all rows: same/constant = 7"
    for i, row in enumerate(rows):
        mine = " ".join(line for line in lines if line.startswith(f"r{i}")).split()
        assert [word for word in mine if word != f"r{i}"] == row[1:-1]
    monkeypatch.setenv("COLUMNS", "400")
    assert "section.aaaaaaaaaaaa" in text_table(columns, rows), "where it fits, names are whole"


def test_names_are_shortened_where_they_stay_apart() -> None:
    assert short_names(["", "val/loss", "train/loss", "train.lr", "a.b/c"]) == ["", "val/loss", "train/loss", "lr", "c"]


# Progress.


def test_progress_without_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bar = progress_of("training", 100, "step", shown=True, initial=10)
    assert isinstance(bar, Lines)
    with bar:
        for _ in range(89):
            now += 1.0
            bar.set_postfix_str(f"loss {now}")
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "training: 40 of 100 steps, 1 a second, about 60 s left, loss 30.0",
        "training: 70 of 100 steps, 1 a second, about 30 s left, loss 60.0",
    ]
    with progress_of("training", 100, "step", shown=False) as hidden:
        now += 100.0
        hidden.update()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    now = 1.0
    assert list(Shown(["x"], "work", 1, "item", shown=False)) == ["x"]
    assert capsys.readouterr().err == ""


def test_commands_print_no_carriage_return_into_pipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each command with a bar, one after the other on one model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    pictures = tmp_path / "pictures" / "a"
    pictures.mkdir(parents=True)
    from PIL import Image

    for number in range(3):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(pictures / f"{number}.png")
    model = ["--checkpoint", "run"]
    for words, bar in (
        (["agent", *WORDS, "--log.progress=true", "--log.dir=run", "--eval.classifier=none"], "training: 8 of 8 steps"),
        (["sample_images", *model, "--num-images", "4", "--out", "images", "--device", "cpu"], "sampling: "),
        (["prune", *model, "--target", "macs=0.5", "--out", "pruned", "--importance", "taylor",
          "--prune.calibration_batches=2", "--num-images", "0"], "gradients: 2 of 2 batches"),
        (["prepare_images", "pictures", "ready", "--size", "8"], "preparing: 3 of 3 images"),
    ):  # fmt: skip
        assert run_command(*words) == 0, capfd.readouterr().err
        out, err = capfd.readouterr()
        assert "\r" not in out + err
        assert "it/s" not in err
        assert bar in err, words


def test_no_line_is_glued_to_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal, what is printed during training stands in lines of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # Bars are as wide as the window.
    with os.fdopen(terminal, "w") as stderr, monkeypatch.context() as within:
        within.setattr(sys, "stderr", stderr)
        status = run_command("agent", *WORDS, "--log.progress=true", "--eval.num_images=8")
    text = os.read(screen, 60_000).decode()
    os.close(screen)
    assert status == 0, text
    assert "training: 100%|" in text, "the bar is shown"
    # What is left of a line after all carriage returns in it.
    seen = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    (said,) = [line for line in seen if "evaluation: " in line]
    assert said.startswith("evaluation: 8 images"), said
