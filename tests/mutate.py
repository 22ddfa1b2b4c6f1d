"""Change the code in small ways, and count how many of the changes the tests notice.

  python tests/mutate.py --out mutants.json                          ten mutants of each module of TESTS
  python tests/mutate.py --modules pruning.masks.mask --per-module 30     more of one module

A mutant is one change of one expression or statement: another comparison, another operator, a constant one higher, a
negated condition, a call or a result left out. It is tried in a copy of the tree against the tests of its module alone.
It counts as killed if a test fails or the tests take far longer than without it. The choice depends on --seed alone.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

TESTS = {
    "diffusion_core.diffusion.schedule": "test_schedule",
    "diffusion_core.diffusion.denoiser": (
        "test_denoiser_and_losses test_predictions test_guidance test_learned_variance"
    ),
    "diffusion_core.diffusion.losses": "test_denoiser_and_losses test_predictions test_learned_variance",
    "diffusion_core.sampling.samplers": "test_samplers test_mixture",
    "diffusion_core.sampling.guidance": "test_guidance test_denoiser_and_losses",
    "diffusion_core.training.ema": "test_ema",
    "diffusion_core.checkpoint": "test_checkpoint",
    "diffusion_core.evaluation.distances": "test_frechet",
    "pruning.masks.mask": "test_masks test_strategies",
    "pruning.masks.strategies": "test_strategies test_masks",
    "pruning.channels.search": "test_structural",
    "agent.sweep.file": "test_sweep_files",
    "diffusion_core.search.offline": "test_offline_sweeps",
    "diffusion_core.training.checkpoints": "test_alerts test_start test_moving",
    "diffusion_core.training.resume": "test_start test_moving",
}
"""Modules, and the test files that are theirs, without those marked as slow."""

PRELOADED = ("pytest", "torch", "torchvision", "numpy", "scipy.linalg", "sklearn.datasets", "accelerate", "diffusers",
             "hypothesis", "wandb", "sweeps", "torch_pruning", "matplotlib.pyplot")  # fmt: skip
"""What tests import besides the project. Runs are forked from this process, which has it all."""


def test_files(root: Path, name: str) -> list[Path]:
    """The files of tests with a name, which is that of one."""
    found = list((root / "tests").rglob(f"{name}.py"))
    assert len(found) == 1, f"{name}: {found}"
    return found


SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum",
         "amin": "amax", "amax": "amin", "sin": "cos", "cos": "sin", "sqrt": "exp", "log": "exp"}  # fmt: skip


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What may stand in place of a node, each with the kind of change."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            yield "comparison", replaced(node, ops=[SWAPS[type(op)]()])
        case ast.BinOp(op=op, left=left, right=right) if type(op) in SWAPS and not (is_text(left) or is_text(right)):
            yield "operator", replaced(node, op=SWAPS[type(op)]())
        case ast.AugAssign(op=op) if type(op) in SWAPS:
            yield "operator", replaced(node, op=SWAPS[type(op)]())
        case ast.BoolOp(op=op):
            yield "and/or", replaced(node, op=SWAPS[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield "sign", operand
        case ast.Constant(value=bool()):
            yield "constant", ast.Constant(not node.value)
        case ast.Constant(value=int() | float() as value):
            yield "constant", ast.Constant(value + 1)
        case ast.If() | ast.IfExp() | ast.While():
            yield "condition", replaced(node, test=ast.UnaryOp(ast.Not(), node.test))
        case ast.Expr(value=ast.Call()):
            yield "call left out", ast.Pass()
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield "result", replaced(node, value=ast.Constant(None))
        case ast.Call(func=ast.Name(id=name)) if name in NAMES:
            yield "function", replaced(node, func=ast.Name(NAMES[name]))
        case ast.Call(func=ast.Attribute(attr=name) as func) if name in NAMES:
            yield "function", replaced(node, func=replaced(func, attr=NAMES[name]))


def replaced(node: ast.AST, **fields: Any) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def candidates(node: ast.AST) -> Iterator[tuple[ast.AST, str, ast.AST]]:
    """Every change of a tree, outside annotations, decorators, texts and error messages."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.JoinedStr):
                continue
            if isinstance(child, ast.keyword) and child.arg in ("strict", "encoding"):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
                continue
            yield from ((child, kind, new) for kind, new in changes(child))
            yield from candidates(child)


def applied(source: str, node: Any, new: ast.AST) -> str:
    """The source with one node changed; of a compound statement only the head is written anew."""
    lines = source.encode().splitlines(keepends=True)
    old_end, text = (node.end_lineno, node.end_col_offset), ast.unparse(ast.fix_missing_locations(new))
    if isinstance(node, ast.If | ast.While):
        node, text = node.test, f"not ({ast.unparse(node.test)})"
        old_end = (node.end_lineno, node.end_col_offset)
    elif isinstance(new, ast.expr):
        text = f"({text})"
    before = b"".join(lines[: node.lineno - 1]) + lines[node.lineno - 1][: node.col_offset]
    after = lines[old_end[0] - 1][old_end[1] :] + b"".join(lines[old_end[0] :])
    return (before + text.encode() + after).decode()


class Tree:
    """A copy of the project in which code is changed and tests are run."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tree"
        self.cache = folder / "cache"
        self.work = folder / "work"
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, listed.split("\0")):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)

    def run(self, files: list[str], timeout: float) -> tuple[int | None, float, str]:
        """Run test files; returns pytest's exit status (None: it took too long), seconds, and the test that failed."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        if self.cache.is_dir():
            shutil.copytree(self.cache, self.work / "cache")
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            os._exit(self._pytest(files))
        status: int | None = None
        while time.monotonic() - started < timeout:
            pid, code = os.waitpid(child, os.WNOHANG)
            if pid:
                status = os.waitstatus_to_exitcode(code)
                break
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if status is None:
            os.waitpid(child, 0)
        output = (self.work / "out.txt").read_text(errors="replace")
        found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        return status, time.monotonic() - started, found[1] if found else output[-300:] if status else ""

    def _pytest(self, files: list[str]) -> int:
        import pytest

        os.setsid()
        output = os.open(self.work / "out.txt", os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(self.root)
        sys.path[:0] = [str(self.root)]
        os.environ |= {"PYTHONPATH": str(self.root), "DIFFUSION_SWEEPS_CACHE": str(self.work / "cache")}
        words = ["-x", "-q", "-n0", "--tb=no", "-m", "not slow", "-p", "no:cacheprovider"]
        status = int(pytest.main([*words, f"--basetemp={self.work / 'tmp'}", *files]))
        sys.stdout.flush()
        return status


def mutate(tree: Tree, module: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Try mutants of one module."""
    file = tree.root / f"{module.replace('.', '/')}.py"
    files = [str(file.relative_to(tree.root)) for name in TESTS[module].split() for file in test_files(tree.root, name)]
    source = file.read_text(encoding="utf-8")
    status, usual, failed = tree.run(files, timeout=600)
    if status != 0:
        raise SystemExit(f"{module}: its tests fail without any change ({failed})")
    shutil.rmtree(tree.cache, ignore_errors=True)
    if (tree.work / "cache").is_dir():
        shutil.copytree(tree.work / "cache", tree.cache)
    possible = [change for change in candidates(ast.parse(source)) if applied(source, change[0], change[2]) != source]
    chosen = random.Random(f"{seed} {module}").sample(possible, min(count, len(possible)))
    print(f"{module}: {len(chosen)} of {len(possible)} mutants; {usual:.0f} s without change", flush=True)
    found = []
    for node, kind, new in sorted(chosen, key=lambda change: change[0].lineno):  # type: ignore[attr-defined]
        changed = applied(source, node, new)
        file.write_text(changed, encoding="utf-8")
        status, seconds, killer = tree.run(files, timeout=30 + 4 * usual)
        file.write_text(source, encoding="utf-8")
        old, new_lines = source.splitlines(), changed.splitlines()
        first = next(i for i, (a, b) in enumerate(zip(old, new_lines, strict=False)) if a != b)
        last = len(old) - next(
            (i for i, (a, b) in enumerate(zip(old[::-1], new_lines[::-1], strict=False)) if a != b), 0
        )
        added = len(new_lines) - len(old)
        verdict = {0: "survived", None: "timed out"}.get(status, "killed")
        record: dict[str, Any] = {
            "module": module, "line": first + 1, "kind": kind, "verdict": verdict, "seconds": round(seconds, 1),
            "before": old[first:last], "after": new_lines[first : last + added], "killer": killer,
        }  # fmt: skip
        found.append(record)
        print(f"  {verdict:9s} {module}:{first + 1} {kind}, {seconds:.0f} s {killer[:90].strip()}", flush=True)
        if verdict == "survived":
            print(
                "\n".join([*(f"    - {s}" for s in record["before"]), *(f"    + {s}" for s in record["after"])]),
                flush=True,
            )
    return found


def main() -> int:
    """Returns the exit status: 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", default=",".join(TESTS), metavar="A,B,...", help="some of those of TESTS (all)")
    parser.add_argument("--per-module", type=int, default=10, metavar="N", help="mutants of each (10)")
    parser.add_argument("--seed", type=int, default=0, help="which mutants are chosen (0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all mutants to this file as JSON")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "MPLBACKEND": "agg"}
    sys.dont_write_bytecode = True  # A changed file may have the time and size of the one before.
    for name in PRELOADED:
        importlib.import_module(name)
    mutants: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(Path(folder))
        for module in arguments.modules.split(","):
            mutants += mutate(tree, module, arguments.per_module, arguments.seed)
            if arguments.out:
                arguments.out.write_text(json.dumps({"seed": arguments.seed, "mutants": mutants}, indent=1))
    for module in dict.fromkeys(mutant["module"] for mutant in mutants):
        verdicts = Counter(mutant["verdict"] for mutant in mutants if mutant["module"] == module)
        print(f"{module:36s} {verdicts.total() - verdicts['survived']:3d} of {verdicts.total():3d} killed")
    killed = sum(mutant["verdict"] != "survived" for mutant in mutants)
    print(f"{killed} of {len(mutants)} killed: {killed / max(1, len(mutants)):.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
