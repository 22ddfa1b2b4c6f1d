"""Sensitivity of blocks: measured losses are those of networks narrowed by hand, and shares follow from them."""

from __future__ import annotations

import pytest
import torch
from tiny import digits, tiny_config, tiny_network

from diffusion_core.model.cost import count_cost
from pruning.blocks import shared_blocks
from pruning.calibration import Calibration
from pruning.channels.groups import channel_groups
from pruning.channels.importance import channel_scores
from pruning.channels.removal import Removal, prune_channels, remove
from pruning.channels.sensitivity import SHARES, Sensitivity, measure_sensitivity, proposed_shares
from pruning.config import PruneConfig

CONFIG = tiny_config(model__channels=16, train__batch_size=16)
PRUNE = PruneConfig(method="structured", keep=0.5, calibration_batches=2, importance="l1")


def calibration() -> Calibration:
    return Calibration.of(digits().train, CONFIG, torch.device("cpu"))


def test_losses_are_those_of_networks_narrowed_by_hand() -> None:
    """One block alone keeps its strongest channels; widths are multiples of the groups of norms, here of four."""
    network, images = tiny_network(CONFIG), calibration()
    measured = measure_sensitivity(network, PRUNE, 0, images)
    assert list(measured.losses) == shared_blocks(2)
    groups = channel_groups(network)
    scores = channel_scores(network, groups, PRUNE, 0, None)

    def loss(kept: dict[str, str]) -> float:
        smaller = remove(network, Removal(kept)).eval()
        with torch.no_grad():
            return sum(float(images.loss(smaller, images.draws(i, smaller)).mean()) for i in range(2)) / 2

    whole = {group.name: "1" * group.width for group in groups}
    assert measured.dense == pytest.approx(loss(whole))
    kept = dict(whole)
    for group in groups:
        if group.name.startswith("down.1."):  # Half of four strongest in each quarter, as each group of a norm keeps.
            score = scores[group.name]
            norms = [member for member in group.members if "norm" in member.layer]
            parts = 4 if norms and len(norms[0].places) == network.get_submodule(norms[0].layer).num_channels else 1
            strong = score.view(parts, -1).argsort(dim=1, descending=True)[:, : group.width // parts // 2]
            marks = torch.zeros(parts, group.width // parts).scatter(1, strong, 1.0).flatten().tolist()
            kept[group.name] = "".join("01"[int(mark)] for mark in marks)
    assert measured.losses["down.1"][measured.kept["down.1"].index(0.5)] == pytest.approx(loss(kept), rel=1e-4)
    assert len({loss for losses in measured.losses.values() for loss in losses}) > 10


def test_between_shares_the_rise_is_linear_and_never_falls() -> None:
    measured = Sensitivity(1.0, {"middle": [1.2, 1.1, 1.7, 1.7]}, {"middle": [0.75, 0.5, 0.25, 0.1]})
    for share, rise in ((1.0, 0.0), (0.75, 0.2), (0.875, 0.1), (0.5, 0.2), (0.3, 0.6), (0.25, 0.7), (0.05, 0.7)):
        assert measured.rise("middle", share) == pytest.approx(rise), share
    kept = {"a": [0.75, 0.5, 0.25, 0.1]}
    assert Sensitivity(1.0, {"a": [1.0, 1.0, 1.0, 1.3]}, kept).rise("a", 0.05) == pytest.approx(0.4)
    assert Sensitivity(1.0, {"a": [1.2]}, {"a": [0.5]}).rise("a", 0.25) == pytest.approx(0.3)


def test_a_loss_belongs_to_the_share_that_rounding_left() -> None:
    """Norms have eight groups, so a width of 16 becomes 8 and no less."""
    network = tiny_network(tiny_config(model__channels=16, model__norm_groups=8))
    measured = measure_sensitivity(network, PRUNE, 0, calibration())
    for block, shares in measured.kept.items():
        assert len(shares) == len(measured.losses[block])
        assert shares == sorted(set(shares), reverse=True)
        assert max(shares) < 1.0
    assert measured.kept["down.0"][-1] == 0.5


@pytest.mark.parametrize("target", ["macs", "params", "latency"])
def test_blocks_that_matter_keep_more(target: str) -> None:
    network = tiny_network(CONFIG)
    losses = {block: [1.0 + 0.1 * (1 - share) for share in SHARES] for block in shared_blocks(2)}
    losses["up.0"] = [1.0] * 4  # Narrowing it costs nothing.
    losses["up.1"] = [1.0 + 9.0 * (1 - share) for share in SHARES]
    prune = PRUNE.model_copy(update={"target": target, "keep": 0.6})
    shares = proposed_shares(network, prune, Sensitivity(1.0, losses, {block: list(SHARES) for block in losses}))
    assert shares["up.0"] == min(shares.values()) <= 0.25
    assert shares["up.1"] == 1.0
    if target != "latency":
        smaller, _ = prune_channels(network, prune.model_copy(update={"block_keep": list(shares.values())}))
        left = getattr(count_cost(smaller), target) / getattr(count_cost(network), target)
        assert left == pytest.approx(0.6, rel=0.02)
