"""The test backend against the real, unmodified wandb client: what the client does must arrive and read back."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb_client import Client, finish

from server import Run, Sweep, WandbServer


def wait_for(condition: Callable[[], bool], timeout: float = 30) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def column(run: Run, key: str) -> list[Any]:
    return [row[key] for row in run.history if key in row]


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


@pytest.fixture(autouse=True)
def no_errors(server: WandbServer) -> Iterator[None]:
    yield
    assert server.errors == []


@pytest.fixture
def client(server: WandbServer, tmp_path: Path) -> Client:
    return Client(server, tmp_path)


# Runs


def test_run(server: WandbServer, client: Client) -> None:
    client.script(
        """
        import math
        import wandb
        from PIL import Image

        config = {"lr": 0.1, "opt": {"kind": "sgd"}}
        with wandb.init(id="whole", name="A run", group="g", job_type="train", tags=["a", "b"], config=config) as run:
            run.define_metric("loss", summary="min")
            for i in range(5):
                run.log({"loss": [3, 1, 2, 5, 4][i], "nested": {"u": i}})
            run.log({"bad": math.nan, "image": wandb.Image(Image.new("RGB", (4, 4), "red"), caption="red")})
            frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
            frames[0].save("clip.gif", save_all=True, append_images=frames[1:])
            run.log({"clip": wandb.Video("clip.gif", format="gif")})
            run.summary["best"] = 7
            run.config.update({"late": True})
            run.alert("title", "text")
            print("on the console")
            open("notes.txt", "w").write("saved")
            run.save("notes.txt")
        """
    )
    run = server.runs["whole"]
    assert (run.state, run.exit_code, run.display_name) == ("finished", 0, "A run")
    assert (run.group, run.job_type, run.tags) == ("g", "train", ["a", "b"])
    assert run.config == {"lr": 0.1, "opt": {"kind": "sgd"}, "late": True}
    assert run.raw_config["_wandb"]["value"]["cli_version"] == "0.31.0"
    assert column(run, "_step") == list(range(7))
    assert column(run, "loss") == [3, 1, 2, 5, 4]
    assert [row["u"] for row in column(run, "nested")] == list(range(5))
    assert column(run, "bad") == ["NaN"]
    assert run.summary["loss"] == {"min": 1}
    assert run.summary["best"] == 7
    image = run.history[5]["image"]
    assert (image["_type"], image["caption"], image["width"]) == ("image-file", "red", 4)
    assert run.files[image["path"]].startswith(b"\x89PNG")
    assert run.history[6]["clip"]["_type"] == "video-file"
    assert run.files[run.history[6]["clip"]["path"]] == (client.directory / "clip.gif").read_bytes()
    assert b"on the console" in run.files["output.log"]
    assert json.loads(run.files["wandb-metadata.json"])["program"].endswith("script.py")
    assert run.files["notes.txt"] == b"saved"
    assert run.alerts == [{"title": "title", "text": "text", "severity": "INFO"}]
    assert not any(server.api_key.encode() in body for _, body in server.received)
    assert any(b"on the console" in body for name, body in server.received if name.endswith("/whole/file_stream"))


def test_public_api_reads_a_run(client: Client) -> None:
    client.script(
        """
        import wandb

        for name, lr in (("read-a", 0.5), ("read-b", 0.25)):
            with wandb.init(id=name, config={"lr": lr}, group="read", project="reading") as run:
                for i in range(4):
                    run.log({"loss": lr * i, "nested": {"u": i}})
                run.define_metric("top", summary="max")
                run.log({"top": lr})
                if name == "read-a":
                    open("some file.txt", "w").write("content")
                    run.save("some file.txt")
        """
    )
    result = client.script(
        """
        import wandb

        api = wandb.Api()
        run = api.run("tester/reading/read-a")
        run.config["added"] = [1]
        run.summary["extra"] = 2
        run.tags.append("tagged")
        run.update()
        run = wandb.Api().run("reading/read-a")
        file = run.file("some file.txt")
        low = {"$and": [{"config.lr": {"$lt": 0.3}}, {"group": "read"}]}
        result = {
            "state": run.state,
            "config": run.config,
            "summary": {key: run.summary[key] for key in ("loss", "extra")},
            "tags": run.tags,
            "history": [row.get("loss") for row in run.history(pandas=False)],
            "sampled": run.history(keys=["nested.u"], pandas=False),
            "scan": [row.get("nested") for row in run.scan_history()],
            "scan_keys": list(run.scan_history(keys=["top"])),
            "last": run.lastHistoryStep,
            "files": sorted(f.name for f in run.files()),
            "file": file.download(root="got").read(),
            "size": file.size,
            "all": [r.id for r in api.runs("reading")],
            "by_loss": [r.id for r in api.runs("reading", order="-summary_metrics.loss")],
            "by_top": [r.id for r in api.runs("reading", order="+summary_metrics.top")],
            "filtered": [r.id for r in api.runs("reading", filters=low)],
            "none": [r.id for r in api.runs("reading", filters={"state": "crashed"})],
            "paged": [r.id for r in api.runs("reading", per_page=1)],
            "projects": "reading" in [p.name for p in api.projects()],
        }
        try:
            api.run("reading/nowhere")
        except Exception as error:
            result["missing"] = "Could not find run" in str(error)
        """
    )
    assert result["state"] == "finished"
    assert result["config"] == {"lr": 0.5, "added": [1]}
    assert result["summary"] == {"loss": 1.5, "extra": 2}
    assert result["tags"] == ["tagged"]
    assert result["history"] == [0, 0.5, 1.0, 1.5, None]
    assert result["sampled"] == [{"_step": i, "nested.u": i} for i in range(4)]
    assert result["scan"] == [{"u": i} for i in range(4)] + [None]
    assert result["scan_keys"] == [{"_step": 4, "top": 0.5}]
    assert result["last"] == 4
    assert {"some file.txt", "wandb-metadata.json", "output.log"} - set(result["files"]) <= {"output.log"}
    assert (result["file"], result["size"]) == ("content", 7)
    assert result["all"] == result["paged"] == ["read-a", "read-b"]
    assert result["by_loss"] == ["read-a", "read-b"]
    assert result["by_top"] == ["read-b", "read-a"]
    assert result["filtered"] == ["read-b"]
    assert result["none"] == []
    assert result["projects"] is True
    assert result["missing"] is True


def test_failure_and_resume(server: WandbServer, client: Client) -> None:
    failing = client.write(
        "failing.py",
        """
        import sys
        import wandb
        run = wandb.init(id="resumed", resume="allow", config={"lr": 0.1})
        assert run.starting_step == 0
        for i in range(3):
            run.log({"i": i})
        sys.exit(3)  # the client hooks sys.exit: `raise SystemExit(3)` would be reported as exit code 0
        """,
    )
    finish(client.popen(client.interpreter, str(failing)), code=3)
    run = server.runs["resumed"]
    assert (run.state, run.exit_code) == ("failed", 3)
    result = client.script(
        """
        import wandb
        with wandb.init(id="resumed", resume="allow") as run:
            result = [run.starting_step, run.resumed, run.config["lr"], run.summary["i"]]
            for i in range(run.starting_step, 6):
                run.log({"i": i})
        """
    )
    assert result == [3, True, 0.1, 2]
    assert (run.state, run.exit_code) == ("finished", 0)
    assert column(run, "_step") == column(run, "i") == list(range(6))
    assert run.summary["i"] == 5


def test_outage(server: WandbServer, client: Client) -> None:
    script = client.write(
        "script.py",
        """
        import time
        import wandb
        with wandb.init(id="outage") as run:
            for i in range(30):
                run.log({"i": i})
                time.sleep(0.1)
            open("after.txt", "w").write("late")
            run.save("after.txt")
        """,
    )
    process = client.popen(client.interpreter, str(script))
    wait_for(lambda: "outage" in server.runs and len(server.runs["outage"].history) > 2)
    url = server.url
    server.pause()
    seen = len(server.runs["outage"].history)
    time.sleep(2)
    assert len(server.runs["outage"].history) == seen < 30
    server.resume()
    assert server.url == url
    finish(process)
    run = server.runs["outage"]
    assert column(run, "_step") == column(run, "i") == list(range(30))
    assert run.state == "finished"
    assert run.files["after.txt"] == b"late"


def test_offline_sync(server: WandbServer, client: Client) -> None:
    client.script(
        """
        import wandb
        with wandb.init(id="offline", config={"a": 1}) as run:
            for i in range(3):
                run.log({"i": i})
            artifact = wandb.Artifact("offline-data", "dataset")
            with artifact.new_file("x.txt") as file:
                file.write("offline")
            run.log_artifact(artifact)
        """,
        WANDB_MODE="offline",
    )
    assert "offline" not in server.runs
    (folder,) = Path(client.env["WANDB_DIR"]).glob("wandb/offline-run-*-offline")
    client.wandb("sync", str(folder))
    run = server.runs["offline"]
    assert run.state == "finished"
    assert run.config == {"a": 1}
    assert column(run, "i") == [0, 1, 2]
    assert server.artifact("offline-data:v0").files == {"x.txt": b"offline"}
    assert [artifact.name for artifact in run.output_artifacts] == ["offline-data"]


# Artifacts


def test_artifact(server: WandbServer, client: Client) -> None:
    client.script(
        """
        import wandb
        with wandb.init(id="producer") as run:
            artifact = wandb.Artifact("weights", "checkpoint", description="text", metadata={"epoch": 3})
            with artifact.new_file("a.txt") as file:
                file.write("first")
            with artifact.new_file("sub/b.bin", mode="wb") as file:
                file.write(bytes(range(256)))
            run.log_artifact(artifact, aliases=["best", "epoch-3"]).wait()
        """
    )
    artifact = server.artifact("weights:best")
    assert (artifact.name, artifact.type, artifact.version, artifact.state) == (
        "weights",
        "checkpoint",
        "v0",
        "COMMITTED",
    )
    assert sorted(artifact.aliases) == ["best", "epoch-3", "latest"]
    assert (artifact.metadata, artifact.description, artifact.ttl) == ({"epoch": 3}, "text", None)
    assert artifact.files == {"a.txt": b"first", "sub/b.bin": bytes(range(256))}
    assert artifact.created_by == "producer"

    result = client.script(
        """
        import wandb
        with wandb.init(id="consumer") as run:
            artifact = run.use_artifact("weights:best")
            artifact.download("got")
        api = wandb.Api()
        artifact = api.artifact("weights:v0")
        result = {
            "text": open("got/a.txt").read(),
            "bytes": list(open("got/sub/b.bin", "rb").read()),
            "logged_by": artifact.logged_by().id,
            "used_by": [run.id for run in artifact.used_by()],
            "logged": [a.name for a in api.run("test/producer").logged_artifacts()],
            "used": [a.name for a in api.run("test/consumer").used_artifacts()],
            "types": [t.name for t in api.artifact_types("test")],
            "collections": [c.name for c in api.artifact_type("checkpoint", "test").collections()],
            "versions": [a.version for a in api.artifacts("checkpoint", "weights")],
            "files": sorted(f.name for f in artifact.files()),
            "exists": [api.artifact_exists("weights:best"), api.artifact_exists("weights:none")],
        }
        """
    )
    assert result["text"] == "first"
    assert bytes(result["bytes"]) == bytes(range(256))
    assert result["logged_by"] == "producer"
    assert result["used_by"] == ["consumer"]
    assert result["logged"] == result["used"] == ["weights:v0"]
    assert "checkpoint" in result["types"]
    assert result["collections"] == ["weights"]
    assert result["versions"] == ["v0"]
    assert result["files"] == ["a.txt", "sub/b.bin"]
    assert result["exists"] == [True, False]
    assert server.runs["consumer"].used_artifacts == [artifact]
    assert server.runs["producer"].output_artifacts == [artifact]


def test_artifact_versions(server: WandbServer, client: Client) -> None:
    result = client.script(
        """
        from datetime import timedelta
        import wandb

        def log(run, text, **options):
            artifact = wandb.Artifact("data", "dataset")
            with artifact.new_file("x.txt") as file:
                file.write(text)
            with artifact.new_file("same.txt") as file:
                file.write("same")
            return run.log_artifact(artifact, **options).wait()

        with wandb.init(id="versions") as run:
            first = log(run, "one", aliases=["best"])
            second = log(run, "two", aliases=["best"])
            third = log(run, "three")
            again = log(run, "two")
            result = {"versions": [a.version for a in (first, second, third, again)]}

        api = wandb.Api()
        artifact = api.artifact("data:v2")
        artifact.aliases.append("chosen")
        artifact.metadata["n"] = 1
        artifact.description = "words"
        artifact.tags = ["t"]
        artifact.ttl = timedelta(days=3)
        artifact.save()
        linked = artifact.link("wandb-registry-model/winners", aliases=["prod"])
        result["link"] = [linked.qualified_name, linked.source_qualified_name, linked.is_link]
        second = api.artifact("data:v1")
        second.aliases.remove("best")
        second.save()
        api.artifact("data:v0").delete(delete_aliases=True)
        api = wandb.Api()
        artifact = api.artifact("data:chosen")
        result["chosen"] = [artifact.version, artifact.metadata, artifact.ttl.days, artifact.tags, artifact.description]
        result["left"] = [a.version for a in api.artifacts("dataset", "data")]
        result["registry"] = api.artifact("test-org/wandb-registry-model/winners:prod").digest == artifact.digest
        """
    )
    assert result["versions"] == ["v0", "v1", "v2", "v1"]
    assert result["link"] == ["test-org/wandb-registry-model/winners:v0", "tester/test/data:v2", True]
    assert result["chosen"] == ["v2", {"n": 1}, 3, ["t"], "words"]
    assert result["left"] == ["v2", "v1"]
    assert result["registry"] is True
    first, second, third = (a for a in server.artifacts if a.name == "data")
    assert [a.state for a in (first, second, third)] == ["DELETED", "COMMITTED", "COMMITTED"]
    assert (second.aliases, third.aliases) == (["latest"], ["chosen"])
    assert (second.ttl, third.ttl) == (None, 3 * 24 * 3600)
    assert second.files == {"x.txt": b"two", "same.txt": b"same"}
    assert second.entries["same.txt"]["birthArtifactID"] == first.gql_id


def test_artifact_variants(server: WandbServer, client: Client) -> None:
    result = client.script(
        """
        from datetime import timedelta
        from pathlib import Path
        import wandb

        Path("model.bin").write_bytes(b"weights")
        with wandb.init(id="variants") as run:
            run.log({"table": wandb.Table(columns=["a", "b"], data=[[1, "x"], [2, "y"]])})
            run.log_model("model.bin", name="saved", aliases=["kept"])
            references = wandb.Artifact("references", "dataset")
            references.add_reference(Path("model.bin").absolute().as_uri())
            references.ttl = timedelta(hours=5)
            run.log_artifact(references, tags=["tag"]).wait()
            run.link_artifact(references, "wandb-registry-data/things", aliases=["prod"])
        with wandb.init(id="variants-use") as run:
            model = Path(run.use_model("saved:kept")).read_bytes().decode()
            table = run.use_artifact("run-variants-table:latest").get("table").data
        api = wandb.Api()
        Path("up.txt").write_text("up")
        api.run("test/variants").upload_file("up.txt")
        result = {
            "model": model,
            "table": table,
            "reference": Path(api.artifact("references:v0").download("got"), "model.bin").read_text(),
            "linked": [a.qualified_name for a in api.artifact("references:v0").linked_artifacts],
        }
        try:
            api.artifact("saved:v0").delete()
        except Exception as error:
            result["refused"] = str(error)
        collection = api.artifact_collection("model", "saved")
        collection.description = "words"
        collection.tags = ["t"]
        collection.save()
        collection = wandb.Api().artifact_collection("model", "saved")
        result["collection"] = [collection.description, collection.tags, sorted(collection.aliases)]
        api.artifact("test-org/wandb-registry-data/things:prod").unlink()
        result["unlinked"] = not wandb.Api().artifact_exists("test-org/wandb-registry-data/things:prod")
        """
    )
    assert (result["model"], result["table"]) == ("weights", [[1, "x"], [2, "y"]])
    assert result["reference"] == "weights"
    assert result["linked"] == ["test-org/wandb-registry-data/things:v0"]
    assert "has aliases" in result["refused"]
    assert result["collection"] == ["words", ["t"], ["kept", "latest"]]
    assert result["unlinked"] is True
    references = server.artifact("references:v0")
    assert (references.files, references.tags, references.ttl) == ({}, ["tag"], 5 * 3600)
    assert references.entries["model.bin"]["ref"].startswith("file://")
    assert server.runs["variants"].files["up.txt"] == b"up"
    assert server.artifact("saved:kept").state == "COMMITTED"


# Sweeps

TRIAL = """
    import sys
    import wandb
    with wandb.init() as run:
        run.log({"loss": (run.config.a - 2) ** 2})
        run.config.update({"argv": sys.argv[1:]})
"""

PREEMPTED_TRIAL = """
    import sys
    import wandb
    run = wandb.init(resume="allow")
    first = run.starting_step == 0
    open("starts.txt", "a").write(f"{run.starting_step} {' '.join(sys.argv[1:])}\\n")
    for i in range(run.starting_step, 6):
        run.log({"i": i})
        if first and i == 2:
            run.mark_preempting()
            sys.exit(1)
"""

ENDLESS_TRIAL = """
    import signal
    import sys
    import time
    import wandb
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run = wandb.init()
    for i in range(20 if run.config.level == 0 else 600):
        run.log({"loss": run.config.level})
        time.sleep(0.1)
"""


class Agents:
    """Agents wait most of their time (5 s from one trial to the next), so all the sweeps run side by side."""

    def __init__(self, server: WandbServer, directory: Path) -> None:
        grid = Client(server, directory / "grid")
        self.grid = grid.sweep(
            TRIAL, method="grid", metric={"name": "loss", "goal": "minimize"}, parameters={"a": {"values": [1, 2, 4]}}
        )
        preempted = Client(server, directory / "preempted")
        self.preempted = preempted.sweep(PREEMPTED_TRIAL, method="grid", parameters={"a": {"values": [1]}})
        self.starts = preempted.directory / "starts.txt"
        hyperband = Client(server, directory / "hyperband")
        self.hyperband = hyperband.sweep(
            ENDLESS_TRIAL,
            method="grid",
            metric={"name": "loss", "goal": "minimize"},
            parameters={"level": {"values": [0, 10]}},
            early_terminate={"type": "hyperband", "min_iter": 2, "eta": 3},
        )
        self.processes = {
            sweep.id: client.agent(sweep)
            for client, sweep in ((grid, self.grid), (preempted, self.preempted), (hyperband, self.hyperband))
        }

    def finish(self, sweep: Sweep) -> None:
        finish(self.processes[sweep.id])


@pytest.fixture(scope="module")
def agents(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agents]:
    agents = Agents(server, tmp_path_factory.mktemp("agents"))
    yield agents
    for process in agents.processes.values():
        process.kill()
        process.wait()


def test_grid_sweep(server: WandbServer, agents: Agents, client: Client) -> None:
    sweep = agents.grid
    agents.finish(sweep)
    assert sweep.config["parameters"] == {"a": {"values": [1, 2, 4]}}
    assert [run.config["a"] for run in sweep.runs] == [1, 2, 4]
    assert [run.config["argv"] for run in sweep.runs] == [["--a=1"], ["--a=2"], ["--a=4"]]
    assert [run.state for run in sweep.runs] == ["finished"] * 3
    assert [run.summary["loss"] for run in sweep.runs] == [1, 0, 4]
    assert all(run.sweep_id == sweep.id and server.runs[run.id] is run for run in sweep.runs)
    assert sweep.state == "FINISHED"
    result = client.script(
        """
        import os
        import wandb
        api = wandb.Api()
        sweep = api.sweep("tester/test/" + os.environ["SWEEP"])
        result = {
            "runs": [run.config["a"] for run in sweep.runs],
            "best": sweep.best_run().config["a"],
            "state": sweep.state,
            "expected": sweep.expected_run_count,
            "method": sweep.config["method"],
            "agents": [agent.total_runs for agent in sweep.agents()],
            "listed": sweep.id in [s.id for s in api.project("test").sweeps()],
        }
        """,
        SWEEP=sweep.id,
    )
    assert result == {
        "runs": [1, 2, 4],
        "best": 2,
        "state": "FINISHED",
        "expected": 3,
        "method": "grid",
        "agents": [3],
        "listed": True,
    }


def test_preempted_run_is_resumed(agents: Agents) -> None:
    sweep = agents.preempted
    agents.finish(sweep)
    (run,) = sweep.runs
    assert (run.state, run.exit_code) == ("finished", 0)
    assert column(run, "_step") == column(run, "i") == list(range(6))
    first, second = agents.starts.read_text().splitlines()
    assert first == "0 --a=1"
    assert second.startswith("3 ")
    assert "--a=1" in second
    assert "--_wandb={" in second
    assert sweep.requeued == []
    assert sweep.state == "FINISHED"


def test_hyperband_stops_a_run(agents: Agents) -> None:
    sweep = agents.hyperband
    agents.finish(sweep)
    good, bad = sweep.runs
    assert (good.config["level"], bad.config["level"]) == (0, 10)
    assert (good.state, good.stop_requested, column(good, "loss")) == ("finished", False, [0] * 20)
    assert (bad.state, bad.stop_requested, bad.exit_code) == ("killed", True, 143)
    assert 3 <= len(bad.history) < 600


def test_heartbeat(server: WandbServer) -> None:
    """Without a client, for speed: agents that lost their run, and sweeps that are paused and cancelled."""
    upsert, agent_query = (
        "mutation M($input: I!) { upsertSweep(input: $input) { sweep { name } } }",
        "mutation M($input: I!) { createAgent(input: $input) { agent { id } } }",
    )
    beat = "mutation M($input: I!) { agentHeartbeat(input: $input) { commands } }"
    config = json.dumps({"method": "random", "run_cap": 2, "parameters": {"a": {"min": 0.0, "max": 1.0}}})
    data = server.backend.graphql(upsert, {"input": {"config": config, "projectName": "crash"}})
    sweep = server.sweeps[data["upsertSweep"]["sweep"]["name"]]
    agent = server.backend.graphql(agent_query, {"input": {"sweep": sweep.id, "host": "h"}})["createAgent"]["agent"][
        "id"
    ]

    def heartbeat(*alive: str) -> list[dict[str, Any]]:
        state = json.dumps(dict.fromkeys(alive, True))
        data = server.backend.graphql(beat, {"input": {"id": agent, "runState": state}})
        commands: list[dict[str, Any]] = json.loads(data["agentHeartbeat"]["commands"])
        return commands

    (command,) = heartbeat()
    assert command["type"] == "run"
    assert 0 <= command["args"]["a"]["value"] <= 1
    run = server.runs[command["run_id"]]
    assert heartbeat(run.id) == []
    assert run.state == "running"
    sweep.state = "PAUSED"
    assert heartbeat() == []
    assert run.state == "crashed"
    sweep.state = "RUNNING"
    (second,) = heartbeat()
    assert second["run_id"] != run.id
    server.runs[second["run_id"]].state = "preempting"
    (third,) = heartbeat()
    assert (third["type"], third["run_id"]) == ("resume", second["run_id"])
    sweep.state = "CANCELED"
    assert heartbeat(third["run_id"]) == [{"type": "stop", "run_id": third["run_id"]}]
    sweep.state = "RUNNING"
    assert heartbeat() == [{"type": "exit"}]  # two runs are the cap
    assert server.runs[third["run_id"]].state == "killed"
    assert sweep.state == "FINISHED"


def test_sweep_states(server: WandbServer, client: Client) -> None:
    sweep = client.sweep(TRIAL, method="random", parameters={"a": {"min": 0.0, "max": 1.0}})
    states = []
    for option in ("--pause", "--resume", "--stop"):
        client.wandb("sweep", option, f"tester/test/{sweep.id}")
        states.append(sweep.state)
    assert states == ["PAUSED", "RUNNING", "FINISHED"]
    refused = client.popen(
        client.interpreter, "-m", "wandb", "sweep", str(client.write("bad.yaml", "method: nonsense"))
    )
    assert "invalid sweep config" in finish(refused, code=1)


def test_defects_are_recorded() -> None:
    """On a server of its own: an unknown operation is answered 400, and is not forgotten."""
    with WandbServer() as server:
        request = urllib.request.Request(server.url + "/graphql", data=b'{"query": "{ nonsense { id } }"}')
        with pytest.raises(urllib.error.HTTPError) as answer:
            urllib.request.urlopen(request, timeout=10)
        assert answer.value.code == 400
        (error,) = server.errors
        assert "UnknownOperationError: nonsense" in error
        assert server.received == [("POST /graphql", request.data)]


@pytest.mark.slow
def test_stop_by_a_user(server: WandbServer, client: Client) -> None:
    script = client.write(
        "endless.py",
        """
        import time
        import wandb
        run = wandb.init(id="endless")
        while True:
            run.log({"i": run.step})
            time.sleep(0.2)
        """,
    )
    process = client.popen(client.interpreter, str(script))
    wait_for(lambda: "endless" in server.runs and len(server.runs["endless"].history) > 0)
    client.script("import wandb; wandb.Api().run('test/endless').stop()")
    assert "KeyboardInterrupt" in finish(process, code=-signal.SIGINT)
    assert (server.runs["endless"].state, server.runs["endless"].exit_code) == ("killed", 255)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["random", "bayes"])
def test_searched_sweep(method: str, client: Client) -> None:
    sweep = client.sweep(
        TRIAL,
        method=method,
        run_cap=4,
        metric={"name": "loss", "goal": "minimize"},
        parameters={"a": {"min": 0.0, "max": 4.0}},
    )
    finish(client.agent(sweep))
    values = [run.config["a"] for run in sweep.runs]
    assert len(values) == len(set(values)) == 4
    assert all(0 <= value <= 4 for value in values)
    assert [run.state for run in sweep.runs] == ["finished"] * 4
    assert [run.summary["loss"] for run in sweep.runs] == pytest.approx([(value - 2) ** 2 for value in values])
    assert sweep.state == "FINISHED"


@pytest.mark.slow
def test_preempted_run_moves_to_another_agent(server: WandbServer, client: Client) -> None:
    sweep = client.sweep(PREEMPTED_TRIAL, method="grid", parameters={"a": {"values": [1]}})
    finish(client.agent(sweep, "--count", "1"))
    (run,) = sweep.runs
    assert (run.state, run.exit_code, column(run, "i")) == ("preempted", 1, [0, 1, 2])
    other = Client(server, client.directory / "other")
    (other.directory / "trial.py").write_text((client.directory / "trial.py").read_text())
    finish(other.agent(sweep))
    assert sweep.runs == [run]
    assert (run.state, column(run, "_step")) == ("finished", list(range(6)))
    assert len(server.backend.store.agents) >= 2


@pytest.mark.slow
def test_wandb_verify(server: WandbServer, tmp_path: Path) -> None:
    """W&B's own check of a server, 9 trials of a sweep among it."""
    client = Client(server, tmp_path, forked=False)
    client.env.pop("WANDB_PROJECT")
    output = client.wandb("verify", "--host", server.url, USER=os.environ.get("USER", "tester"))
    for check in ("signed URL upload", "large payloads", "a file", "artifact save", "sweep creation"):
        (line,) = (line for line in output.splitlines() if check in line)
        assert line.endswith("\N{WHITE HEAVY CHECK MARK}"), output
