"""KID, Inception score, precision and recall against torch-fidelity; density, coverage and SSIM against oracles."""

from __future__ import annotations

import pytest
import torch

from diffusion_core.evaluation.consistency import mean_squared_difference, structural_similarity
from diffusion_core.evaluation.distances import density_coverage, inception_score, kernel_distance, precision_recall


def features(count: int, dim: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + shift


ONE, TWO = features(300, 12, 0, 0.3), features(250, 12, 1)


def test_the_kernel_distance_is_torch_fidelitys() -> None:
    metric_kid = pytest.importorskip("torch_fidelity.metric_kid")
    settings = {"kid_subsets": 20, "kid_subset_size": 100, "rng_seed": 2020, "verbose": False}
    expected = metric_kid.kid_features_to_metric(ONE, TWO, **settings)["kernel_inception_distance_mean"]
    assert kernel_distance(ONE, TWO, subsets=20, size=100) == pytest.approx(expected, rel=1e-4)
    assert kernel_distance(ONE, TWO, subsets=20, size=100, seed=1) != pytest.approx(expected, rel=1e-6)


def test_the_kernel_distance_of_equal_distributions_is_about_zero_and_of_few_images_defined() -> None:
    same = features(2000, 12, 2), features(2000, 12, 3)
    apart = kernel_distance(ONE, TWO, subsets=10, size=200)
    assert abs(kernel_distance(*same, subsets=10)) < 0.02 * apart
    assert kernel_distance(ONE[:5], TWO[:7]) > -10.0  # As many a subset as there are.


def test_the_inception_score_is_torch_fidelitys() -> None:
    metric_isc = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 3.0 * features(503, 10, 4)
    expected = metric_isc.isc_features_to_metric(logits)["inception_score_mean"]
    assert inception_score(logits) == pytest.approx(expected, rel=1e-9)


def test_the_inception_score_is_the_number_of_classes_at_best_and_one_at_worst() -> None:
    sure = 1000.0 * torch.eye(10).repeat(300, 1)
    assert inception_score(sure, splits=1) == pytest.approx(10.0)
    assert inception_score(torch.zeros(100, 10)) == pytest.approx(1.0)
    assert inception_score(1000.0 * torch.eye(10)[:1].repeat(50, 1)) == pytest.approx(1.0)


def test_precision_and_recall_are_torch_fidelitys() -> None:
    metric_prc = pytest.importorskip("torch_fidelity.metric_prc")
    expected = metric_prc.prc_features_to_metric(
        ONE, TWO, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=False, verbose=False
    )
    assert precision_recall(ONE, TWO) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)
    other = precision_recall(TWO, ONE)
    assert other == pytest.approx(tuple(reversed(precision_recall(ONE, TWO))), abs=1e-6)


def test_density_and_coverage_are_their_definition() -> None:
    """Naeem et al. 2020, eq. 4 and 5, written out one pair at a time."""
    fake, real, k = ONE[:40].double(), TWO[:30].double(), 5
    radius = [sorted(float((a - b).norm()) for b in real)[k] for a in real]
    inside = [[float((f - r).norm()) <= radius[i] for i, r in enumerate(real)] for f in fake]
    density = sum(map(sum, inside)) / (k * len(fake))
    coverage = sum(any(row[i] for row in inside) for i in range(len(real))) / len(real)
    assert density_coverage(fake, real) == pytest.approx((density, coverage))


def test_manifold_figures_of_equal_and_of_disjoint_sets() -> None:
    assert precision_recall(ONE, ONE) == (1.0, 1.0)
    assert density_coverage(ONE, ONE)[1] == 1.0
    assert precision_recall(ONE, ONE + 1000.0) == (0.0, 0.0)
    assert density_coverage(ONE, ONE + 1000.0) == (0.0, 0.0)
    assert precision_recall(ONE[:1], TWO[:2]) in {(0.0, 0.0), (1.0, 0.0)}


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 40), (3, 11, 11)])
def test_structural_similarity_is_scikit_images(shape: tuple[int, int, int]) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    source = torch.Generator().manual_seed(0)
    smooth = torch.rand((2, shape[0], 4, 4), generator=source) * 200.0
    one = torch.nn.functional.interpolate(smooth, shape[1:], mode="bilinear").to(torch.uint8)
    two = (one + 60.0 * torch.rand(one.shape, generator=source)).clamp(0, 255).to(torch.uint8)
    found = structural_similarity(one, two)
    for index in range(2):
        expected = metrics.structural_similarity(
            one[index].numpy(), two[index].numpy(), channel_axis=0, data_range=255,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )  # fmt: skip
        assert float(found[index]) == pytest.approx(expected, abs=1e-6)


def test_consistency_of_equal_and_opposite_images() -> None:
    source = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 1, 8, 8), generator=source, dtype=torch.uint8)
    assert structural_similarity(images, images).tolist() == pytest.approx([1.0] * 3)
    assert structural_similarity(images, 255 - images).max() < 0.0
    assert mean_squared_difference(images, images).tolist() == [0.0] * 3
    black, white = torch.zeros_like(images), torch.full_like(images, 255)
    assert mean_squared_difference(black, white).tolist() == pytest.approx([4.0] * 3)
    with pytest.raises(ValueError, match="expected equal shapes"):
        structural_similarity(images, images[:2])
