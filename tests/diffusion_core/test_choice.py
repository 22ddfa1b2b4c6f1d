"""Which checkpoint a command takes: the best of a run everywhere, unless another is asked for; and what it says."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert_diffusers
import evaluate
import lottery_ticket
import prune
import pytest
import sample_images
import torch
from tiny import TINY, digits, metadata, tiny_network

from agent import leaderboard
from agent.__main__ import main
from agent.config import build_config
from agent.trial import run_trial
from diffusion_core.checkpoint import CheckpointError, read_checkpoint, step_folder, write_checkpoint
from diffusion_core.choice import announce, best_of, choose
from diffusion_core.config import flatten
from diffusion_core.files import write_json, write_json_lines
from diffusion_core.run_folder import HISTORY_FILE, PROTOCOLS_FILE, read_history
from diffusion_core.runs.result import TrialResult, write_result
from diffusion_core.search.results import JSON_FILE
from diffusion_core.tracking import MemoryTracker
from diffusion_core.training.trainer import TrainState

ROOT = Path(__file__).resolve().parents[2]
CONFIG = build_config(TINY, {"train.steps": 9, "sample.every": 0, "eval.every": 0, "eval.classifier": "none"})
WORDS = [f"--{key}={','.join(map(str, value)) if isinstance(value, list) else value}"
         for key, value in flatten(CONFIG).items() if value is not None and key != "log.dir"]  # fmt: skip
LOSSES = {3: 0.5, 6: 0.25, 9: 0.75}
AGREEMENT = {3: 0.9, 6: 0.8, 9: 0.95}
BEST = 6


def write_run(folder: Path, name: str = "run") -> Path:
    """The folder of a finished run with three checkpoints. Each figure is the best in another one of them."""
    for step, loss in LOSSES.items():
        state = TrainState.start(tiny_network(CONFIG, seed=step), CONFIG.train, CONFIG.ema, step)
        state.extra_parts["masks"] = {"conv_in.weight": torch.ones(8, 1, 3, 3, dtype=torch.bool)}
        best_step = min((known for known in LOSSES if known <= step), key=LOSSES.__getitem__)
        described = metadata(state.network, CONFIG) | state.metadata() | {
            "config": flatten(CONFIG),
            "figures": {"val/loss": loss, "eval/class_agreement": AGREEMENT[step]},
            "best": {"metric": "val/loss", "value": LOSSES[best_step], "step": best_step},
        }  # fmt: skip
        write_checkpoint(folder / "checkpoints", step, described, state.parts())
    rows = [{"step": step, "val/loss": LOSSES[step], "eval/class_agreement": AGREEMENT[step]} for step in LOSSES]
    write_json_lines(folder / HISTORY_FILE, [*rows[:1], {"step": 4, "eval/fid50k_train": 1.0}, *rows[1:]])
    write_json(folder / PROTOCOLS_FILE, {"eval/class_agreement": "n=20, seed=1"})
    figures = {"val/loss": 0.25, "eval/class_agreement": 0.95, "eval/fid50k_train": 1.0, "model/params": 7}
    best = folder / "checkpoints" / step_folder(BEST)
    write_result(folder, TrialResult(name, 9, figures, best, 1.0), flatten(CONFIG))
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("RANK", raising=False)
    return write_run(Path("run"))


def place(run: Path, step: int) -> Path:
    return run / "checkpoints" / step_folder(step)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on stderr that say which checkpoint was taken."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("checkpoint: ")]


# The rule.


def test_the_best_of_a_run_unless_another_is_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[tuple[Any, ...], int, str]] = [
        ((run,), BEST, f"{place(run, 6)}, step 6: the best by val/loss (0.25); the newest is of step 9"),
        (
            (run / "checkpoints",),
            BEST,
            f"{place(run, 6)}, step 6: the best by val/loss (0.25); the newest is of step 9",
        ),
        ((run, "best"), BEST, f"{place(run, 6)}, step 6: the best by val/loss (0.25); the newest is of step 9"),
        ((run, "newest"), 9, f"{place(run, 9)}, step 9: the newest; the best by val/loss (0.25) is of step 6"),
        ((run, "3"), 3, f"{place(run, 3)}, step 3"),
        ((place(run, 3),), 3, f"{place(run, 3)}, step 3"),
        ((place(run, 3), "newest"), 3, f"{place(run, 3)}, step 3"),
        ((place(run, 3), "3"), 3, f"{place(run, 3)}, step 3"),
    ]
    for arguments, step, line in cases:
        assert (choose(*arguments).step, choose(*arguments).chosen) == (step, line)
    assert choose(place(run, 9), name="entity/project/model-a:v3").chosen == "entity/project/model-a:v3, step 9"
    announce(choose(run), choose(place(run, 3)))
    assert said(capsys) == [f"checkpoint: {cases[0][2]}", f"checkpoint: {place(run, 3)}, step 3"]
    assert best_of(run / "checkpoints") == {"metric": "val/loss", "value": 0.25, "step": BEST}


def test_a_damaged_newest_one_is_named(run: Path) -> None:
    (place(run, 9) / "ema.safetensors").write_bytes(b"damaged")
    why = f"{str(place(run, 9))!r}: ema.safetensors is damaged (its size or SHA-256 is not what was written)"
    assert choose(run, "newest").chosen == f"{place(run, 6)}, step 6: the newest; {why}"


def test_only_the_first_process_says_it(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    announce(choose(run))
    assert said(capsys) == []


def test_without_the_best_the_newest_is_taken(run: Path) -> None:
    newest = f"{place(run, 9)}, step 9: the newest; "
    (place(run, 6) / "ema.safetensors").write_bytes(b"damaged")
    assert choose(run).chosen == f"{newest}the best by val/loss (0.25), of step 6, is not here or damaged"
    shutil.rmtree(place(run, 6))
    assert choose(run).chosen == f"{newest}the best by val/loss (0.25), of step 6, is not here or damaged"
    for step, best in ((3, None), (9, {"step": "nine"})):
        content = json.loads((place(run, step) / "checkpoint.json").read_text())
        (place(run, step) / "checkpoint.json").write_text(json.dumps(content | {"best": best}))
    assert choose(run).chosen == f"{newest}none was measured as the best"
    (place(run, 9) / "checkpoint.json").write_text("{")  # Its neighbour is whole.
    assert choose(run).step == 3
    (place(run, 3) / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        choose(run)


def test_a_part_that_is_needed_decides_before_the_rule(run: Path) -> None:
    (place(run, 6) / "masks.safetensors").unlink()  # As after a download for sampling.
    assert choose(run, parts=("masks",)).chosen.endswith(
        "step 9: the newest; the best by val/loss (0.25), of step 6, lacks masks"
    )
    assert choose(run).step == 6
    for step in (3, 9):
        (place(run, step) / "masks.safetensors").unlink()
    assert choose(run, parts=("masks",)).step == 9  # Who needs them says that they are missing.


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("last", "--which = 'last': expected best, newest, or a step such as 5000"),
        ("-1", "--which = '-1': expected best, newest, or a step such as 5000"),
        ("5", "--which = '5': 'run/checkpoints' holds the steps 3, 6, 9"),
    ],
)
def test_what_cannot_be_chosen_is_refused_in_one_line(run: Path, which: str, message: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        choose(run, which)
    assert str(refused.value) == message


def test_a_step_that_a_named_checkpoint_does_not_have_is_refused(run: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"--which = '9': 'run/checkpoints/step-00000003' is the checkpoint of step 3"
    ):
        choose(place(run, 3), "9")
    for nothing in (Path("nothing"), Path("x" * 5000)):
        with pytest.raises(CheckpointError, match="no checkpoint here"):
            choose(nothing)


# All commands follow it. Each of these returns the step that it worked on, as far as its results tell.

FEW = ["--device", "cpu", "--num-images", "2"]


def sampled(*words: str) -> int:
    assert sample_images.main([*words, *FEW, "--labels", "1", "--out", "samples"]) == 0
    weights = json.loads(Path("samples/samples.json").read_text())["weights"]
    checkpoints = map(read_checkpoint, sorted(Path("run/checkpoints").iterdir()))
    return next(c.step for c in checkpoints if c.metadata["files"]["ema.safetensors"]["sha256"] == weights)


def evaluated(*words: str) -> int:
    assert evaluate.main([*words, *FEW, "--against", str(place(Path("run"), 3)), "--json", "found.json"]) == 0
    return json.loads(Path("found.json").read_text())["step"]


def pruned(*words: str) -> int:
    knobs = ["--log.progress=false", "--train.device=cpu"]
    assert prune.main([*words, "--target", "params=0.7", "--out", "small", "--num-images", "0", *knobs]) == 0
    return read_checkpoint(Path("small")).metadata["extra"]["parent"]["step"]


def exported(*words: str) -> int:
    assert words[0] == "--checkpoint"
    assert convert_diffusers.main(["export", words[1], "exported", *words[2:]]) == 0
    from safetensors.torch import load_file

    theirs = load_file("exported/unet/diffusion_pytorch_model.safetensors")["conv_in.weight"]
    checkpoints = map(read_checkpoint, sorted(Path("run/checkpoints").iterdir()))
    return next(c.step for c in checkpoints if torch.equal(c.tensors("ema")["conv_in.weight"], theirs))


COMMANDS: dict[str, Callable[..., int]] = {
    "sample_images": sampled,
    "evaluate": evaluated,
    "prune": pruned,
    "convert_diffusers": exported,
}


@pytest.mark.parametrize(
    "command",
    ["sample_images", "evaluate", "prune", pytest.param("convert_diffusers", marks=pytest.mark.extra("diffusers"))],
)
@pytest.mark.parametrize(
    ("words", "step"),
    [
        (["run"], BEST),
        (["run", "--which", "best"], BEST),
        (["run", "--which", "newest"], 9),
        (["run", "--which", "3"], 3),
        (["run/checkpoints/step-00000003"], 3),
    ],
    ids=["default", "best", "newest", "step", "path"],
)
def test_every_command_with_a_run(
    command: str, words: list[str], step: int, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert COMMANDS[command]("--checkpoint", *words) == step
    line, *others = said(capsys)
    assert line.startswith(f"checkpoint: {place(run, step)}, step {step}")
    assert len(others) == (command == "evaluate")  # The other model has a line of its own.


def test_every_command_refuses_what_is_no_choice(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for call in (
        lambda: sample_images.main(["--checkpoint", str(run), "--which", "last", *FEW]),
        lambda: evaluate.main(["--checkpoint", str(run), "--which", "last", *FEW]),
        lambda: prune.main(["--checkpoint", str(run), "--which", "last", "--target", "params=0.7", "--out", "small"]),
        lambda: leaderboard.main([str(run), "--which", "last"]),
    ):
        assert call() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --which = 'last': expected best, newest, or a step")


def test_the_models_beside_the_first_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint", str(place(run, 3)), "--guide-checkpoint", str(run), "--guidance", "2"]
    assert sample_images.main([*words, *FEW, "--labels", "1", "--out", "guided"]) == 0
    assert [line.partition(", ")[2][:6] for line in said(capsys)] == ["step 3", "step 6"]
    assert evaluate.main(["--checkpoint", str(place(run, 3)), "--against", str(run), *FEW]) == 0
    assert [line.partition(", ")[2][:6] for line in said(capsys)] == ["step 3", "step 6"]
    assert lottery_ticket.main(["--overlap", str(run), str(place(run, 3)), "--out", "overlap"]) == 0
    assert [line.partition(", ")[2][:6] for line in said(capsys)] == ["step 6", "step 3"]


def test_the_best_trial_of_a_sweep_that_was_moved(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or copied: the trial of the original, which the results name, is not taken."""
    trial = Path("moved/trials/best")
    shutil.copytree(run, trial)
    for before in (run, Path("/gone/trials/best")):
        write_json(
            Path("moved") / JSON_FILE,
            [{"id": "none", "best_checkpoint": None}, {"id": "best", "best_checkpoint": str(place(before, BEST))}],
        )
        for words, step in (([], BEST), (["--which", "newest"], 9)):
            assert evaluate.main(["--sweep", "moved", *words, *FEW, "--against", str(place(run, 3))]) == 0
            assert said(capsys)[0].startswith(f"checkpoint: {place(trial, step)}, step {step}: the ")
    shutil.rmtree(trial)
    assert evaluate.main(["--sweep", "moved", *FEW]) == 2
    assert capsys.readouterr().err.startswith("error: --sweep = 'moved': its best trial best is not in it; ")
    write_json(Path("moved") / JSON_FILE, [{"id": "none", "best_checkpoint": None}])
    assert evaluate.main(["--sweep", "moved", *FEW]) == 2
    assert "no finished trial" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["init.checkpoint", "distill.checkpoint"])
@pytest.mark.parametrize(("path", "step"), [("run", BEST), ("run/checkpoints/step-00000003", 3)])
def test_a_run_that_starts_from_a_run(
    option: str, path: str, step: int, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--distill.output=1"] if option.startswith("distill") else []
    assert main([*WORDS, f"--{option}={path}", "--log.dir=new", "--train.steps=1", "--checkpoint.every=0", *more]) == 0
    (line,) = said(capsys)
    assert line.startswith(f"checkpoint: {place(run, step)}, step {step}")
    if option == "init.checkpoint":
        assert read_checkpoint(Path("new")).metadata["extra"]["parent"]["step"] == step
    else:
        taught = read_checkpoint(Path("new")).tensors("teacher")
        assert torch.equal(taught["conv_in.weight"], read_checkpoint(place(run, step)).tensors("ema")["conv_in.weight"])


def test_no_command_chooses_by_a_rule_of_its_own() -> None:
    own = {"study.py", "accuracy.py", "compare_formulations.py"}  # Studies, which read what they wrote themselves.
    for path in [path for folder in ("scripts", "agent") for path in (ROOT / folder).rglob("*.py")]:
        calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        names = {ast.unparse(call.func) for call in calls}
        if path.parent.name == "scripts" or path.name in ("trial.py", "leaderboard.py", "results.py"):
            assert not names & {"read_checkpoint", "newest_checkpoint"} or path.name in own, path


# A row of the leaderboard is a checkpoint.


def rows(folder: Path, *words: str) -> list[dict[str, Any]]:
    assert leaderboard.main([str(folder), *words, "--out", "board"]) == 0
    return json.loads(Path("board/leaderboard.json").read_text())


def test_a_row_holds_what_was_measured_on_one_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = rows(run)
    assert (row["model"], row["step"], row["costs"]) == ("run", BEST, {"parameters": 7})
    assert row["figures"] == {"val/loss": 0.25, "eval/class_agreement": 0.8}  # Not 0.95, which is of step 9.
    assert row["protocols"] == {"eval/class_agreement": "n=20, seed=1"}
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].split()[:3] == ["model", "step", "parameters"]
    assert printed.err == "checkpoint: best of each run\n"
    assert Path("board/leaderboard.csv").read_text().startswith("model,step,parameters,")

    (row,) = rows(run, "--which", "newest")
    assert (row["step"], row["figures"]) == (9, {"val/loss": 0.75, "eval/class_agreement": 0.95})
    (row,) = rows(run, "--which", "3")
    assert (row["step"], row["figures"]) == (3, {"val/loss": 0.5, "eval/class_agreement": 0.9})
    assert row["costs"] == {"parameters": 7}
    (row,) = rows(run, "--which", "4")  # Its checkpoint is deleted. Its figures are known, its network is not.
    assert (row["step"], row["figures"], row["costs"]) == (4, {"eval/fid50k_train": 1.0}, {})
    assert leaderboard.main([str(run), "--which", "5"]) == 2


def test_what_was_evaluated_later_stays_with_its_checkpoint(run: Path) -> None:
    judged = {"eval/fid50k_train": 3.0, "eval/class_agreement": 0.85}
    write_json(place(run, 9) / "evaluation.json", {"figures": judged, "protocols": dict.fromkeys(judged, "n=50000")})
    first, second = rows(run)
    assert (first["step"], first["figures"]) == (BEST, {"val/loss": 0.25, "eval/class_agreement": 0.8})
    assert (second["step"], second["figures"]) == (9, {"val/loss": 0.75} | judged)
    assert first["protocols"] == {"eval/class_agreement": "n=20, seed=1"}
    assert set(second["protocols"].values()) == {"n=50000"}
    write_json(place(run, BEST) / "evaluation.json", {"figures": {"eval/fid50k_train": 2.0}, "protocols": {}})
    by = rows(run, "--by", "eval/fid50k_train")
    assert [(row["step"], row["figures"]["eval/fid50k_train"]) for row in by] == [(BEST, 2.0), (9, 3.0)]
    (only,) = rows(run, "--which", "9")
    assert only == second


@pytest.mark.parametrize("other", [{"structure": {"conv_in": {"out": 8}}}, {"extra": {"student": {"stage": 1}}}])
def test_another_network_has_other_costs(other: dict[str, Any], run: Path) -> None:
    for step in (3, 9):
        write_json(
            place(run, step) / "evaluation.json", {"figures": {"eval/fid50k_train": float(step)}, "protocols": {}}
        )
    content = json.loads((place(run, 3) / "checkpoint.json").read_text())
    (place(run, 3) / "checkpoint.json").write_text(json.dumps(content | other))
    assert [(row["step"], row["costs"]) for row in rows(run)] == [
        (BEST, {"parameters": 7}),
        (3, {}),
        (9, {"parameters": 7}),
    ]


def test_a_chain_of_runs_is_listed_by_its_runs(run: Path) -> None:
    chain = Path("chain")
    shutil.copytree(run, chain / "rounds" / "00")
    write_json_lines(chain / HISTORY_FILE, [{"step": 0, "lottery/val/loss": 0.25, "val/loss": 0.25}])
    write_result(chain, TrialResult("chain", 9, {"val/loss": 0.25}, place(run, BEST), 1.0), {})
    assert [(row["model"], row["step"]) for row in rows(chain)] == [("run", BEST)]


def test_a_checkpoint_names_the_figures_of_its_own_step(tmp_path: Path) -> None:
    """A figure that is measured less often than checkpoints are written is missing, and not that of another step."""
    config = build_config(TINY, {"train.steps": 6, "checkpoint.every": 2, "eval.every": 3, "checkpoint.keep": 9,
                                 "eval.classifier": "none", "checkpoint.best_metric": "val/loss",
                                 "sample.every": 0})  # fmt: skip
    tracker = MemoryTracker()
    run_trial(config, tracker, dataset=digits(), folder=tmp_path, run_id="a")
    history = {row["step"]: row for row in read_history(tmp_path)}
    seen = []
    for path in sorted((tmp_path / "checkpoints").iterdir()):
        checkpoint = read_checkpoint(path)
        measured = {name: value for name, value in history[checkpoint.step].items() if name != "step"}
        assert checkpoint.metadata["figures"] == pytest.approx(measured)
        seen.append("val/loss" in checkpoint.metadata["figures"])
    assert seen == [False, False, True]
    for artifact in tracker.artifacts:
        assert artifact["metadata"]["figures"].keys() <= history[artifact["metadata"]["step"]].keys()


def test_a_row_is_of_one_sampling_and_its_cost(run: Path) -> None:
    slow, fast = (f"sampler=ddim, steps={steps}, spacing=uniform, guidance={steps % 24:g}" for steps in (26, 1))
    write_json(run / "protocols.json", {"eval/class_agreement": f"n=20, {slow}, seed=0, extractor=c, weights=w"})
    result = json.loads((run / "result.json").read_text())
    result["figures"] |= {"sample/evaluations": 52, "sample/macs": 520}
    write_json(run / "result.json", result)
    file = place(run, BEST) / "evaluation.json"
    own, unchanged = {"evaluations an image": 52, "MACs an image": 520, "parameters": 7}, {"val/loss": 0.25}

    def judged(line: str, figures: dict[str, float], costs: dict[str, int], **lines: str) -> list[dict[str, Any]]:
        write_json(file, {"figures": figures | costs, "protocols": dict.fromkeys(figures, line) | lines})
        return [{key: row[key] for key in ("step", "costs", "figures")} for row in rows(run)]

    fid, agreement = {"eval/fid50k_train": 3.0}, {"eval/class_agreement": 0.8}
    first = {"step": BEST, "costs": own, "figures": unchanged | agreement}
    few = {"sample/evaluations": 1, "sample/macs": 10}
    line = f"reference=digits/train, n=50000, {fast}, seed=1, extractor=inception, weights=w"
    cheap = {"evaluations an image": 1, "MACs an image": 10, "parameters": 7}
    # Other steps than in training have a row of their own, also in a file of an earlier version.
    for lines in ({}, dict.fromkeys(few, f"{fast}, seed=1")):
        second = {"step": BEST, "costs": cheap, "figures": unchanged | fid}
        assert judged(line, fid, few, **lines) == [first, second]
    # Those of an older evaluation are without a cost, which is the newest one's.
    old, new = {"eval/kid50k_train": 0.5}, {"sample/evaluations": f"{fast}, seed=1", "sample/macs": f"{fast}, seed=1"}
    assert judged(line.replace("steps=1", "steps=2"), old | fid, few, **new, **dict.fromkeys(fid, line)) == [
        first,
        {"step": BEST, "costs": {"parameters": 7}, "figures": unchanged | old},
        {"step": BEST, "costs": cheap, "figures": unchanged | fid},
    ]
    # The sampling of the training, with another seed.
    same = line.replace(fast, slow)
    assert judged(same, fid, {}) == [{"step": BEST, "costs": own, "figures": unchanged | agreement | fid}]
    # Autoguidance costs something else.
    guided = same.replace("seed=1", "seed=1, away from /a, b")
    assert judged(guided, fid, {}) == [
        first,
        {"step": BEST, "costs": {"parameters": 7}, "figures": unchanged | fid},
    ]
    # A run that judged no images while it trained.
    write_json(run / "protocols.json", {})
    history = [json.loads(row) for row in (run / "history.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in row.items() if name in ("step", "val/loss")} for row in history]
    write_json_lines(run / "history.jsonl", kept)
    assert judged(guided, fid, {}) == [{"step": BEST, "costs": {"parameters": 7}, "figures": unchanged | fid}]
    file.unlink()
    (row,) = rows(run)
    assert (row["costs"], row["figures"]) == (own, unchanged)
