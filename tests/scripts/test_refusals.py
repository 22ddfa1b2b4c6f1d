"""What commands refuse: one line in one form, exit status 2, and nothing on the disk."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import COMMANDS, run_command, tree
from PIL import Image
from server import WandbServer
from tiny import TINY
from wandb_client import Client, finish

WORDS = [f"--{key}={','.join(map(str, value)) if isinstance(value, list) else value}" for key, value in TINY.items()]
LINE = re.compile(r"error: [^\s:=][^:=]*( = ('(\\.|[^'])*'|\S+))?: \S.*\S")
"""``error: KEY = VALUE: what is wrong``, or without a value what is missing."""

SWEEP = """
method: grid
command: ["${env}", python, -m, agent, "${args}"]
parameters:
"""
PRUNING = SWEEP + "  preset: {value: digits}\n  prune.method: {value: structured}\n  prune.target: {value: channels}\n"
FILES: dict[str, str | bytes] = {
    "values.yaml": "train.lr: 0.1\n",
    "sweep.yaml": SWEEP + "  preset: {value: digits}\n",
    "unknown.yaml": SWEEP + "  train.lrr: {value: 1}\n",
    "narrow.yaml": PRUNING + "  prune.keep: {values: [0.5, 0.001]}\n",
    "places.yaml": SWEEP + "  data.name: {value: folder}\n  data.path: {values: [classes, nowhere]}\n"
    "  init.checkpoint: {value: none}\n",
    "damaged.yaml": "a: [",
    "sweeps/quickstart.yaml": SWEEP + "  preset: {value: digits}\n",
    "file": "x",
    "classes/a/0.png": b"no image",
    "classes/b/0.png": b"no image",
    "empty/a/readme.txt": "x",
}

NEEDS_MODEL = ("--checkpoint", "nowhere")
REFUSED: dict[str, list[list[str]]] = {
    "agent": [
        [],
        ["--dryrun", "--preset=digits"],
        ["--train.lrr=1", "--preset=digits"],
        ["x"],
        ["--preset=nothing"],
        ["--config", "nowhere.yaml"],
        ["--config", "sweep.yaml"],
        ["--config", "damaged.yaml"],
        ["--help", "trian"],
        ["--preset=digits", "--log.dir=file/run"],
        ["--preset=digits", "--log.dir=file/run", "--dry-run"],
        *(
            [*words, *dry]
            for dry in ([], ["--dry-run"])
            for words in (
                ["--data.name=folder", "--data.path=nowhere"],
                ["--data.name=folder", "--data.path=classes", "--data.image_size=32"],
                ["--data.name=folder", "--data.path=empty"],
                ["--preset=digits", "--init.checkpoint=nowhere"],
                ["--preset=digits", "--distill.checkpoint=nowhere", "--distill.output=1"],
                ["--preset=digits", "--prune.method=structured", "--prune.target=channels", "--prune.keep=0.001"],
                ["--preset=digits", "--train.device=cuda"],
            )
        ),
        ["--data.name=mnist", "--preset=mnist", "--data.path=file", "--dry-run"],
    ],
    "agent.sweep": [
        [],
        ["quickstart.yaml"],
        ["values.yaml", "--offline"],
        ["unknown.yaml", "--offline"],
        ["narrow.yaml", "--offline", "--dry-run"],
        ["places.yaml", "--offline", "--dry-run"],
        ["sweep.yaml", "--jobs=0"],
        ["sweep.yaml", "--dryrun"],
        ["sweep.yaml", "--agents=2"],
    ],
    "agent.sync": [[], ["nowhere"], ["empty"], ["empty", "--plugins=no_such_module"]],
    "agent.clean": [["nowhere"], ["file"], ["--yess"]],
    "agent.leaderboard": [["nowhere"], ["nowhere", "--out=out"], ["--by=zzz"], ["--upload"], ["--which=x", "nowhere"],
                          ["nowhere", "--plugins=no_such_module"]],
    "benchmark": [[], ["zzz"], ["all", "--rounds=0"], ["all", "--rounds=x"]],
    "check_formulations": [["--steps=x"], ["--seeds=-1", "--out=out"], ["--zzz"]],
    "compare_formulations": [["--steps=x"], ["--seeds=-1", "--out=out"], ["--zzz"]],
    "compare_pruning": [["--keep=2", "--out=out"], ["--tables=x", "--out=out"], ["--steps=1", "--out=out"]],
    "compare_tickets": [["--seeds=x", "--out=out"], ["--zzz"]],
    "export_model": [[], [*NEEDS_MODEL], [*NEEDS_MODEL, "--format", "x"]],
    "convert_diffusers": [[], ["export", "nowhere", "t"], ["export", "x", "file"]],
    "evaluate": [[], [*NEEDS_MODEL], ["nowhere", "--data=digits"], ["--sweep=nowhere"], ["--checkpoint=a", "--sweep=b"],
                 ["--checkpoint=a", "--num-images=0"], ["--checkpoint=nowhere", "--json=out/figures.json"],
                 ["nowhere", "elsewhere"], ["--checkpoint=a", "--device=tpu"]],
    "gpu_check": [["zzz"], ["--steps=x"]],
    "lottery_ticket": [
        [],
        ["--out", "out"],
        ["--preset=digits", "--out", "out", "--prune.rounds=0"],
        ["--preset=digits", "--out", "out", "--prune.method=magnitude"],
        ["--preset=digits", "--out", "out", "--prune.method", "none"],
        ["--preset=digits", "--out", "out", "--init.checkpoint=x"],
        ["--overlap", "nowhere", "elsewhere", "--out", "out"],
        ["--overlap", "nowhere"],
    ],
    "prepare_images": [[], ["nowhere", "out", "--size=8"], ["classes", "out"], ["classes", "out", "--size=x"]],
    "promote": [[], ["--artifact=a:b", "--collection=c"]],
    "prune": [
        [],
        [*NEEDS_MODEL, "--target=macs=0.5", "--out=out"],
        ["--preset=digits", "--target=channels=0.001", "--out=out"],
        ["--preset=digits", "--target=macs", "--out=out"],
        ["--preset=", "--target=macs=0.5", "--out=out"],
        ["--preset=digits", "--target=macs=0.5", "--out=out", "--importance=zzz"],
        ["--preset=digits", "--target=macs=0.5", "--out=file/out"],
    ],
    "sample_images": [
        [],
        [*NEEDS_MODEL, "--out=out"],
        [*NEEDS_MODEL, "--out=out", "--gif", "--num-images=0"],
        [*NEEDS_MODEL, "--out=out", "--mode=zzz"],
        [*NEEDS_MODEL, "--out="],
    ],
    "train_cifar": [["--train.lrr=1"], ["--dryrun"], ["--data.name=folder", "--data.path=nowhere"]],
    "train_classifier": [[], ["--recipe=cpu"], ["--train.lr=1"], ["--data.name=folder", "--data.path=nowhere"],
                         ["--data.name=folder", "--data.path=nowhere", "--out=out/c.safetensors"]],
}  # fmt: skip
"""Words of each command that it refuses."""

LONG = "x" * 300
"""A name that no file system takes."""
UNWRITABLE = "/proc"
"""A folder that not even an administrator can write to."""
WRONG_SEEDS = ("-1", str(2**63), "1e3", "x")

PLACES: dict[str, list[list[str]]] = {
    "agent.leaderboard": [["nowhere", "--out=file"], ["nowhere", "--out="], ["nowhere", f"--out={UNWRITABLE}"],
                          ["--project="]],
    "agent.clean": [["--project="]],
    "agent.report": [["empty", "--out="], ["empty", "--out=file/page.html"], ["empty", f"--out={LONG}"]],
    "agent.sweep": [["--attach="], ["sweep.yaml", "--offline", "--out=file"], ["sweep.yaml", "--offline", "--out="]],
    "benchmark": [["ema", "--short", "--out=empty"], ["ema", "--out="], ["ema", "--out=file/out.json"],
                  ["ema", f"--out={UNWRITABLE}/x.json"]],
    "check_formulations": [["--out=file"], ["--out="]],
    "compare_formulations": [["--out=file"], ["--out="]],
    "compare_pruning": [["--out=file"], ["--out="]],
    "compare_tickets": [["--out=file"], ["--out=file/out"], *([f"--per-round={share}"] for share in ("1", "1.5", "0")),
                        [f"--seeds=0,{2**63}"]],
    "evaluate": [["--checkpoint=a", "--json="], ["--checkpoint=a", "--json=empty"], ["empty", "--json=file/out.json"],
                 *(["--checkpoint=a", f"--json={file}"] for file in (LONG, f"{UNWRITABLE}/x.json")),
                 *(["--save-stats", "empty", file] for file in ("", "empty", "file", LONG, f"{UNWRITABLE}/x.npz")),
                 ["--save-stats", "a.npz", "b.npz"],
                 *(["--checkpoint=a", f"--seed={seed}"] for seed in WRONG_SEEDS)],
    "sample_images": [*([*NEEDS_MODEL, f"--out={place}"] for place in (LONG, UNWRITABLE)),
                      *([*NEEDS_MODEL, "--out=out", f"--seed={seed}"] for seed in WRONG_SEEDS),
                      *([*NEEDS_MODEL, "--out=out", "--mode=interpolate", f"--seeds={seeds}"]
                        for seeds in ("0", "0,1,2", *(f"0,{seed}" for seed in WRONG_SEEDS)))],
    "export_model": [[*NEEDS_MODEL, "--out="], [*NEEDS_MODEL, "--out=file"]],
    "gpu_check": [["--out=empty"], ["--out="], [f"--out={UNWRITABLE}/x.json"]],
    "lottery_ticket": [["--overlap", "a", "b", "--out=file"]],
    "prune": [
        ["--preset=digits", "--target=macs=0.5", "--out=file"],
        ["--preset=digits", "--target=macs=0.5", "--out="],
    ],
    "train_classifier": [["--data.name=digits", "--out=empty"], ["--data.name=digits", "--out="],
                         *(["--data.name=digits", f"--out={file}"] for file in (LONG, f"{UNWRITABLE}/x"))],
}  # fmt: skip
"""Words that name no place to write to: a file for a folder, a folder for a file, nothing, a place that cannot be
written; and shares and seeds out of range."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with some wrong files, without an account."""
    folder = tmp_path / "work"
    for name, content in FILES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(folder / "none"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return folder


def test_every_command_refuses_something() -> None:
    assert set(REFUSED) == set(COMMANDS)


@pytest.mark.parametrize(
    ("name", "words"),
    [(name, words) for name, calls in [*REFUSED.items(), *PLACES.items()] for words in calls],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_it_is_refused_in_one_form_and_leaves_nothing(
    name: str, words: list[str], place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = tree(place)
    assert run_command(name, *words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines
    assert all(LINE.fullmatch(line) for line in lines), err
    assert len(lines) == 1 or name == "agent.sweep"
    assert tree(place) == before


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["agent", "--preset=digits", "--dryrun"], "did you mean --dry-run?"),
        (["agent", "--preset=digits", "--printconfig"], "did you mean --print-config?"),
        (["agent", "--help", "trian"], "did you mean train?"),
        (["agent", "--config", "sweep.yaml"], "python -m agent.sweep sweep.yaml"),
        (["agent.sweep", "quickstart.yaml"], "did you mean sweeps/quickstart.yaml?"),
        (["agent.sweep", "sweeps/quikstart.yaml"], "did you mean sweeps/quickstart.yaml?"),
        (["agent.sweep", "values.yaml"], "python -m agent --config values.yaml"),
        (["agent.sweep", "sweep.yaml", "--dryrun"], "did you mean --dry-run?"),
        (["agent.clean", "--yess"], "did you mean --yes?"),
        (["agent"], "--preset=digits"),
        (["lottery_ticket", "--out", "x"], "--preset=digits"),
        (["train_classifier", "--recipe=cpu"], "--data.name=digits"),
        (["agent", "--preset=digits", "--train.steps=1.5e0"], "expected an integer"),
        (["agent", "--preset=digits", "--train.batch_size=1.5e0"], "expected an integer"),
        (["evaluate", "--checkpoint=a", f"--json={LONG}"], "--json = 'xxx"),
        (["evaluate", "--checkpoint=a", f"--json={UNWRITABLE}/x"], "--json = '/proc/x': expected a file that can be"),
        (["evaluate", "--save-stats", "empty", f"{UNWRITABLE}/x"], "PATH2 = '/proc/x': expected a file that can be"),
        (["sample_images", *NEEDS_MODEL, f"--out={UNWRITABLE}"], "--out = '/proc': expected a folder that can be"),
        *(
            ([name, *NEEDS_MODEL, f"--seed={seed}"], f"--seed = {seed!r}: expected an integer >= 0 and < ")
            for name in ("evaluate", "sample_images")
            for seed in WRONG_SEEDS
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
@pytest.mark.usefixtures("place")
def test_a_refusal_says_what_to_type(words: list[str], hint: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(*words) == 2
    assert hint in capfd.readouterr().err


# Dry runs.


def dry(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    capfd.readouterr()
    assert run_command("agent", *words, "--dry-run") == 0, capfd.readouterr().err
    return capfd.readouterr().out


def test_a_dry_run_looks_at_the_data_and_the_checkpoint(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It says the size of the network that the run starts with, and where it goes on."""
    for label in ("cat", "dog", "owl"):
        for number in range(4):
            file = place / "animals" / label / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(file)
    words = [*WORDS, "--data.name=folder", "--data.path=animals", "--data.image_size=8", "--eval.classifier=none"]
    words += ["--train.steps=2", "--sample.every=0"]
    (place / "animals" / "notes.txt").touch()
    before = tree(place)
    whole = dry(capfd, *words)
    assert "# start: new weights\n" in whole
    assert tree(place) == before

    assert run_command("agent", *words, "--log.dir=dense") == 0
    images, rest = [line for line in capfd.readouterr().err.splitlines() if line.startswith("data: ")]
    assert images.startswith("data: folder 'animals': 9 images for training, 3 held out (")
    assert (f"# {images}\n# {rest}\n" in whole, rest) == (True, "data: passed over: 1 .txt")
    params = {"dense": params_of(place / "dense")}
    assert f"# model: {params['dense']:,} parameters" in whole
    pruning = ["--checkpoint", "dense", "--target", "params=0.4", "--out", "half", "--num-images=0"]
    assert run_command("prune", *pruning) == 0
    params["half"] = params_of(place / "half")
    assert params["half"] < 0.5 * params["dense"]
    before = tree(place)
    assert f"# model: {params['half']:,} parameters" in dry(capfd, *words, "--init.checkpoint=half")
    assert "# start: continues from 'dense/checkpoints/step-" in dry(capfd, *words, "--log.dir=dense")
    for wrong, key in (
        (["--init.checkpoint=half", "--model.channels=16"], "model.channels = 16"),
        (["--distill.checkpoint=half", "--distill.output=1", "--model.channels=16"], "model.channels = 16"),
        (["--log.dir=dense", "--train.lr=0.5"], "train.lr = 0.5"),
        (["--log.dir=dense", "--checkpoint.resume=false"], "checkpoint.resume = False"),
    ):
        for only_dry in (["--dry-run"], []):
            capfd.readouterr()
            assert run_command("agent", *words, *wrong, *only_dry) == 2
            assert capfd.readouterr().err.startswith(f"error: {key}: "), wrong
    assert tree(place) == before


def params_of(folder: Path) -> int:
    from diffusion_core.checkpoint import newest_checkpoint, read_checkpoint

    checkpoint = newest_checkpoint(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
    tensors = (checkpoint or read_checkpoint(folder)).tensors("ema")
    return sum(tensor.numel() for tensor in tensors.values())


def test_the_summary_of_a_dry_run_is_last_and_short(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--preset=digits", "--train.steps=1e2", "--model.channel_multipliers=1,2,2"]
    lines = dry(capfd, *words).splitlines()
    assert set(lines[1:4]) == {"train.steps: 100", "model.channel_multipliers: [1, 2, 2]", "preset: digits"}
    assert [line.partition(":")[0] for line in lines[4:]] == ["# data", "# start", "# model", "# checkpoint"]
    everything = dry(capfd, *words, "--print-config")
    assert everything.count("\n") > 100
    assert everything.splitlines()[-2:] == lines[-2:]


@pytest.mark.parametrize("words", [["--print-config"], ["--dry-run"], ["--dry-run", "--print-config"]])
def test_no_secret_is_printed(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    address = "https://someone:hunter2secret@example.org/data"
    assert run_command("agent", "--preset=digits", f"--log.dir={address}", *words) in (0, 2)
    out, err = capfd.readouterr()
    assert "hunter2secret" not in out + err


def test_nothing_is_on_wandb_of_a_run_that_is_refused(tmp_path: Path) -> None:
    """With an account, too, all checks come before the run."""
    with WandbServer() as server:
        client = Client(server, tmp_path)
        words = ["--preset=digits", "--init.checkpoint=nowhere", "--train.steps=2"]
        said = finish(client.popen(client.interpreter, "-m", "agent", *words, WANDB_MODE="online"), code=2)
        assert said.splitlines()[-1].startswith("error: init.checkpoint = 'nowhere': ")
        assert not server.runs
        assert not (tmp_path / "runs").exists()


def test_clean_says_that_it_found_nothing(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command("agent.clean", "empty") == 0
    assert capfd.readouterr() == ("", "empty: nothing to remove\n")
