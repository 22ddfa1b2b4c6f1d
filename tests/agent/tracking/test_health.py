"""Alerts, facts about a trial, and why it was told to stop."""

from __future__ import annotations

import hashlib
import math
import re
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import digits, tiny_config, tiny_state

from diffusion_core.data.datasets import Dataset
from diffusion_core.tracking import MemoryTracker
from diffusion_core.training import summary
from diffusion_core.training.callbacks import REGRESSION, WatchQuality, is_regression
from diffusion_core.training.stopping import Stopped, StopRequest


@pytest.mark.parametrize(
    ("metric", "value", "best", "worse"),
    [
        ("val/loss", 0.2, 0.1, True),
        ("val/loss", 0.15, 0.1, False),
        ("val/loss", 0.05, 0.1, False),
        ("val/loss", 1.0, 0.0, False),  # Of nothing there is no multiple.
        ("eval/class_agreement", 0.7, 0.95, True),
        ("eval/class_agreement", 0.75, 0.95, False),
        ("eval/class_agreement", 1.0, 0.95, False),
        ("val/loss", math.nan, 0.1, True),
        ("val/loss", math.inf, 0.1, True),
    ],
)
def test_what_counts_as_a_regression(metric: str, value: float, best: float, worse: bool) -> None:
    assert is_regression(metric, value, best) == worse


def test_a_regression_is_told_once() -> None:
    tracker = MemoryTracker()
    watch = WatchQuality("val/loss", [], tracker)
    state = tiny_state(tiny_config())
    for step, row in enumerate([{"val/loss": 0.9}, {}, {"val/loss": 0.5}, {"val/loss": 0.6}, {"dense/val/loss": 9.0}]):
        state.step = step
        watch(state, row)
    assert tracker.alerts == []
    for step in (8, 9):
        state.step = step
        watch(state, {"val/loss": 0.9})
    assert tracker.alerts == [(REGRESSION, "val/loss = 0.9 at step 8; it was 0.5")]


def test_quality_is_compared_within_a_stage_of_step_distillation() -> None:
    """A student of fewer steps is worse than the one before, and that is no regression."""
    tracker = MemoryTracker()
    past = [{"step": 1, "train/loss": 0.1}, {"step": 2, "train/loss": 0.1}, {"step": 3, "train/loss": 0.5}]
    watch = WatchQuality("train/loss", past, tracker)
    state = tiny_state(tiny_config())
    for step, start, loss in ((4, 2, 0.6), (5, 2, 0.7), (6, 5, 2.0), (7, 5, 1.9), (8, 5, 2.8)):
        state.step, state.extra_metadata["steps"] = step, {"start": start}
        watch(state, {"train/loss": loss})
    assert tracker.alerts == []
    state.step = 9
    watch(state, {"train/loss": 2.9})
    assert tracker.alerts == [(REGRESSION, "train/loss = 2.9 at step 9; it was 1.9")]


def test_equal_data_have_equal_fingerprints() -> None:
    data = digits()
    fingerprint = data.sha256
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    assert replace(data).sha256 == fingerprint
    images = data.train.images_NCHW.clone()
    images[0, 0, 0, 0] += 1
    others: list[Dataset] = [
        replace(data, train=replace(data.train, images_NCHW=images)),
        replace(data, train=data.val, val=data.train),
        replace(data, class_names=tuple(reversed(data.class_names))),
        replace(data, train=data.train.select(torch.arange(1, len(data.train)))),
    ]
    assert len({fingerprint, *(other.sha256 for other in others)}) == 5
    digest = hashlib.sha256(repr((data.shape_CHW, data.class_names)).encode())
    for part in (data.train, data.val):
        digest.update(str(len(part)).encode() + part.images_NCHW.numpy().tobytes() + part.labels_N.numpy().tobytes())
    assert fingerprint == digest.hexdigest()


def test_the_commit_is_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = summary.commit()
    assert commit is None or re.fullmatch("[0-9a-f]{12}(-dirty)?", commit)
    monkeypatch.setattr(summary, "__file__", str(tmp_path / "facts.py"))
    assert summary.commit() is None


# Signals.


def check(stop: StopRequest) -> Stopped:
    with pytest.raises(Stopped) as caught:
        stop.check(tiny_state(tiny_config()), {})
    return caught.value


@pytest.mark.parametrize("ended", [False, True])
def test_a_run_is_marked_when_a_signal_came_unless_it_was_asked_to_end(ended: bool) -> None:
    marked: list[str] = []
    stop = StopRequest()
    stop.asked_to_end = lambda: ended
    stop.mark_preempting = lambda: marked.append(threading.current_thread().name)
    before = signal.getsignal(signal.SIGTERM)
    with stop.listening():
        stop.check(tiny_state(tiny_config()), {})  # Nothing came.
        assert marked == []
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # From an agent, at the same time: one request.
        stopped = check(stop)
    assert (stopped.ended, stopped.signal_code) == (ended, 143)
    # Never on the thread that a signal interrupts: it may hold the very lock that marking waits for.
    assert marked == ([] if ended else ["stop-cause"])
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_server_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion_core.training.stopping.VERDICT_WITHIN_S", 0.05)
    stop, hang = StopRequest(), threading.Event()
    stop.asked_to_end = hang.wait
    with stop.listening():
        signal.raise_signal(signal.SIGTERM)
        assert not check(stop).ended
        hang.set()


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion_core.training.stopping.SAME_REQUEST_S", 0.0)
    stop = StopRequest()
    with stop.listening():
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGUSR1)


def test_processes_act_on_the_signal_of_any() -> None:
    """As if another process had been sent SIGUSR1 and knew that the run is to end."""
    answers: list[Any] = [signal.SIGUSR1, True]
    stop = StopRequest(agree=lambda number: max(number, answers.pop(0)))
    with stop.listening():
        stopped = check(stop)
    assert (stopped.ended, stopped.signal_code) == (True, 128 + signal.SIGUSR1)
