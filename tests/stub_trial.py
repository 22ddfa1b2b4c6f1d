"""A trial that takes no time and no network: what the scheduling of sweeps is tested with.

Like the product it goes on where its folder left off, writes history.jsonl and result.json, and on a SIGTERM finishes
its step, saves, and exits 143. Its val/loss is its learning rate, worse by 1 / step. If it is given sample.steps, it is
worse by 1 / sample.steps, and the result also has sample/macs, a thousand for each of them. In the folder that
STUB_NOTES names it notes every process and every step, so that a test can see what was run, when, and twice.

STUB_MEET=N waits at the start until N trials have started, STUB_HOLD=N waits before the third step in all trials from
the N-th on, STUB_GATE=FILE in all trials while there is such a file, STUB_STUBBORN ignores signals, STUB_HANG never
takes a step, STUB_FAILURES says which seeds fail how often, STUB_FULL=FILE ends with the status of a full disk while
there is such a file.
"""

import ast
import json
import os
import signal
import sys
import time
from pathlib import Path

knobs = dict(word[2:].split("=", 1) for word in sys.argv[1:])
train = ast.literal_eval(knobs.get("train", "{}"))
folder = Path(knobs["log.dir"])
rate, steps = float(train.get("lr") or knobs["train.lr"]), int(train.get("steps") or knobs["train.steps"])
notes = Path(os.environ["STUB_NOTES"])
evaluations = int(knobs.get("sample.steps", 0))
rate += 1 / evaluations if evaluations else 0.0
run_id = os.environ["WANDB_RUN_ID"]
number = int(run_id.split("-")[-2])
stop: list[int] = []


def note(event: str, **more: object) -> None:
    with (notes / f"{run_id}.jsonl").open("a") as file:
        file.write(json.dumps({"event": event, "pid": os.getpid(), "time": time.monotonic(), **more}) + "\n")


def ask(name: str) -> str:
    return os.environ.get(f"STUB_{name}", "")


for asked in (signal.SIGTERM, signal.SIGINT):
    signal.signal(asked, signal.SIG_IGN if ask("STUBBORN") else lambda number, frame: stop.append(number))
shares = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "WANDB_MODE", "WANDB_RUN_GROUP")
note("start", environment={key: os.environ.get(key) for key in shares})
while ask("HANG") or len(list(notes.glob("*.jsonl"))) < int(ask("MEET") or 1):
    time.sleep(0.01)
starts = sum('"start"' in line for line in (notes / f"{run_id}.jsonl").read_text().splitlines())
if starts <= json.loads(ask("FAILURES") or "{}").get(knobs["seed"], 0):
    note("fail")
    sys.exit("stub: this one fails")
if ask("FULL") and Path(ask("FULL")).exists():
    note("full")
    sys.exit(74)
saved = folder / "saved"
done = int(saved.read_text()) if saved.exists() else 0
for step in range(done + 1, steps + 1):
    while step == 3 and ask("HOLD") and number >= int(ask("HOLD")) and not stop:
        time.sleep(0.01)
    while step == 3 and ask("GATE") and Path(ask("GATE")).exists() and not stop:
        time.sleep(0.01)
    if stop:
        note("stop")
        sys.exit(128 + stop[0])
    time.sleep(0.01)
    with (folder / "history.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "val/loss": rate + 1 / step}) + "\n")
    note("step", step=step)
    partial = folder / "saved.partial"
    partial.write_text(str(step))
    partial.replace(saved)
figures = {"val/loss": rate + 1 / steps} | ({"sample/macs": 1000 * evaluations} if evaluations else {})
(folder / "result.json").write_text(
    json.dumps({"figures": figures, "config": knobs, "best_checkpoint": None, "seconds": 0.0})
)
note("end")
