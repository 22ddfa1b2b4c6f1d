"""A row of figures spans a stop: the steps before the checkpoint count as those after it, bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import cpu, digits, tiny_batches, tiny_config, tiny_state

from diffusion_core.checkpoint import METADATA_FILE, CheckpointError, read_checkpoint, write_checkpoint
from diffusion_core.config import CoreConfig
from diffusion_core.training.checkpoints import describe
from diffusion_core.training.sums import RowSums
from diffusion_core.training.trainer import TrainState, train

STEPS = 9
SMALL: dict[str, Any] = {"model__channel_multipliers": [1], "model__attention_resolutions": [], "train__batch_size": 2}


class Stop(Exception):
    pass


def rows_of(config: CoreConfig, folder: Path, stops: list[int]) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a run that is saved and stopped after some steps, each part with nothing but the checkpoint."""
    rows: list[tuple[int, dict[str, Any]]] = []
    state = tiny_state(config)
    for stop in [*stops, STEPS]:

        def after_step(state: TrainState, row: dict[str, Any], stop: int = stop) -> None:
            if row:
                rows.append((state.step, dict(row)))
            if state.step == stop:
                write_checkpoint(folder, state.step, describe(state, config, digits().class_names), state.parts())
                raise Stop

        with pytest.raises(Stop):
            train(state, tiny_batches(config), config, [after_step], accelerator=cpu())
        state = TrainState.restore(read_checkpoint(folder), config.train, config.ema, torch.device("cpu"))
    return rows


def without_speed(rows: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    return [(step, {key: row[key] for key in row if key != "train/images_per_second"}) for step, row in rows]


@pytest.mark.parametrize(("every", "stops"), [(3, [1, 2, 3]), (7, [1, 6, 7, 8])])
def test_rows_are_those_of_the_unbroken_run(every: int, stops: list[int], tmp_path: Path) -> None:
    """Stopped after the first step of a row, before its last one and after it, in the row after that, and always."""
    config = tiny_config(train__steps=STEPS, log__every=every, **SMALL)
    unbroken = rows_of(config, tmp_path / "unbroken", [])
    assert [step for step, _ in unbroken] == {3: [3, 6, 9], 7: [7, 9]}[every]
    for stop in stops:
        assert without_speed(rows_of(config, tmp_path / f"{stop}", [stop])) == without_speed(unbroken), stop
    everywhere = rows_of(config, tmp_path / "everywhere", list(range(1, STEPS)))
    assert without_speed(everywhere) == without_speed(unbroken)


def test_speed_counts_the_steps_and_the_time_before_the_stop(tmp_path: Path) -> None:
    """The time that a checkpoint names counts as the time after it, and callbacks do not."""
    config = tiny_config(train__steps=STEPS, log__every=STEPS)
    state = tiny_state(config)
    assert state.since_row.stored() == {"steps": 0, "seconds": 0.0, "sums": []}

    def save(state: TrainState, row: dict[str, Any]) -> None:
        if state.step == 4:
            metadata = describe(state, config, digits().class_names)
            assert metadata["since_row"]["steps"] == 4
            assert metadata["since_row"]["seconds"] > 0
            metadata["since_row"]["seconds"] = 1000.0
            write_checkpoint(tmp_path, state.step, metadata, state.parts())

    train(state, tiny_batches(config), config, [save], accelerator=cpu())
    state = TrainState.restore(read_checkpoint(tmp_path), config.train, config.ema, torch.device("cpu"))
    rows: list[dict[str, Any]] = []
    train(state, tiny_batches(config), config, [lambda _, row: rows.append(row)], accelerator=cpu())
    assert rows[-1]["train/images_per_second"] == pytest.approx(STEPS * config.train.images_per_step / 1000, rel=0.05)


def test_a_checkpoint_without_sums_is_resumed(tmp_path: Path) -> None:
    """As older versions wrote them: the next row is of the steps since then."""
    config = tiny_config(train__steps=STEPS, log__every=7)
    rows_of(config, tmp_path, [4])
    file = tmp_path / "step-00000004" / METADATA_FILE
    content = json.loads(file.read_text())
    assert content.pop("since_row")["steps"] == 4
    file.write_text(json.dumps(content))
    state = TrainState.restore(read_checkpoint(file.parent), config.train, config.ema, torch.device("cpu"))
    rows: list[dict[str, Any]] = []
    train(state, tiny_batches(config), config, [lambda _, row: rows.append(row)], accelerator=cpu())
    every = [row for _, row in rows_of(tiny_config(train__steps=STEPS, log__every=1), tmp_path / "each", [])]
    assert rows[2]["train/loss"] == pytest.approx(sum(row["train/loss"] for row in every[4:7]) / 3, rel=1e-5)


@pytest.mark.parametrize(
    "damaged",
    [7, [], {"steps": 1}, {"steps": -1, "seconds": 1.0, "sums": [[1, 2]]}, {"steps": 1, "seconds": 1.0, "sums": [[1]]},
     {"steps": 2, "seconds": 1.0, "sums": []}, {"steps": "x", "seconds": 1.0, "sums": []},
     {"steps": 1, "seconds": "nan", "sums": [[1, 2]]}],
)  # fmt: skip
def test_damaged_sums_are_refused_in_one_line(damaged: Any, tmp_path: Path) -> None:
    config = tiny_config()
    state = tiny_state(config)
    metadata = describe(state, config, digits().class_names) | {"since_row": damaged}
    write_checkpoint(tmp_path, 0, metadata, state.parts())
    with pytest.raises(CheckpointError, match=r"^'.*step-00000000': since_row: .*; take another checkpoint$"):
        TrainState.restore(read_checkpoint(tmp_path), config.train, config.ema, torch.device("cpu"))


def test_sums_survive_json_to_the_bit_also_where_they_are_not_finite() -> None:
    sums = RowSums()
    for loss, norm in ((0.1, 1e-45), (1 / 3, 3.4e38)):
        sums.add(torch.tensor(loss), torch.tensor(norm))
    again = RowSums.restored(json.loads(json.dumps(sums.stored(), allow_nan=False)))
    again.place(cpu())
    assert torch.equal(again.means(), sums.means())
    assert again.steps == 2
    sums.add(torch.tensor(math.nan), torch.tensor(math.inf))
    again = RowSums.restored(json.loads(json.dumps(sums.stored(), allow_nan=False)))
    again.place(cpu())
    assert again.means().isnan().tolist() == [True, False]  # The next row still ends a run that diverged.


def test_another_number_of_processes_continues_with_the_mean() -> None:
    again = RowSums.restored({"steps": 2, "seconds": 1.0, "sums": [[1.0, 3.0], [2.0, 5.0]]})
    again.place(cpu())
    assert again.means().tolist() == [0.75, 2.0]
