"""A trial that takes no time and no network: what the scheduling of sweeps is tested with.

Like the product it goes on where its folder left off, writes history.jsonl and result.json, and on a SIGTERM finishes
its step, saves, and exits 143. Its val/loss is its learning rate, worse by 1 / step. In the folder that STUB_NOTES
names it notes every process and every step, so that a test can see what was run, when, and twice.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

knobs = dict(word[2:].split("=", 1) for word in sys.argv[1:])
folder, steps, rate = Path(knobs["log.dir"]), int(knobs["train.steps"]), float(knobs["train.lr"])
notes = Path(os.environ["STUB_NOTES"])
run_id = os.environ["WANDB_RUN_ID"]
stop = []


def note(event: str, **more: object) -> None:
    with (notes / f"{run_id}.jsonl").open("a") as file:
        file.write(json.dumps({"event": event, "pid": os.getpid(), "time": time.monotonic(), **more}) + "\n")


stubborn = "STUB_STUBBORN" in os.environ
signal.signal(signal.SIGTERM, signal.SIG_IGN if stubborn else lambda number, frame: stop.append(number))
signal.signal(signal.SIGINT, signal.SIG_IGN if stubborn else lambda number, frame: stop.append(number))
note("start", environment={key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
     "WANDB_MODE", "WANDB_RUN_GROUP")})  # fmt: skip
saved = folder / "saved"
done = int(saved.read_text()) if saved.exists() else 0
failures = json.loads(os.environ.get("STUB_FAILURES", "{}")).get(knobs["seed"], 0)
if sum('"start"' in line for line in (notes / f"{run_id}.jsonl").read_text().splitlines()) <= failures:
    note("fail")
    sys.exit("stub: this one fails")
for step in range(done + 1, steps + 1):
    time.sleep(float(os.environ.get("STUB_STEP_SECONDS", "0.02")))
    with (folder / "history.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "val/loss": rate + 1 / step}) + "\n")
    note("step", step=step)
    partial = folder / "saved.partial"
    partial.write_text(str(step))
    partial.replace(saved)
    if stop:
        note("stop")
        sys.exit(128 + stop[0])
(folder / "result.json").write_text(
    json.dumps({"figures": {"val/loss": rate + 1 / steps}, "config": knobs, "best_checkpoint": None, "seconds": 0.0})
)
note("end")
