"""Which way imports run. Read from the source, so that a lazy import counts as well."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("diffusion_core", "pruning", "agent")

CORE_LAYERS = (
    {"config", "config_io", "presets", "image_files", "figure_names", "cache", "uploads", "sharing"},
    {"randomness", "data", "hardware", "compilation", "norm", "unet", "structure"},
    {"schedule", "denoiser", "losses", "guidance", "samplers"},
    {"draws", "cuda_graphs", "ema", "checkpoint", "distillation", "memory", "trainer", "generation"},
    {"evaluation", "tracking", "media", "preparation"},
    {"diffusers_names", "diffusers_networks", "diffusers_import", "diffusers_export"},
)
"""Modules of the core, lowest first: a module may import its own layer and those below. A new one is added here."""

MAY_IMPORT = {
    "diffusion_core": {"diffusion_core"},
    "pruning": {"diffusion_core", "pruning"},
    "agent": {"diffusion_core", "pruning", "agent"},
}


def module_files() -> dict[str, Path]:
    """Dotted name of every module of the packages, and its file."""
    files = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            files[name.removesuffix(".__init__")] = path
    return files


MODULES = module_files()


def parents(tree: ast.AST) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...]]]:
    """Every node with all that it stands in, outermost first."""

    def walk(node: ast.AST, above: tuple[ast.AST, ...]) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...]]]:
        yield node, above
        for child in ast.iter_child_nodes(node):
            yield from walk(child, (*above, node))

    return walk(tree, ())


def imports(path: Path, package: str = "") -> Iterator[tuple[str, bool]]:
    """Names that a file imports (for ``from a import b``: a and a.b), and whether that happens as it is imported.

    What stands under ``if TYPE_CHECKING`` never runs and counts as lazy.
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
            assert isinstance(node.args[0], ast.Constant), f"{path.name}: imports a module whose name is computed"
            yield str(node.args[0].value), at_import


def own_imports(name: str) -> set[str]:
    """The modules of these packages that a module imports."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    return {imported for imported, _ in imports(MODULES[name], package) if imported in MODULES} - {name}


def test_there_are_modules_to_look_at() -> None:
    assert {"diffusion_core.unet", "pruning.masks", "agent.__main__"} <= MODULES.keys()
    guidance = {"diffusion_core.denoiser", "diffusion_core.schedule", "diffusion_core.unet"}
    assert own_imports("diffusion_core.guidance") == guidance


@pytest.mark.parametrize("name", MODULES)
def test_packages_import_only_those_below_them(name: str) -> None:
    allowed = MAY_IMPORT[name.split(".")[0]]
    for imported in own_imports(name):
        assert imported.split(".")[0] in allowed, f"{name} imports {imported}"


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


@pytest.mark.parametrize("folder", [*PACKAGES, "scripts"])
def test_wandb_is_imported_in_few_places_and_lazily(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for imported, at_import in imports(path):
            if imported.split(".")[0] == "wandb":
                assert folder == "agent" or (folder, path.name) == ("diffusion_core", "tracking.py"), path
                assert not at_import, f"{path} imports wandb as it is imported"


def test_no_module_is_named_for_nothing() -> None:
    for path in MODULES.values():
        assert not {"utils", "util", "helpers", "misc", "common"} & set(path.relative_to(ROOT).with_suffix("").parts)


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
