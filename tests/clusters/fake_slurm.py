"""Fake commands of Slurm, with its answers on bad days: ``sbatch``, ``squeue``, ``scancel``, ``scontrol``.

Time passes with the calls of squeue. A job waits one call and runs for two; then it writes what a trial and its job
write. By its number it meets a fault: sbatch times out although Slurm has the job, or refuses it; the job is preempted
and requeued, reaches its time limit, or is gone with its node. Slurm forgets ended jobs soon, and does not answer for
a while. All that happens is noted in ``events.jsonl``, with a job that starts while another one has its name.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

FORGOTTEN_AFTER = 4
SILENT = range(12, 20)
"""Calls of squeue that fail."""


def note(state: dict[str, Any], event: str, job: dict[str, Any]) -> None:
    with Path(os.environ["FAKE_SLURM"], "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": event, "id": job["id"], "name": job["name"], "call": state["call"]}) + "\n")


def sbatch(state: dict[str, Any], words: list[str]) -> str:
    script = sys.stdin.read()
    if "--test-only" in words:
        return ""
    options = dict(word.split("=", 1) for word in words if "=" in word)
    number = state["next"] = state["next"] + 1
    folder = re.search(r"diffusion_core\.machine\.job (\S+) -- ", script)
    assert folder is not None
    if number % 11 == 0:
        sys.exit("sbatch: error: Batch job submission failed: Job violates accounting/QOS policy")
    job = {"id": str(number), "name": options["--job-name"], "folder": folder[1], "state": "PENDING", "restarts": 0,
           "since": state["call"]}  # fmt: skip
    state["jobs"].append(job)
    note(state, "submitted", job)
    if number % 7 == 0:
        sys.exit("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    return job["id"]


def squeue(state: dict[str, Any], words: list[str]) -> str:
    state["call"] += 1
    for job in state["jobs"]:
        advance(state, job)
    state["jobs"] = [job for job in state["jobs"] if not forgotten(state, job)]
    if state["call"] in SILENT:
        sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    return "\n".join(f"{job['id']}|{job['name']}|{job['state']}|None|n1" for job in state["jobs"])


def scancel(state: dict[str, Any], words: list[str]) -> str:
    for job in state["jobs"]:
        if job["id"] in words and job["state"] in ("PENDING", "RUNNING"):
            job["state"], job["since"] = "CANCELLED", state["call"]
            note(state, "cancelled", job)
    return ""


def forgotten(state: dict[str, Any], job: dict[str, Any]) -> bool:
    return job["state"] not in ("PENDING", "RUNNING") and state["call"] - job["since"] >= FORGOTTEN_AFTER


def advance(state: dict[str, Any], job: dict[str, Any]) -> None:
    age, number = state["call"] - job["since"], int(job["id"])
    new = job["state"]
    if job["state"] == "PENDING" and age >= 1:
        new = "RUNNING"
        if any(other["name"] == job["name"] and other["state"] == "RUNNING" for other in state["jobs"]):
            note(state, "doubled", job)
        write(job, job["restarts"], None)
        note(state, "started", job)
    elif job["state"] == "RUNNING" and age >= 2:
        if number % 5 == 0 and not job["restarts"]:
            new, job["restarts"] = "PENDING", 1
            write(job, 0, 143)
        elif number % 13 == 0:
            new, job["since"] = "NODE_FAIL", -FORGOTTEN_AFTER
        elif number % 17 == 0:
            new = "TIMEOUT"
        else:
            new = "COMPLETED"
            write(job, job["restarts"], 0)
            note(state, "finished", job)
    if new != job["state"]:
        job["state"] = new
        job["since"] = max(job["since"], state["call"]) if job["since"] >= 0 else job["since"]


def write(job: dict[str, Any], restarts: int, code: int | None) -> None:
    """Write what the job and its trial write."""
    folder, figures = Path(job["folder"]), {"val/loss": int(job["id"]) % 97 / 97}
    signal = "told" if code == 143 else ""
    (folder / "job.json").write_text(
        json.dumps({"job": job["id"], "restarts": restarts, "code": code, "signal": signal, "seconds": 1.0})
    )
    if code == 0:
        (folder / "history.jsonl").write_text(json.dumps({"step": 1, **figures}) + "\n")
        (folder / "result.json").write_text(json.dumps({"figures": figures, "config": {}, "best_checkpoint": None}))


def main() -> None:
    file = Path(os.environ["FAKE_SLURM"], "state.json")
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = json.loads(file.read_text()) if file.exists() else {"call": 0, "next": 0, "jobs": []}
        command = {"sbatch": sbatch, "squeue": squeue, "scancel": scancel}[sys.argv[1]]
        try:
            answer = command(state, sys.argv[2:])
        finally:
            file.write_text(json.dumps(state))
    print(answer)


def install(folder: Path) -> dict[str, str]:
    """Write the commands into a folder. Return the environment in which they are found."""
    folder.mkdir()
    for name in ("sbatch", "squeue", "scancel"):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {__file__} {name} "$@"\n')
        program.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "FAKE_SLURM": str(folder)}


if __name__ == "__main__":
    main()
