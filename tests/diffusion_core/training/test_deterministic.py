"""With ``train.deterministic`` a GPU refuses operations that it computes in no fixed order: none of them is used.

Which ones these are is said by torch's documentation of ``use_deterministic_algorithms``. Operations are noted on the
processor, so that no GPU is needed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import cpu, digits, lively, tiny_batches, tiny_config, tiny_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_core.evaluation.classifier.network import ClassifierNetwork
from diffusion_core.evaluation.classifier.training import RECIPES, train_classifier
from diffusion_core.evaluation.distances import density_coverage, precision_recall
from diffusion_core.hardware import algorithms, autocast
from diffusion_core.training.learning_rate import set_learning_rate
from diffusion_core.training.trainer import train
from pruning.calibration import Calibration
from pruning.config import PruneConfig
from pruning.masks.strategies import keep_highest
from pruning.pruner import prune_state

REFUSED = (
    "adaptive_avg_pool2d_backward",
    "adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "cumsum",
    "fractional_max_pool2d_backward",
    "grid_sampler_2d_backward",
    "histc",
    "kthvalue",
    "max_pool3d_with_indices_backward",
    "median.dim",
    "nll_loss2d",
    "put",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "replication_pad1d_backward",
    "scatter_reduce",
    "upsample_bicubic2d_backward",
    "upsample_bilinear2d_backward",
    "upsample_linear1d_backward",
)


class Operations(TorchDispatchMode):
    """Inside this context the names of operations are noted."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(function).removeprefix("aten.").lstrip("_"))
        return function(*args, **(kwargs or {}))

    def check(self) -> None:
        assert len(self.names) > 5
        assert [name for name in sorted(self.names) if name.startswith(REFUSED)] == []


def test_refused_operations_are_noticed() -> None:
    with Operations() as operations, torch.enable_grad():
        F.adaptive_max_pool2d(torch.zeros(1, 1, 4, 4, requires_grad=True), 1).sum().backward()
        torch.zeros(4).kthvalue(2)
        torch.zeros(4).cumsum(0)
    assert len([name for name in operations.names if name.startswith(REFUSED)]) == 3


def test_training_steps() -> None:
    config = tiny_config(
        model__dropout=0.1, model__learned_variance=True, model__self_conditioning=True, ema__power_widths=[0.1]
    )
    with Operations() as operations:
        train(tiny_state(config), tiny_batches(config), config, accelerator=cpu(), until=2)
    operations.check()


@pytest.mark.parametrize(
    "knobs",
    [
        {"method": "magnitude"},
        {"method": "gradual"},
        {"method": "random", "scope": "layer"},
        {"method": "n_of_m"},
        {"method": "snip", "calibration_batches": 1},
        {"method": "structured", "importance": "diff_pruning", "calibration_batches": 1},
    ],
)
def test_pruning(knobs: dict[str, Any]) -> None:
    config = tiny_config()
    state = tiny_state(config)
    lively(state.network)
    calibration = Calibration.of(digits().train, config, torch.device("cpu"))
    with Operations() as operations:
        prune_state(state, config, PruneConfig(keep=0.5, **knobs), calibration)
    operations.check()


def test_judging() -> None:
    images = digits().train.select(torch.arange(256))
    with Operations() as operations:
        train_classifier(images, 10, RECIPES["tiny"], mirrored=True, device=torch.device("cpu"))
        features = [torch.randn(20, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
        precision_recall(*features)
        density_coverage(*features)
    operations.check()


@pytest.mark.parametrize("size", [8, 28, 32])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_classifier_pools_as_adaptive_pooling_does(size: int, layout: torch.memory_format) -> None:
    """To the last bit, also where gradients of equal maxima go: classifiers that were trained before stay the same."""
    source = torch.Generator().manual_seed(0)
    network = ClassifierNetwork(3, 10, 4).to(memory_format=layout)
    images = torch.randn(5, 3, size, size, generator=source).contiguous(memory_format=layout)
    maps = network.layers(images)
    maps = maps.round()  # Many are equal.
    gradients: list[Tensor] = []
    features = network_features(network, maps, gradients), adaptive_features(maps, gradients)
    assert torch.equal(*features)
    assert torch.equal(*gradients)


def network_features(network: ClassifierNetwork, maps: Tensor, gradients: list[Tensor]) -> Tensor:
    leaf = maps.detach().requires_grad_()
    network.layers = torch.nn.Sequential()
    features = network(leaf).features_BD
    gradients += torch.autograd.grad(features.square().sum(), leaf)
    return features


def adaptive_features(maps: Tensor, gradients: list[Tensor]) -> Tensor:
    leaf = maps.detach().requires_grad_()
    features = F.adaptive_max_pool2d(leaf, 1).flatten(1)
    gradients += torch.autograd.grad(features.square().sum(), leaf)
    return features


@pytest.mark.parametrize("pruned", [1, 500, 900, 999])
def test_the_threshold_of_masks_is_an_order_statistic(pruned: int) -> None:
    scores = torch.randint(100, (1000,), generator=torch.Generator().manual_seed(0)).float()
    kept = keep_highest({"a": scores}, None, 1000 - pruned)["a"]
    threshold = scores.kthvalue(pruned).values
    assert int((~kept).sum()) == pruned
    assert scores[~kept].max() == threshold
    assert kept[scores > threshold].all()


def test_fp32_means_exact_products_and_other_precisions_may_round() -> None:
    cudnn, products_of_matrices = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, products_of_matrices.allow_tf32
    cases: list[tuple[Any, bool]] = [("fp32", False), ("tf32", True), ("bf16", True)]
    for precision, rounds in cases:
        with autocast(torch.device("cpu"), precision):
            assert (cudnn.allow_tf32, products_of_matrices.allow_tf32) == (rounds, rounds)
        with algorithms(tiny_config().train, precision):  # The backward pass runs in here.
            assert (cudnn.allow_tf32, products_of_matrices.allow_tf32) == (rounds, rounds)
    assert (cudnn.allow_tf32, products_of_matrices.allow_tf32) == before


def test_convolutions_are_tried_out_unless_the_run_is_deterministic() -> None:
    for deterministic in (True, False):
        with algorithms(tiny_config(train__deterministic=deterministic).train, "fp32"):
            assert torch.backends.cudnn.benchmark is not deterministic
    assert not torch.backends.cudnn.benchmark


def test_the_learning_rate_of_a_recorded_step_changes_in_place() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    place = torch.tensor(0.5)
    for rate in (place, 0.5):
        optimizer = torch.optim.AdamW([weight], lr=rate, fused=isinstance(rate, torch.Tensor))
        set_learning_rate(optimizer, 0.25)
        assert optimizer.param_groups[0]["lr"] == 0.25
    assert place == 0.25
