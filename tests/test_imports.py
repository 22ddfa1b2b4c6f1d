"""Which way imports run, and how large folders and modules are. Read from the source, so lazy imports count as well."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("diffusion_core", "pruning", "agent")
SOURCE = (*PACKAGES, "scripts")

CORE_LAYERS = (
    {"files", "messages", "redact", "registry", "signals", "tables", "terminal"},
    {"registries"},
    {"config"},
    {"cache", "randomness", "hardware", "machine", "tracking", "run_folder", "distributed"},
    {"data"},
    {"model"},
    {"diffusion"},
    {"checkpoint"},
    {"choice"},
    {"runs", "search"},
    {"sampling"},
    {"evaluation"},
    {"training"},
    {"step_distillation"},
    {"diffusers_io"},
    {"report"},
)
"""Modules and folders of the core, lowest first: each may import its own layer and those below. Add new ones here."""

MAY_IMPORT = {
    "diffusion_core": ("diffusion_core",),
    "pruning": ("diffusion_core", "pruning"),
    "agent": ("diffusion_core", "pruning", "agent"),
    "agent.tracking": ("diffusion_core", "pruning", "agent.config", "agent.tracking"),
}
"""What the modules of a package may import; the longest name that fits counts."""

COMPUTED = {"registry.py", "plugins.py"}
"""Modules that import others by computed names: the rooms of a registry, and users' own modules."""

MOST_ENTRIES = {"agent": 14}
MOST_LINES_IN = {"agent": 4000}
"""Lines of all modules of a package: the agent stays thin."""
MOST_MODULES = 16
MOST_LINES = 350
LONGER = {"diffusion_core/config/knobs.py"}
"""Modules that may be longer."""


def module_files() -> dict[str, Path]:
    """Dotted name of every module of the packages, and its file."""
    files = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            files[name.removesuffix(".__init__")] = path
    return files


MODULES = module_files()
FILES = [path for folder in SOURCE for path in sorted((ROOT / folder).rglob("*.py"))]


def parents(tree: ast.AST) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...]]]:
    """Every node with all that it stands in, outermost first."""

    def walk(node: ast.AST, above: tuple[ast.AST, ...]) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...]]]:
        yield node, above
        for child in ast.iter_child_nodes(node):
            yield from walk(child, (*above, node))

    return walk(tree, ())


def imports(path: Path, package: str = "") -> Iterator[tuple[str, bool]]:
    """Names that a file imports (for ``from a import b``: a and a.b), and whether that happens as it is imported.

    Imports under ``if TYPE_CHECKING`` never run and count as lazy.
    """
    for node, above in parents(ast.parse(path.read_text(encoding="utf-8"))):
        in_function = any(isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) for outer in above)
        for_types = any(isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test) for outer in above)
        at_import = not in_function and not for_types
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, at_import
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], base]).strip(".")
            yield base, at_import
            for alias in node.names:
                yield f"{base}.{alias.name}", at_import
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            if path.name in COMPUTED:
                continue
            assert isinstance(node.args[0], ast.Constant), f"{path.name}: imports a module whose name is computed"
            yield str(node.args[0].value), at_import


def own_imports(name: str) -> set[str]:
    """The modules of these packages that a module imports."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    return {imported for imported, _ in imports(MODULES[name], package) if imported in MODULES} - {name}


def test_there_are_modules_to_look_at() -> None:
    assert {"diffusion_core.model.unet", "pruning.masks.mask", "agent.__main__"} <= MODULES.keys()
    package = "diffusion_core"
    assert own_imports(f"{package}.sampling.guidance") == {
        f"{package}.diffusion.denoiser",
        f"{package}.diffusion.sampling_steps",
        f"{package}.diffusion.schedule",
        f"{package}.model.unet",
    }


@pytest.mark.parametrize("name", MODULES)
def test_packages_import_only_those_below_them(name: str) -> None:
    rule = max((package for package in MAY_IMPORT if f"{name}.".startswith(f"{package}.")), key=len)
    packages = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    for imported in own_imports(name) - packages:
        assert f"{imported}.".startswith(tuple(f"{allowed}." for allowed in MAY_IMPORT[rule])), f"{name}: {imported}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("diffusion_core.")])
def test_the_core_is_layered(name: str) -> None:
    def layer(module: str) -> int:
        places = [i for i, names in enumerate(CORE_LAYERS) if module.split(".")[1] in names]
        assert len(places) == 1, f"{module} belongs into one of CORE_LAYERS"
        return places[0]

    for imported in own_imports(name) - {"diffusion_core"}:
        assert layer(imported) <= layer(name), f"{name} imports {imported}, which is above it"


def test_no_cycles() -> None:
    # static_order raises CycleError and names the cycle.
    order = list(TopologicalSorter({name: own_imports(name) for name in MODULES}).static_order())
    assert set(order) == MODULES.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_wandb_is_imported_in_one_folder_and_lazily(path: Path) -> None:
    tracking = ROOT / "agent" / "tracking"
    for imported, at_import in imports(path):
        if imported.split(".")[0] in ("wandb", "wandb_workspaces"):
            assert path.is_relative_to(tracking), f"{path} imports wandb"
            assert not at_import, f"{path} imports wandb as it is imported"
    if not path.is_relative_to(tracking):
        assert not re.search(r"\._offline\b|\b_service_api\b", path.read_text(encoding="utf-8")), f"{path}: private W&B"


def test_no_module_is_named_for_nothing() -> None:
    for path in MODULES.values():
        assert not {"utils", "util", "helpers", "misc", "common"} & set(path.relative_to(ROOT).with_suffix("").parts)


def entries(folder: Path) -> list[str]:
    """The modules and packages in a folder."""
    return [path.name for path in folder.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))]


@pytest.mark.parametrize("top", [*SOURCE, "tests"])
def test_folders_are_small(top: str) -> None:
    for folder in [ROOT / top, *(path for path in (ROOT / top).rglob("*") if path.is_dir())]:
        assert len(list(folder.glob("*.py"))) <= MOST_MODULES, folder
    if top in MOST_ENTRIES:
        assert len(entries(ROOT / top)) <= MOST_ENTRIES[top], sorted(entries(ROOT / top))


@pytest.mark.parametrize("top", MOST_LINES_IN)
def test_the_agent_is_thin(top: str) -> None:
    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / top).rglob("*.py")]
    assert sum(lines) <= MOST_LINES_IN[top]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_short(path: Path) -> None:
    if str(path.relative_to(ROOT)) not in LONGER:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_reports_are_made_without_pytorch() -> None:
    """The process of a sweep imports the modules of reports, and must stay small."""
    names = [name for name in MODULES if name.startswith("diffusion_core.report.")] + ["agent.report"]
    assert len(names) > 10
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
heavy = {{"torch", "wandb", "sklearn", "scipy", "PIL", "matplotlib", "jinja2", "plotly"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_the_core_and_pruning_does_no_work() -> None:
    """Neither wandb nor what is slow to import comes along, nothing is printed and no random state is touched."""
    names = [name for name in MODULES if not name.startswith("agent")]
    code = f"""
import importlib, sys, torch
before = torch.get_rng_state()
for name in {names!r}:
    importlib.import_module(name)
assert torch.equal(before, torch.get_rng_state())
slow = {{"wandb", "torch_pruning", "torchvision", "sklearn", "diffusers", "sweeps", "agent"}} & set(sys.modules)
assert not slow, slow
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_commands_that_compute_nothing_leave_pytorch_out() -> None:
    """It takes seconds and half a gigabyte, which login nodes may not have. Goals of figures are looked up as well."""
    code = """
import sys
import agent.sync, agent.clean, agent.sweep.__main__
from diffusion_core.config.metrics import goals
assert "eval/fd_*" in goals()
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


TOO_SLOW = {
    "torch._dynamo": "PyTorch's compiler, a second and a half",
    "torch.distributed.tensor": "accelerate asks it whether gradients are distributed, half a second",
    "sympy": "comes with both",
    "torchvision": "is for other data sets",
    "matplotlib": "is for reports",
    "sklearn": "has the digits, which are read without it",
    "scipy": "is for distances",
    "pandas": "comes along with scikit-learn and others; no trial uses it",
}
"""What a trial on digits does without, and why it would come along."""


def test_a_trial_imports_nothing_slow_that_it_does_not_need(tmp_path: Path) -> None:
    """From the command line to the result: two trainings, pruning, figures, pictures, costs, W&B offline."""
    code = f"""
import sys
from agent.__main__ import main
words = ["model.channels=8", "model.norm_groups=4", "train.steps=2", "train.batch_size=4", "sample.steps=1",
         "prune.method=magnitude", "prune.step=1", "prune.keep=0.5", "sample.per_class=1", "eval.num_images=10",
         "eval.val_images=8", "log.progress=false", "log.dir=" + {str(tmp_path / "run")!r}]
assert main(["preset=digits", *words]) == 0
print(*sorted({set(TOO_SLOW)!r} & set(sys.modules)))
"""
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "", done.stdout
