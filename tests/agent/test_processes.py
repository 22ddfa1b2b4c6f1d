"""Two processes on one machine, by gloo: they train the model that one alone would, in one folder and one run.

`accelerate launch` as a user calls it; W&B's own client, offline. (`scripts/sample_images.py` on several processes
belongs here as well.)
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import Forks, shared_forks
from forks.ranks import free_port, run_ranks
from server import WandbServer
from wandb_client import Client, finish

from agent.session import LAST_WORDS_S
from diffusion_core.checkpoint import read_checkpoint
from diffusion_core.distributed import LEAVE_AFTER_S, WATCH_EVERY_S

ROOT = Path(__file__).parents[2]
WORDS = [
    "--preset=digits",
    "--train.device=cpu",
    "--train.precision=fp32",
    "--train.steps=4",
    "--train.batch_size=8",
    "--train.warmup_steps=0",
    "--model.channels=8",
    "--model.channel_multipliers=1,2",
    "--model.num_res_blocks=1",
    "--model.attention_resolutions=4",
    "--model.norm_groups=4",
    "--model.dropout=0",
    "--diffusion.timesteps=50",
    "--sample.steps=2",
    "--sample.per_class=1",
    "--eval.classifier=none",
    "--eval.val_images=16",
    "--checkpoint.best_metric=val/loss",
    "--checkpoint.every=2",
    "--log.every=1",
    "--log.progress=false",
]


def launch(folder: Path, processes: int, *words: str, mode: str = "disabled") -> subprocess.Popen[str]:
    """`python -m agent` in a folder, on so many processes."""
    folder.mkdir(exist_ok=True)
    launcher = [str(shared_forks().interpreter)]
    if processes > 1:
        launcher = [
            *(*launcher, "-m", "accelerate.commands.launch", "--multi_gpu"),
            *("--num_processes", str(processes), "--num_machines", "1", "--main_process_port", str(free_port())),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
        ]
    return subprocess.Popen(
        [*launcher, "-m", "agent", *WORDS, *words],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        | {"PYTHONPATH": str(ROOT), "WANDB_MODE": mode, "OMP_NUM_THREADS": "1", "HOME": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(forks: Forks, folder: Path, processes: int, *words: str, mode: str = "disabled") -> str:
    """The same to its end, which must be a success, with the variables of a launcher; returns what it printed."""
    folder.mkdir()
    launcher = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if processes > 1 else {}
    started = []
    for rank in map(str, range(processes)):
        if processes > 1:
            launcher |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
            launcher |= {"RANK": rank, "LOCAL_RANK": rank}
        env = forks.env | launcher | {"WANDB_MODE": mode, "HOME": str(folder)}
        started.append(forks.python(["-m", "agent", *WORDS, *words], folder, env))
    return "".join(process.end() for process in started)


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def check_same_training(alone: Path, together: Path, tolerance: float = 1e-5) -> None:
    one, two = (read_checkpoint(only(folder, "runs/*")) for folder in (alone, together))
    assert one.step == two.step == 4
    assert one.parts == two.parts
    for part in ("model", "ema"):
        theirs = two.tensors(part)
        for name, tensor in one.tensors(part).items():
            assert (tensor - theirs[name]).abs().max() < tolerance, f"{part} {name}"


@pytest.mark.slow
def test_two_processes_train_the_model_of_one_as_one_run(tmp_path: Path, forks: Forks) -> None:
    """With all that a step draws: noise, timesteps, offsets, dropped labels, who is shown an estimate."""
    words = [
        "--model.self_conditioning",
        "--model.learned_variance",
        "--diffusion.timestep_sampling=lognormal",
        "--diffusion.offset_noise=0.1",
        "--train.accumulation=2",
        "--ema.power_widths=0.1",
        "--ema.average_from=1",
        "--checkpoint.upload=false",
    ]
    alone, together = tmp_path / "alone", tmp_path / "together"
    run(forks, alone, 1, *words)
    printed = run(forks, together, 2, *words, mode="offline")

    one, two = (read_checkpoint(only(folder, "runs/*")) for folder in (alone, together))  # One run folder each.
    assert one.step == two.step == 4
    assert one.parts == two.parts
    for part in one.parts:
        if part != "optimizer":
            theirs = two.tensors(part)
            for name, tensor in one.tensors(part).items():
                assert (tensor - theirs[name]).abs().max() < 1e-5, f"{part} {name}"
    assert len(list(together.rglob("offline-run-*"))) == 1

    assert printed.count("finished ") == 1  # The second process is silent.
    texts = [only(folder, "runs/*/history.jsonl").read_text() for folder in (alone, together)]
    rows = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert [row["step"] for row in rows[1]] == [1, 2, 3, 4]
    for mine, ours in zip(*rows, strict=True):
        for key in ("train/loss", "train/lr", "train/epoch"):
            assert ours[key] == pytest.approx(mine[key], rel=1e-5), key
    assert rows[1][-1]["val/loss"] == pytest.approx(rows[0][-1]["val/loss"], rel=1e-4)
    assert json.loads(only(together, "runs/*/result.json").read_text())["step"] == 4


@pytest.mark.slow
def test_two_processes_prune_and_distill_as_one_does(tmp_path: Path, forks: Forks) -> None:
    words = [
        "--prune.method=magnitude",
        "--prune.keep=0.5",
        "--prune.step=2",
        "--distill.output=1",
        "--distill.features=1",
        "--train.accumulation=2",
    ]
    run(forks, tmp_path / "alone", 1, *words)
    run(forks, tmp_path / "together", 2, *words)
    check_same_training(tmp_path / "alone", tmp_path / "together")


WAITING = """
import sys, time
from datetime import timedelta
from accelerate import PartialState
from agent.config import build_config
from diffusion_core.distributed import first_process_first
from diffusion_core.distributed import make_accelerator

# What runs on the GPUs' own group may take as long as this.
processes = PartialState(cpu=True, timeout=timedelta(seconds=2))
with first_process_first(processes):
    if processes.is_main_process:
        time.sleep(5)
    print(f"process {processes.process_index} at {time.monotonic()}", flush=True)
accelerator = make_accelerator(build_config({"preset": "digits", "train.device": "cpu"}).train)
import torch
network = accelerator.prepare_model(torch.nn.Linear(2, 2))
network(torch.ones(1, 2)).sum().backward()
print(f"gradients are views: {network.gradient_as_bucket_view}", flush=True)
"""


def test_processes_wait_for_the_first_one_longer_than_collective_operations_may_take(
    tmp_path: Path, forks: Forks
) -> None:
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    port = str(free_port())
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [forks.interpreter, str(script)],
            env=os.environ
            | settings
            | {"RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended[1][1]
    times = [float(re.search(r"at ([\d.]+)", out)[1]) for out, _ in ended]  # type: ignore[index]
    assert times[0] <= times[1]
    assert all("gradients are views: True" in out for out, _ in ended)


# Under the real agent, with a process that is killed.

SWEEP = {
    "method": "grid",
    "metric": {"name": "val/loss", "goal": "minimize"},
    "command": [
        *("${interpreter}", "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
        *("-m", "agent", "${args}"),
    ],
    "parameters": {
        **{key: {"value": value} for key, value in (word[2:].split("=") for word in WORDS)},
        "train.steps": {"values": [1_000_000, 4]},
        "log.every": {"value": 100},
        "checkpoint.every": {"value": 0},
    },
}
RANK = re.compile(rb"(?:^|\0)RANK=(\d+)(?:\0|$)")


def ranks() -> dict[tuple[str, int], int]:
    """The processes of trials that run, by run id and rank."""
    found = {}
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            content = environ.read_bytes()
        except OSError:
            continue
        rank, run = RANK.search(content), re.search(rb"(?:^|\0)WANDB_RUN_ID=(\w+)", content)
        if rank and run and b"agent" in (environ.parent / "cmdline").read_bytes().split(b"\0"):
            found[run[1].decode(), int(rank[1])] = int(environ.parent.name)
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_process_fails_its_trial_and_the_agent_goes_on(tmp_path: Path) -> None:
    with WandbServer() as server:
        client = Client(server, tmp_path)
        (tmp_path / "sweep.json").write_text(json.dumps(SWEEP))
        client.wandb("sweep", "sweep.json")
        (sweep,) = server.sweeps.values()
        agent = client.agent(sweep)
        wait_for(lambda: bool(sweep.runs) and len(sweep.runs[0].history) > 1)
        first = sweep.runs[0]
        processes = ranks()
        assert {rank for run, rank in processes if run == first.id} == {0, 1}
        os.kill(processes[first.id, 1], signal.SIGKILL)
        wait_for(lambda: not any(run == first.id for run, _ in ranks()))
        assert WATCH_EVERY_S + LEAVE_AFTER_S + LAST_WORDS_S < 30
        output = finish(agent)
        # One run for each trial, though every trial has two processes.
        assert len(server.runs) == len(sweep.runs) == 2
        assert (first.state, first.exit_code) == ("failed", 1)
        assert output.count("error: process 1 of 2 ended before the trial did; this one ends too") == 1
        assert "exitcode  : -9" in output  # The launcher names the first to fail.
        second = sweep.runs[1]
        assert (second.state, second.exit_code) == ("finished", 0)
        assert second.config["train.steps"] == 4
        assert server.errors == []


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path: Path) -> None:
    """If they did not agree, one would wait for the other in vain."""
    words = ["--train.steps=1000000", "--log.dir=run", "--checkpoint.every=0", "--log.every=9"]
    process = launch(tmp_path, 2, *words)
    history = tmp_path / "run" / "history.jsonl"
    wait_for(lambda: history.exists() and history.read_text().count("\n") > 3)
    found = [int(place.name) for place in Path("/proc").glob("[0-9]*") if _is_rank(place, tmp_path)]
    assert len(found) == 2
    os.kill(max(found), signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert err.count("stopped by SIGTERM; continue with the same command") == 1, err
    rows = [json.loads(line)["step"] for line in history.read_text().splitlines()]
    stopped = read_checkpoint(tmp_path / "run")
    assert rows == list(range(9, stopped.step + 1, 9))
    since = stopped.metadata["since_row"]  # The sums of both, who will each continue with its own.
    assert since["steps"] == stopped.step % 9
    assert len(since["sums"]) == (2 if since["steps"] else 0)


STOPPED = """
import os, signal, sys, time
from pathlib import Path
import agent.session as session

rank = int(os.environ["RANK"])
Path(f"pid{rank}").write_text(str(os.getpid()))
def load(config, **more):
    for other in Path().glob("pid*"):  # As a launcher does; the others wait for this one.
        os.kill(int(other.read_text()), signal.SIGTERM)
    time.sleep(600)
session.load_data = load
from agent.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_while_a_new_run_reads_its_data_ends_all_in_one_line(
    processes: int, tmp_path: Path, forks: Forks
) -> None:
    (tmp_path / "stopped.py").write_text(STOPPED)
    ended = run_ranks(forks, tmp_path, ["stopped.py", *WORDS, "--log.dir=run"], env=[{}] * processes)
    assert ended[0] == (143, "", "stopped by SIGTERM; continue with the same command and --log.dir=run\n")
    for other in ended[1:]:  # It waits for the first one where no signal reaches it.
        status, printed, errors = other
        assert (status, printed) == (1, "")
        # On a busy machine PyTorch warns before that the connection broke, with its C++ frames.
        said = errors.splitlines()
        assert said[-1] == "error: process 0 of 2 ended before the trial did; this one ends too"
        assert len(said) == 1 or "TCPStore" in said[0], errors
        assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def _is_rank(process: Path, folder: Path) -> bool:
    """Whether a launcher of processes started this one, in a folder."""
    try:
        return (process / "cwd").readlink() == folder and bool(RANK.search((process / "environ").read_bytes()))
    except OSError:
        return False
