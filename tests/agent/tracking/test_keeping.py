"""What W&B keeps, what `python -m agent.clean` removes there, and what `scripts/promote.py` puts in a registry.

One process with the real client tells all of it; the server is asked what came of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server import WandbServer
from server.faults import Fault
from wandb_client import ROOT, Client

PROGRAM = """
import contextlib, io, os, sys, time
from pathlib import Path
import wandb
from agent import clean
from agent.tracking.retention import Retention
from agent.tracking.run import start_wandb
from agent.tracking.stop_cause import was_asked_to_end
from agent.tracking.tracker import WandbTracker
from diffusion_core.tracking import Upload

sys.path.insert(0, ROOT + "/scripts")
import promote

def told(main, *words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(words))
    return [status, out.getvalue(), err.getvalue()]

result = {}
os.environ["WANDB_SWEEP_ID"] = SWEEP
for run_id, losses in (("worse", [0.9]), ("better", [0.5, 0.2, 0.4, 0.6, 0.7])):
    os.environ["WANDB_RUN_ID"] = run_id
    wandb.teardown()  # It reads the environment once.
    run = start_wandb(run_id, Path("runs", run_id), {"seed": 1}, "online")
    tracker = WandbTracker(run, keep=2, after_upload=Retention(2, 7))
    for i, loss in enumerate(losses):
        tracker.log({"val/loss": loss}, 10 * i)
        file = Path("ema.safetensors")
        file.write_bytes(b"%d" % i * 100_000)
        best = ["best"] if loss == min(losses[:i + 1]) else []
        tracker.artifact(Upload(f"model-{run_id}", "model", [file], ["latest", f"step-{i}", *best], {"step": i}))
        while tracker.uploads.unsent():  # One after another, so that none is dropped.
            time.sleep(0.02)
        file.unlink()
    tracker.alert("Title", "Text")
    if run_id == "better":
        result["asked to end"] = [was_asked_to_end(run)]
        wandb.Api(timeout=30)._service_api.execute_graphql(
            "mutation($id: ID!) { stopRun(input: {id: $id}) { success } }",
            variables={"id": wandb.Api().run(run.path)._attrs["id"]},
        )
        result["asked to end"].append(was_asked_to_end(run))
    tracker.close(0)

result["shown"] = told(clean.main, "--project", "tester/test")
result["removed"] = told(clean.main, "--project", "tester/test", "--yes")
result["nothing left"] = told(clean.main, "--project", "tester/test")
result["promoted"] = told(promote.main, "--sweep", f"tester/test/{SWEEP}", "--collection", "digits", "--alias", "new")
result["another"] = told(promote.main, "--artifact", "test/model-better:latest", "--registry", "test-org/other",
                         "--collection", "digits")
result["personal"] = told(promote.main, "--artifact", "somebody/test/model-own:latest", "--collection", "digits")
result["no sweep"] = told(promote.main, "--sweep", "tester/test/none", "--collection", "digits")
result["no model"] = told(promote.main, "--artifact", "model-none:best", "--collection", "digits")
result["cache"] = sum(f.stat().st_size for f in Path(os.environ["WANDB_CACHE_DIR"]).rglob("*") if f.is_file())
"""

OWN = """
import wandb
from pathlib import Path
Path("ema.safetensors").write_bytes(b"x")
with wandb.init(entity="somebody", project="test", id="own") as run:
    artifact = wandb.Artifact("model-own", "model")
    artifact.add_file("ema.safetensors")
    run.log_artifact(artifact).wait()
"""

UNNAMED = """
import wandb
from pathlib import Path
with wandb.init(entity="tester", project="test", id="unnamed") as run:
    run.log({"model/parameters": 1, "val/loss": 1.0})
    for content in ("one", "another"):
        Path("ema.safetensors").write_text(content)
        artifact = wandb.Artifact("model-unnamed", "model", metadata={"step": 1})
        artifact.add_file("ema.safetensors")
        run.log_artifact(artifact).wait()
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], WandbServer]]:
    with WandbServer() as server:
        client = Client(server, tmp_path_factory.mktemp("keeping"))
        config = {"method": "grid", "metric": {"name": "val/loss", "goal": "minimize"}, "program": "x.py"}
        answer = server.backend.sweeps.upsert({
            "input": {"entityName": "tester", "projectName": "test",
                      "config": json.dumps({**config, "parameters": {"seed": {"values": [1, 2]}}})}
        })  # fmt: skip
        sweep = answer["sweep"]["name"]
        client.script(OWN)
        yield client.script(f"SWEEP, ROOT = {sweep!r}, {str(ROOT)!r}\n{PROGRAM}"), server
        assert server.errors == []


def versions(server: WandbServer) -> dict[int, Any]:
    return {a.metadata["step"]: a for a in server.runs["better"].output_artifacts if a.state == "COMMITTED"}


def test_the_best_and_the_newest_stay_and_the_rest_has_a_time_to_live(
    told: tuple[dict[str, Any], WandbServer],
) -> None:
    server = told[1]
    kept = versions(server)
    assert {step: sorted(artifact.aliases) for step, artifact in kept.items()} == {
        1: ["best", "step-1"],
        3: ["step-3"],
        4: ["latest", "step-4"],
    }
    gone = [a for a in server.runs["better"].output_artifacts if a.state == "DELETED"]
    assert sorted(artifact.metadata["step"] for artifact in gone) == [0, 2]
    assert {artifact.ttl for artifact in gone} == {7 * 24 * 3600}
    assert {artifact.ttl for artifact in kept.values()} == {None}


def test_clean_shows_before_it_removes(told: tuple[dict[str, Any], WandbServer]) -> None:
    result, _ = told
    for key, removed in (("shown", 0), ("removed", 2)):
        status, out, err = result[key]
        assert status == 0, err
        assert sorted(line.split()[2] for line in out.splitlines()) == ["model-better:v0", "model-better:v2"]
        assert out.count("removed") == removed
    assert result["nothing left"][:2] == [0, ""]


def test_what_was_uploaded_is_not_in_the_cache_too(told: tuple[dict[str, Any], WandbServer]) -> None:
    assert told[0]["cache"] < 100_000  # Less than one of them: W&B keeps small files of its own there.


def test_the_best_model_of_a_sweep_is_promoted(told: tuple[dict[str, Any], WandbServer]) -> None:
    result, server = told
    status, out, err = result["promoted"]
    assert status == 0, err
    assert out == "tester/test/model-better:best is in wandb-registry-model/digits\n"
    (collection,) = linked(server, "wandb-registry-model")
    (membership,) = collection.memberships
    assert membership.artifact is versions(server)[1]
    assert sorted(membership.aliases) == ["latest", "new"]


def test_a_model_is_promoted_to_the_registry_that_is_named(told: tuple[dict[str, Any], WandbServer]) -> None:
    result, server = told
    status, out, err = result["another"]
    assert status == 0, err
    assert out == "test/model-better:latest is in test-org/wandb-registry-other/digits\n"
    (collection,) = linked(server, "wandb-registry-other")
    assert [membership.artifact for membership in collection.memberships] == [versions(server)[4]]


def linked(server: WandbServer, registry: str) -> list[Any]:
    """The collections of a registry of the organization."""
    collections = [c for c in server.backend.store.collections if c.is_portfolio and c.project.entity == "test-org"]
    return [collection for collection in collections if collection.project.name == registry]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("personal", "'somebody' is a personal entity without a registry"),
        ("no sweep", "--sweep = 'tester/test/none'"),
        ("no model", "--artifact = 'model-none:best'"),
    ],
)
def test_what_cannot_be_promoted_is_refused(told: tuple[dict[str, Any], WandbServer], case: str, words: str) -> None:
    status, out, err = told[0][case]
    assert (status, out) == (2, "")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]


def test_the_server_is_asked_why_a_run_is_stopped(told: tuple[dict[str, Any], WandbServer]) -> None:
    assert told[0]["asked to end"] == [False, True]


def test_alerts_arrive(told: tuple[dict[str, Any], WandbServer]) -> None:
    assert told[1].runs["better"].alerts == [{"title": "Title", "text": "Text", "severity": "WARN"}]


def test_what_wandb_refuses_is_one_line(told: tuple[dict[str, Any], WandbServer], tmp_path: Path) -> None:
    """A project that there is not, a version that is not deleted, a table that is not taken."""
    _, server = told
    client = Client(server, tmp_path)
    client.script(UNNAMED)
    server.faults = [Fault("DeleteArtifact", status=403), Fault("UpsertBucket", status=403)]
    project, table = ["--project", "tester/test"], ["--which", "newest", "--upload"]
    for words, line in (
        (["agent.clean", "--project", "tester/none"], "--project = 'tester/none': Could not find project none"),
        (["agent.clean", *project, "--yes"], "'model-unnamed:v0': not deleted: a fault of the test"),
        (["agent.leaderboard", *project, *table], "--upload: --project = 'tester/test': a fault of the test"),
    ):
        printed = client.python("-m", *words, code=2)
        assert "Traceback" not in printed
        assert f"error: {line}\n" in printed
    server.faults = []
    assert "model-unnamed:v0  removed" in client.python("-m", "agent.clean", *project, "--yes")
