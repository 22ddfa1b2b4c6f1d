"""Paths, modules, commands, flags, knobs and names in the documents exist."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from agent.config import TrialConfig
from diffusion_core.cache import VARIABLE
from diffusion_core.config import DataConfig, list_knobs
from diffusion_core.data.datasets import downloads_of
from diffusion_core.evaluation.extractors.inception import FILE_NAME
from diffusion_core.registries import STEP_METHODS
from diffusion_core.sampling.flags import FLAGS
from diffusion_core.search.engine import bands

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PACKAGES = ("agent", "diffusion_core", "pruning")
KNOBS = {key for key, _ in list_knobs(TrialConfig)}
WORDS = {"config", "preset", "help", "print-config", "dry-run"}
"""Words that every command with knobs understands."""
SAMPLING = set(FLAGS.values())
"""Flags of scripts that sample."""

PATH = re.compile(
    r"(?<![\w/.-])(?:(?:agent|diffusion_core|pruning|scripts|sweeps|tests|docs|notebooks)/|\.ci/)[\w./-]*"
)
MODULE = re.compile(r"(?<![\w/.-])(?:agent|diffusion_core|pruning)(?:\.[a-z_]+)+(?![\w/])")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
CODE = re.compile(r"```\w*\n(.*?)```|`([^`]+)`", re.DOTALL)
COMMAND = re.compile(r"python (?:-m ([\w.]+)|scripts/(\w+)\.py)(.*)", re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--([a-z][\w.-]*)")
SBATCH = re.compile(r'--slurm "[^"]*"')
"""Options of sbatch in a command of ours."""

STUDIES = (ROOT / "scripts" / "studies" / "command.py").read_text(encoding="utf-8")
"""Flags of scripts that compare."""

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def spans(text: str) -> Iterator[str]:
    """Code in a document: each line of a block without its comment, and each inline span.

    Lines that begin with "$ " are left out: they show what is refused.
    """
    for block, inline in CODE.findall(text):
        if block:
            yield from (line.partition(" #")[0] for line in block.splitlines() if not line.startswith("$ "))
        else:
            yield " ".join(inline.split())


def source_of(module: str) -> Path | None:
    """The file of a dotted name, which may end in a name that the module defines."""
    path = ROOT / module.replace(".", "/")
    for candidate in (path.with_suffix(".py"), path / "__main__.py", path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def defined_in(path: Path) -> set[str]:
    """Classes, functions, methods and constants that a module defines."""
    text = path.read_text(encoding="utf-8")
    return set(re.findall(r"^\s*(?:def|class) (\w+)", text, re.MULTILINE)) | set(
        re.findall(r"^(\w+)(?:: [^=\n]+)? = ", text, re.MULTILINE)
    )


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of docs/architecture.md, without its head."""
    section = ARCHITECTURE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@documents
def test_paths_exist(document: Path) -> None:
    for path in PATH.findall(document.read_text(encoding="utf-8")):
        assert (ROOT / path.rstrip(".")).exists(), f"{document.name}: {path} does not exist"


def test_paths_in_comments_and_messages_exist() -> None:
    suffixes = {".py", ".yaml", ".ipynb"}
    folders = [ROOT / name for name in (*PACKAGES, "scripts", "sweeps", "notebooks")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes]
    for file in [*files, ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".ci" / "run"]:
        for path in PATH.findall(file.read_text(encoding="utf-8")):
            assert (ROOT / path.rstrip(".")).exists(), f"{file.relative_to(ROOT)}: {path} does not exist"


def test_the_example_of_an_environment_names_commands_that_exist() -> None:
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    modules = re.findall(r"python -m ([\w.]+)", text)
    assert "agent.sync" in modules
    assert all(source_of(module) for module in modules)
    assert "wandb sync" not in text, "it finds no run in runs/"


@pytest.mark.parametrize("file", ["README.md", "docs/sweeps.md", "docs/clusters.md", ".env.example"])
def test_a_server_of_ones_own_is_named(file: str) -> None:
    assert "WANDB_BASE_URL" in (ROOT / file).read_text(encoding="utf-8")


def test_the_files_that_nodes_without_a_network_need_are_named_as_they_are() -> None:
    text = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    section = text.split("## Slurm, without a network on compute nodes\n")[1].split("\n## ")[0]
    place = downloads_of(DataConfig(name="cifar10"))
    for words in (FILE_NAME, VARIABLE, "eval.inception_weights", f"~/{place.relative_to(Path.home())}"):
        assert words in section


def test_all_sweep_files_are_in_the_table() -> None:
    text = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(sweeps/\w+\.yaml)` \|", text, re.MULTILINE)
    assert sorted(listed) == sorted(str(path.relative_to(ROOT)) for path in (ROOT / "sweeps").glob("*.yaml"))


def test_all_methods_of_step_distillation_are_features() -> None:
    text = (ROOT / "docs" / "features.md").read_text(encoding="utf-8").partition("- **Step distillation**")[2]
    feature = text.partition("\n- **")[0]
    for name in STEP_METHODS:
        assert name.replace("_", " ") in feature


def test_comments_say_at_which_values_hyperband_compares() -> None:
    """At the value after each band: with min_iter 1 and eta 2, at the second and the third of four."""
    file = ROOT / "sweeps" / "mnist_recipe.yaml"
    sweep = yaml.safe_load(file.read_text(encoding="utf-8"))
    parameters = sweep["parameters"]
    every, steps = (parameters[key]["value"] for key in ("eval.every", "train.steps"))
    compared = [(band + 1) * every for band in bands(sweep["early_terminate"]) if (band + 1) * every <= steps]
    said = re.findall(r"at (\d+) steps", file.read_text(encoding="utf-8"))
    assert list(map(int, said)) == compared == [400, 600]


@documents
def test_links_lead_somewhere(document: Path) -> None:
    for path, anchor in LINK.findall(document.read_text(encoding="utf-8")):
        target = document.parent / path if path else document
        assert target.exists(), f"{document.name}: {path} does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{document.name}: no heading #{anchor} in {target.name}"


@documents
def test_modules_exist(document: Path) -> None:
    for name in MODULE.findall(document.read_text(encoding="utf-8")):
        if name.endswith(".md"):  # A page of docs/.
            continue
        parent, _, last = name.rpartition(".")
        file = source_of(parent)
        exists = source_of(name) or (file and last in defined_in(file))
        assert exists, f"{document.name}: {name} does not exist"


@documents
def test_commands_have_their_flags(document: Path) -> None:
    for span in spans(document.read_text(encoding="utf-8")):
        for module, script, words in COMMAND.findall(span):
            path = source_of(module) if module else ROOT / "scripts" / f"{script}.py"
            if module and module.split(".")[0] not in PACKAGES:
                continue
            assert path, f"{document.name}: {span}: no module {module}"
            source = path.read_text(encoding="utf-8") + STUDIES
            for flag in FLAG.findall(SBATCH.sub("--slurm", words)):
                known = flag in KNOBS | WORDS | SAMPLING or f'"--{flag}"' in source
                assert known, f"{document.name}: {span}: unknown flag --{flag}"


@documents
def test_make_targets_exist(document: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for span in spans(document.read_text(encoding="utf-8")):
        if found := re.match(r"(?:\w+=\S+ )*make ([a-z-]+)", span):
            assert found[1] in targets, f"{document.name}: {span}: no such target"


@documents
def test_knobs_exist(document: Path) -> None:
    sections = {key.partition(".")[0] for key in KNOBS if "." in key}
    for span in spans(document.read_text(encoding="utf-8")):
        found = re.fullmatch(r"([a-z_]+)\.(?!gif$|png$|py$)([a-z_]+)(?:=\S+)?", span)
        if found and found[1] in sections:
            assert f"{found[1]}.{found[2]}" in KNOBS, f"{document.name}: no knob {span}"


def test_the_names_to_find_are_in_their_files() -> None:
    found = rows("Where to find what")
    assert len(found) > 10
    for question, files, names in found:
        defined = {name for file in quoted(files) for name in defined_in(ROOT / file)}
        for name in quoted(names):
            assert name in defined, f"docs/architecture.md: {question} {name} is not in {files}"


def test_the_interfaces_are_in_the_source() -> None:
    defined = {name for package in PACKAGES for path in (ROOT / package).rglob("*.py") for name in defined_in(path)}
    for interface, _ in rows("Interfaces"):
        for name in quoted(interface):
            assert name in defined, f"docs/architecture.md: {name} is not in the source"


def test_the_rooms_are_the_folders_and_name_every_module() -> None:
    named: dict[str, set[str]] = {}
    folder = ""
    for folders, modules, _ in rows("Folders and modules"):
        folder = quoted(folders)[0] if folders else folder
        named.setdefault(folder, set()).update(quoted(modules))
    there: dict[str, set[str]] = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            there.setdefault(f"{path.parent.relative_to(ROOT)}/", set()).add(path.stem)
    there = {folder: names - {"__init__", "__main__"} for folder, names in there.items()}
    assert named.keys() == there.keys(), "docs/architecture.md, Folders and modules: list each folder once"
    for folder, names in there.items():
        assert named[folder] == names, f"docs/architecture.md, Folders and modules: list the modules of {folder}"


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    released = re.findall(r"^## ([\d.]+) - (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert (version, str(citation["date-released"])) == released[0]
    assert citation["version"] == version


WRITES = (
    re.compile(r"--out (\S+)"),
    re.compile(r"prepare_images\.py \S+ (\S+)"),
    re.compile(r"convert_diffusers\.py \w+ \S+ (\S+)"),
)
"""What commands write, by the words before it."""


def test_what_the_commands_of_the_documents_write_is_ignored_by_git() -> None:
    ignored = {line.strip("/\n") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()}
    text = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    written = {path for code in spans(text) for pattern in WRITES for path in pattern.findall(code)}
    assert {"samples", "pruned", "bench/report.json", "data/photos", "exported"} <= written
    tops = {path.partition("/")[0] for path in written}
    assert {top for top in tops if not top.isupper()} <= ignored  # DIR and FILE stand for any name.
