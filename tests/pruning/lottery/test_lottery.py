"""Lottery tickets: levels, masks, rewinding, controls, and the chain that can be killed anywhere."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lottery_ticket
import pytest
import torch
from PIL import Image
from tiny import NUM_CLASSES, assert_same_tensors, digits, one_line, tiny_config

from agent.config import TrialConfig, build_config
from agent.lottery import run_chain
from agent.trial import TrialResult, run_trial
from diffusion_core.checkpoint import CheckpointError, read_checkpoint
from diffusion_core.config import ConfigError, flatten
from diffusion_core.distributed import make_accelerator
from diffusion_core.model.structure import maskable
from diffusion_core.model.unet import UNet
from diffusion_core.run_folder import read_history
from diffusion_core.tracking import MemoryTracker, Tracker
from diffusion_core.training.stopping import Stopped
from diffusion_core.training.trainer import TrainState
from pruning.config import PruneConfig
from pruning.lottery.report import plot_overlap, read_stages, ticket_masks
from pruning.lottery.tickets import (
    chance_overlap,
    most_rounds,
    overlap,
    random_mask,
    reinitialised,
    remaining,
    rewound,
    ticket,
)
from pruning.masks.mask import MASKS_PART, WeightMasks, counts, masked

ROOT = Path(__file__).parents[3]
ROUNDS = 3
CPU = torch.device("cpu")


def config(folder: Path | None = None, **changes: Any) -> TrialConfig:
    """A chain on the tiny network: 6 steps a round, rewound to step 2."""
    more = {
        "train.steps": 6,
        "train.lr": 3e-3,
        "train.lr_schedule": "cosine",
        "train.weight_decay": 0.1,
        "ema.power_widths": [0.1],
        "ema.average_from": 1,
        "eval.classifier": "none",
        "checkpoint.every": 2,
        "sample.steps": 2,
        "sample.every": 0,
        "eval.every": 0,
        "prune.method": "lottery",
        "prune.rounds": ROUNDS,
        "prune.per_round": 0.4,
        "prune.rewind_step": 2,
    }
    return build_config(flatten(tiny_config()), more, {"log.dir": str(folder)} if folder else {}, changes)


class Trackers:
    """The tracker of every round, by run id."""

    def __init__(self) -> None:
        self.rounds: dict[str, MemoryTracker] = {}

    def __call__(self, run_id: str, _folder: Path, _config: TrialConfig) -> Tracker:
        return self.rounds.setdefault(run_id, MemoryTracker())


def chain(folder: Path, trackers: Trackers | None = None, stop: Any = None, **changes: Any) -> TrialResult:
    return run_chain(
        config(**changes),
        MemoryTracker(),
        dataset=digits(),
        folder=folder,
        run_id="c",
        stop=stop,
        open_tracker=trackers or Trackers(),
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished chain, and then both of its controls."""
    folder = tmp_path_factory.mktemp("chain")
    for control in ("none", "reinit", "random_mask"):
        changes: dict[str, Any] = {"prune.control": control}
        chain(folder, **changes)
    return folder


def networks() -> list[UNet]:
    """All networks that are alive in this process."""
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is UNet]


@pytest.mark.parametrize("method", ["lottery", "structured", "magnitude", "none"])
def test_no_network_outlives_its_training(tmp_path: Path, method: str) -> None:
    """A process that trains many networks, as a chain and the comparing scripts do, does not grow."""
    before = weakref.WeakSet(networks())
    seen: list[int] = []
    accelerator = make_accelerator(config().train)
    if method == "lottery":

        class Counting(Trackers):
            def __call__(self, *round_of: Any) -> Tracker:  # When a round begins, nothing of the one before is left.
                seen.append(len([network for network in networks() if network not in before]))
                return super().__call__(*round_of)

        changes: dict[str, Any] = {"prune.rounds": 2}
        run_chain(config(**changes), MemoryTracker(), dataset=digits(), folder=tmp_path, run_id="c",
                  accelerator=accelerator, open_tracker=Counting())  # fmt: skip
        assert seen == [0, 0, 0]
    else:
        plain = build_config(flatten(config()), {"prune.method": method, "prune.rounds": 35, "prune.per_round": 0.2,
                                                 "prune.rewind_step": 0})  # fmt: skip
        run_trial(plain, MemoryTracker(), dataset=digits(), folder=tmp_path, run_id="t", accelerator=accelerator)
    assert [network for network in networks() if network not in before] == []


def masks_of(folder: Path, stage: str) -> WeightMasks:
    return ticket_masks(read_checkpoint(folder / "rounds" / stage))


def begin(folder: Path, stage: str, masks: WeightMasks) -> TrainState:
    """The state that a stage began with, made again by the product from what is on disk."""
    if stage.endswith("reinit"):
        return reinitialised(masks, NUM_CLASSES, config(), CPU)
    return rewound(read_checkpoint(folder / "rewind"), masks, config(), CPU)


# Levels and masks.


def test_levels_are_the_share_of_what_is_left_exact_to_one_weight() -> None:
    assert remaining(0, 0.2) == 1.0
    assert remaining(35, 0.2) == pytest.approx(0.8**35)
    weights = {"a": torch.randn(40, 25), "b": torch.randn(7, 3)}
    masks = None
    for number in range(1, 12):
        before = masks
        masks = ticket(weights, masks, number, PruneConfig(method="lottery"))
        assert sum(counts(masks).values()) == 1021 - round((1 - 0.8**number) * 1021)
        if before is not None:
            assert all(not (masks[name] & ~before[name]).any() for name in masks)
    once = ticket(weights, None, 1, PruneConfig(method="lottery", per_round=0.8))  # One shot is a chain of one round.
    assert sum(counts(once).values()) == 1021 - round(0.8 * 1021)
    assert most_rounds(1021, 0.2) == max(n for n in range(60) if 1021 - round((1 - 0.8**n) * 1021) >= 1)


def test_a_random_mask_has_as_many_weights_in_each_layer() -> None:
    given = {"a": torch.rand(40, 25) < 0.3, "b": torch.rand(7, 3) < 0.8}
    drawn = random_mask(given, 0)
    assert counts(drawn) == counts(given)
    assert not torch.equal(drawn["a"], given["a"])
    assert torch.equal(drawn["a"], random_mask(given, 0)["a"])
    assert not torch.equal(drawn["a"], random_mask(given, 1)["a"])
    expected = [overlap(drawn, random_mask(given, seed))["all"] for seed in range(1, 60)]
    assert sum(expected) / 59 == pytest.approx(chance_overlap(given, given)["all"], abs=0.01)


def test_overlap_is_the_jaccard_index() -> None:
    first = {"down.0.conv": torch.tensor([[True, True, False, False]]), "middle.0": torch.tensor([[True, False]])}
    second = {"down.0.conv": torch.tensor([[True, False, True, False]]), "middle.0": torch.tensor([[True, False]])}
    assert overlap(first, second) == {"all": 2 / 4, "down.0": 1 / 3, "middle": 1.0}
    assert overlap(first, first) == {"all": 1.0, "down.0": 1.0, "middle": 1.0}
    with pytest.raises(ValueError, match="not of the same network") as caught:
        overlap(first, {"middle.0": second["middle.0"]})
    one_line(caught.value)


def test_masks_come_off_and_leave_the_dense_weights_bit_for_bit(done: Path) -> None:
    network = read_checkpoint(done / "rewind").network("model")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    masks = masks_of(done, "03")
    with masked(network, masks):
        for name, weight in maskable(network).items():
            assert torch.equal(weight, before[name] * masks[name])
    assert_same_tensors(dict(network.state_dict()), before)
    with pytest.raises(ValueError, match="not those of this network"), masked(network, {}):
        pass
    # And a chain rewound without pruning anything is the dense training, in every part.
    full = {name: torch.ones_like(mask) for name, mask in masks.items()}
    state = begin(done, "01", full)
    early = read_checkpoint(done / "rewind")
    for part in early.parts:
        assert_same_tensors(dict(state.parts()[part]), early.tensors(part))


# The chain.


def test_each_round_starts_from_the_rewound_weights_times_its_mask(done: Path) -> None:
    early = read_checkpoint(done / "rewind")
    assert early.step == 2
    for stage in ("01", "02", "03", "03-random-mask"):
        masks = masks_of(done, stage)
        state = begin(done, stage, masks)
        assert state.step == 2
        assert state.ema.updates == early.metadata["ema_updates"]
        for part in early.parts:  # Weights, all averages, both moments.
            ours, theirs = state.parts()[part], early.tensors(part)
            for name, tensor in theirs.items():
                weight = name.rpartition(":")[0] if part == "optimizer" else name
                expected = tensor * masks[weight] if weight in masks and tensor.ndim else tensor
                assert torch.equal(ours[name], expected), f"{stage} {part} {name}"


def test_rounds_prune_exactly_what_they_should_and_checkpoints_hold_it(done: Path) -> None:
    total = sum(mask.numel() for mask in masks_of(done, "01").values())
    for number in range(1, ROUNDS + 1):
        masks = masks_of(done, f"{number:02d}")
        assert sum(counts(masks).values()) == total - round((1 - 0.6**number) * total)
        before = read_checkpoint(done / "rounds" / f"{number - 1:02d}")
        weights = maskable(before.network("model"))
        kept = torch.cat([weights[name].abs()[mask] for name, mask in masks.items()])
        gone = torch.cat([weights[name].abs()[~mask] for name, mask in masks.items()])
        assert gone.max() <= kept.min()  # The smallest of what the round before trained.
    for stage in ("01", "03", "03-reinit", "03-random-mask"):
        for path in (done / "rounds" / stage / "checkpoints").glob("step-*"):
            checkpoint = read_checkpoint(path)
            masks = ticket_masks(checkpoint)
            for part in ("model", "ema", "ema-power0_1", "ema-average"):
                tensors = checkpoint.tensors(part)
                assert all(not tensors[name][~mask].any() for name, mask in masks.items()), f"{path} {part}"


def test_controls_differ_from_the_ticket_in_one_thing(done: Path) -> None:
    won, reinit, shuffled = (masks_of(done, f"03{control}") for control in ("", "-reinit", "-random-mask"))
    assert all(torch.equal(won[name], reinit[name]) for name in won)
    assert counts(shuffled) == counts(won)
    assert overlap(won, shuffled)["all"] < 0.5
    state = begin(done, "03-reinit", reinit)
    dense = TrainState.start(begin(done, "01", won).network, config().train, config().ema)
    assert state.step == 0
    assert not state.optimizer.state
    name = "middle.0.conv1.weight"
    assert not torch.equal(maskable(state.network)[name], maskable(dense.network)[name] * won[name])
    records = [read_checkpoint(done / "rounds" / stage).metadata["extra"]["pruning"] for stage in ("03", "03-reinit")]
    assert [(r[0]["method"], r[0]["step"], r[0]["knobs"]["control"]) for r in records] == [
        ("lottery", 2, "none"),
        ("lottery", 0, "reinit"),
    ]


class StopAt:
    """Stands for a signal that comes at the n-th training step of a process."""

    def __init__(self, count: int) -> None:
        self.left = count

    def check(self, _state: TrainState, _row: dict[str, Any]) -> None:
        self.left -= 1
        if not self.left:
            raise Stopped(15)


def test_stopped_in_any_round_it_goes_on_and_ends_the_same(done: Path, tmp_path: Path) -> None:
    trackers = Trackers()
    for steps in (1, 7, 3):  # In the first round, in the next one, and in the one after.
        with pytest.raises(Stopped):
            chain(tmp_path, trackers, StopAt(steps))
    rounds = sorted(path.name for path in (tmp_path / "rounds").iterdir() if (path / "result.json").is_file())
    assert rounds == ["00", "01"]
    kept = [path.stat().st_mtime_ns for path in sorted((tmp_path / "rounds" / "00").rglob("*.json"))]
    result = chain(tmp_path, trackers)
    assert kept == [path.stat().st_mtime_ns for path in sorted((tmp_path / "rounds" / "00").rglob("*.json"))]
    for stage in ("00", "03"):
        ours, theirs = (read_checkpoint(folder / "rounds" / stage) for folder in (tmp_path, done))
        for part in theirs.parts:
            assert_same_tensors(ours.tensors(part), theirs.tensors(part))
    assert [kind for kind, _ in trackers.rounds["c-00"].used] == ["dataset"]
    assert trackers.rounds["c-02"].used[-2:] == [
        ("training-state", "training-state-c-01:latest"),
        ("training-state", "training-state-c-rewind:latest"),
    ]
    assert trackers.rounds["c-03"].exit_code == 0
    names = {artifact["name"] for artifact in trackers.rounds["c-00"].artifacts}
    assert names == {"model-c-00", "training-state-c-00", "model-c-rewind", "training-state-c-rewind"}
    # The chain's own folder reads like a trial's.
    assert result.best_checkpoint.parent == tmp_path / "rounds" / "03" / "checkpoints"
    rows = read_history(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["lottery/remaining"] for row in rows] == pytest.approx([1.0, 0.6, 0.36, 0.216])
    assert [("val/loss" in row, "lottery/val/loss" in row) for row in rows] == [(False, True)] * 3 + [(True, True)]
    assert json.loads((tmp_path / "result.json").read_text())["figures"]["val/loss"] == rows[-1]["val/loss"]
    assert result.figures["prune/sparsity"] == pytest.approx(1 - 0.6**3, abs=1e-3)


def untouched(folder: Path) -> Callable[[], bool]:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    return lambda: before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prune.per_round": 0.3}, "prune.per_round = 0.3: the run in"),
        ({"prune.scope": "layer"}, "prune.scope = 'layer': the run in"),
        ({"train.lr": 1e-3}, "train.lr = 0.001: the run in"),
        ({"prune.rounds": 900}, "prune.rounds = 900: with prune.per_round = 0.4, none of"),
    ],
)
def test_another_chain_is_refused_and_nothing_changes(done: Path, changes: dict[str, Any], expected: str) -> None:
    same = untouched(done)
    with pytest.raises(ConfigError) as caught:
        chain(done, **changes)
    assert expected in one_line(caught.value)
    assert same()


def test_a_step_that_was_not_kept_is_refused(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chain"
    shutil.copytree(done, folder, ignore=shutil.ignore_patterns("01", "02", "03*"))
    same = untouched(folder)
    changes: dict[str, Any] = {"prune.rewind_step": 1}
    with pytest.raises(ConfigError, match=r"prune.rewind_step = 1: the chain in .* did not keep that step") as caught:
        chain(folder, **changes)
    one_line(caught.value)
    assert same()


def test_masks_of_another_shape_are_refused(done: Path) -> None:
    other = tiny_config(model__channels=4)
    masks = {name: mask[:1] for name, mask in masks_of(done, "01").items()}
    with pytest.raises(ValueError, match="not those of this network"):
        reinitialised(masks, NUM_CLASSES, other, CPU)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("prune.rounds=0", "prune.rounds = '0': expected an integer >= 1 and <= 1000"),
        ("prune.per_round=1", "prune.per_round = '1': expected a number > 0 and < 1"),
        ("prune.rewind_step=500", "prune.rewind_step = 500: expected less than train.steps = 500"),
        ("prune.control=redraw", "prune.control = 'redraw': expected one of none, reinit, random_mask"),
        ("prune.keep=0.1", "prune.keep = 0.1: has no effect with prune.method=lottery"),
        ("prune.profile=erk", "prune.profile = 'erk': has no effect with prune.scope=auto"),
    ],
)
def test_the_script_refuses_in_one_line_and_writes_nothing(
    word: str, expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "chain"
    assert lottery_ticket.main(["--preset=digits", f"--{word}", f"--out={out}"]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_the_script_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert lottery_ticket.main(["--help", "all"]) == 0
    text = capsys.readouterr().out
    for word in ("--out DIR", "prune.control=reinit", "Frankle & Carbin 2019", "--prune.rounds=35", "--overlap"):
        assert word in text
    assert lottery_ticket.main(["--preset=digits", "--print-config", "--out", "x"]) == 0
    assert "prune.method: lottery" in (text := capsys.readouterr().out)
    assert "log.dir: x" in text


# What comes of it.


def test_summary_and_plots(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = read_stages(done)
    assert [(stage.round_number, stage.kind) for stage in stages] == [
        *((number, "ticket") for number in range(ROUNDS + 1)),
        (ROUNDS, "random mask"),
        (ROUNDS, "random reinitialisation"),
    ]
    total = sum(mask.numel() for mask in masks_of(done, "01").values())
    assert [stage.remaining for stage in stages[:4]] == pytest.approx(
        [1 - round((1 - 0.6**n) * total) / total for n in range(4)]
    )
    assert all(stage.figures["val/loss"] > 0 for stage in stages)
    lines = (done / "summary.md").read_text().splitlines()
    assert lines[0].startswith("| round | trained | remaining | validation loss | time_mlp | conv_in | down.0 |")
    assert len([line for line in lines if line.startswith("| ")]) == 1 + len(stages)
    for name in ("quality-val-loss.png", "blocks.png"):
        with Image.open(done / name) as picture:
            assert picture.size[0] > 600
    first, second = str(done / "rounds" / "03"), str(done / "rounds" / "03-random-mask")
    assert lottery_ticket.main(["--overlap", first, second, "--out", str(tmp_path / "o")]) == 0
    shares = dict(line.split() for line in capsys.readouterr().out.splitlines())
    expected = overlap(masks_of(done, "03"), masks_of(done, "03-random-mask"))
    assert {name: float(share) for name, share in shares.items()} == pytest.approx(expected, abs=1e-4)
    assert (tmp_path / "o" / "overlap.png").is_file()
    assert lottery_ticket.main(["--overlap", first, str(done / "rounds" / "00"), "--out", str(tmp_path / "p")]) == 2
    assert "no masks here" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not of the same network"):
        plot_overlap(masks_of(done, "03"), {}, ("a", "b"), tmp_path / "p")
    with pytest.raises(CheckpointError, match="no masks here"):
        ticket_masks(read_checkpoint(done / "rounds" / "00"))
    assert not (tmp_path / "p").exists()
    assert MASKS_PART not in read_checkpoint(done / "rounds" / "00").parts


# Several processes.

AGREE = """
import sys, torch
from pruning.masks.mask import agreed
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
mine = {"a": torch.tensor([rank == 0, True, False]), "b": torch.full((2, 2), rank == 1)}
print({name: mask.tolist() for name, mask in agreed(mine).items()})
torch.distributed.destroy_process_group()
"""


def test_two_processes_agree_on_the_masks_of_the_first(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", AGREE, str(rank), str(tmp_path / "meet")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0].strip() for process in processes]
    assert said == ["{'a': [True, True, False], 'b': [[False, False], [False, False]]}"] * 2
