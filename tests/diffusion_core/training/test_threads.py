"""How many threads a trial computes with: the cores that are free. A run that resumes keeps the number."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.contention import busy, one_core
from forks import WORDS
from tiny import assert_same_tensors

from diffusion_core.checkpoint import read_checkpoint
from diffusion_core.machine import threads
from diffusion_core.machine.sharing import usable_cores

ROOT = Path(__file__).resolve().parents[3]
SETTLE = """
import os
from diffusion_core.machine.threads import settle_threads
said = settle_threads()
print(os.environ.get("OMP_NUM_THREADS"), os.environ.get("GOMP_SPINCOUNT"), said)
"""


def test_the_collector_leaves_a_package_alone_once_and_nothing_else() -> None:
    """In a process of its own, where nothing is exempted yet. Models of before a second start must stay collectable."""
    code = """
import gc, sys, weakref
from diffusion_core.machine.threads import uncollected

class Node: pass

def cycle():
    node = Node()
    node.own = node
    return weakref.ref(node)

gc.collect()
with uncollected("colorsys"):
    assert not gc.isenabled()
assert gc.isenabled() and gc.get_freeze_count() == 0  # It was not imported.
try:
    with uncollected("colorsys"):
        import colorsys
        raise KeyError
except KeyError:
    pass
assert gc.isenabled() and gc.get_freeze_count() > 1000
before, node = gc.get_freeze_count(), cycle()
with uncollected("colorsys"):
    import colorsys
assert gc.get_freeze_count() == before
gc.collect()
assert node() is None
gc.disable()
with uncollected("decimal"):
    import decimal
assert not gc.isenabled()
"""
    assert run(["-c", code]) == ""


def run(words: list[str], folder: Path = ROOT, **env: str) -> str:
    kept = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=kept | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"} | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_busy_cores_are_left_to_others() -> None:
    cores = usable_cores()
    with busy(cores):
        chosen, spin, *said = run(["-c", SETTLE]).split()
        assert (chosen, spin) == ("1", "0")
        assert " ".join(said).startswith(f"computing with 1 of {cores} cores")


def test_the_users_choice_wins() -> None:
    assert run(["-c", SETTLE], OMP_NUM_THREADS="3", GOMP_SPINCOUNT="9").split() == ["3", "9"]


@pytest.mark.parametrize(
    ("files", "variables", "expected"),
    [
        ({}, {}, 64),
        ({"cpu.max": "max 100000"}, {}, 64),
        ({"cpu.max": "150000 100000"}, {}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, {}, 64),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, {}, 4),
        ({"cpu.max": "broken"}, {}, 64),
        ({}, {"SLURM_CPUS_ON_NODE": "8"}, 8),
        ({"cpu.max": "50000 100000"}, {"SLURM_CPUS_ON_NODE": "8"}, 1),
        # A group within groups: a systemd service, a Slurm job, a pod that sees the groups of its node.
        ({"own": "0::/pods/mine", "pods/mine/cpu.max": "300000 100000"}, {}, 3),
        ({"own": "0::/pods/mine", "pods/mine/cpu.max": "max 100000", "pods/cpu.max": "500000 100000"}, {}, 5),
        ({"own": "0::/../other", "other/cpu.max": "100000 100000"}, {}, 64),
        (
            {
                "own": "7:cpu,cpuacct:/slurm/job\n3:cpuset:/elsewhere\n0::/",
                "cpu,cpuacct/slurm/job/cpu.cfs_quota_us": "200000",
                "cpu,cpuacct/slurm/job/cpu.cfs_period_us": "100000",
                "cpuset/elsewhere/cpu.cfs_quota_us": "100000",
                "cpuset/elsewhere/cpu.cfs_period_us": "100000",
            },
            {},
            2,
        ),
        # A container: the groups that it sees begin at its own, whatever it is called outside.
        ({"own": "0::/docker/1234", "cpu.max": "200000 100000"}, {}, 2),
        ({"own": "nonsense"}, {}, 64),
        ({}, {"SLURM_CPUS_PER_TASK": "many"}, 64),
    ],
)
def test_affinity_quota_and_slurm_limit_the_cores(
    files: dict[str, str], variables: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    for name in ("SLURM_CPUS_ON_NODE", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert usable_cores(tmp_path, tmp_path / "own") == expected


def test_a_real_quota_limits_the_cores() -> None:
    with one_core() as join:
        if join is None:
            pytest.skip("this machine lets no one make a control group")
        program = "from diffusion_core.machine.sharing import usable_cores; print(usable_cores())"
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, preexec_fn=join)
        assert done.stdout == b"1\n"


def test_cores_of_a_shared_machine_count_as_free_while_enough_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for running, expected in ((0, "8"), (40, "8"), (60, "4"), (90, "1")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(threads, "busy_elsewhere", lambda running=running: running)
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        threads.settle_threads()
        assert os.environ["OMP_NUM_THREADS"] == expected


@pytest.mark.slow
def test_a_run_that_resumes_keeps_its_threads_and_so_its_bits(tmp_path: Path) -> None:
    words = ["-m", "agent", *WORDS, "--train.steps=6", "--train.batch_size=32", "--checkpoint.every=3"]
    for name in ("straight", "moved"):
        (tmp_path / name).mkdir()
    run(words, tmp_path / "straight", OMP_NUM_THREADS="2")
    shutil.copytree(tmp_path / "straight" / "run", tmp_path / "moved" / "run")
    shutil.rmtree(tmp_path / "moved" / "run" / "checkpoints" / "step-00000006")
    run(words, tmp_path / "moved", OMP_NUM_THREADS="1")
    one, two = (read_checkpoint(tmp_path / name / "run" / "checkpoints") for name in ("straight", "moved"))
    assert (one.step, two.step) == (6, 6)
    assert one.metadata["threads"] == two.metadata["threads"] == 2
    assert_same_tensors(one.tensors("model"), two.tensors("model"))
