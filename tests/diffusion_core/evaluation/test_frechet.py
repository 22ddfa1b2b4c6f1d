"""The Fréchet distance against closed forms, SciPy's square root, pytorch-fid, and the nuclear norm of the data."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from diffusion_core.data.datasets import DataError
from diffusion_core.evaluation.distances import Moments, frechet_distance
from diffusion_core.evaluation.reference import read_statistics, write_statistics


def features(count: int, dim: int, seed: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=source, dtype=torch.float64)
    return torch.randn(count, dim, generator=source, dtype=torch.float64) @ mixing + 3.0


def turned(values: list[float], seed: int) -> torch.Tensor:
    """A covariance with these eigenvalues, in a random basis that the seed decides."""
    source = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=source, dtype=torch.float64)).Q
    return basis @ torch.tensor(values, dtype=torch.float64).diag() @ basis.T


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ([1.0, 4.0, 9.0], [4.0, 4.0, 1.0]),
        ([1.0, 0.0, 9.0], [4.0, 0.0, 1.0]),  # Singular alike.
        ([0.0, 2.0, 0.0], [3.0, 0.0, 5.0]),  # Nothing in common.
        ([0.0, 0.0, 0.0], [3.0, 1.0, 5.0]),  # A point.
        ([1e-12, 1.0, 1e6], [1e6, 1e-12, 1.0]),
    ],
)
def test_of_covariances_that_commute_it_is_the_distance_of_the_standard_deviations(
    one: list[float], two: list[float]
) -> None:
    means = np.array([1.0, 2.0, 3.0]), np.array([1.5, 0.0, 3.0])
    expected = 4.25 + sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(one, two, strict=True))
    for sigma1, sigma2 in ((turned(one, 0), turned(two, 0)), (turned(two, 0), turned(one, 0))):
        assert frechet_distance(means[0], sigma1, means[1], sigma2) == pytest.approx(expected, rel=1e-6)


def test_it_equals_pytorch_fids_formula_and_scipys_square_root() -> None:
    one, two = (Moments.of(features(500, 64, seed)).statistics() for seed in (0, 1))
    found = one.distance(two)
    mu1, sigma1, mu2, sigma2 = (part.numpy() for part in (one.mean_D, one.covariance_DD, two.mean_D, two.covariance_DD))
    root = sqrtm(sigma1 @ sigma2)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real
    assert found == pytest.approx(expected, rel=1e-9)
    from pytorch_fid.fid_score import calculate_frechet_distance

    try:
        theirs = calculate_frechet_distance(mu1, sigma1, mu2, sigma2)
    except TypeError:  # SciPy 1.18 removed what pytorch-fid 0.3.0 calls.
        return
    assert found == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize(("count1", "count2"), [(20, 30), (20, 400), (400, 20), (2, 2)])
def test_of_fewer_samples_than_features_it_is_what_the_data_say(count1: int, count2: int) -> None:
    """The trace is the nuclear norm of the product of the centred samples: no covariance is formed at all."""
    one, two = features(count1, 100, 0), features(count2, 100, 1)
    a, b = (x - x.mean(0) for x in (one, two))
    trace = torch.linalg.svdvals(a @ b.T).sum() / math.sqrt((count1 - 1) * (count2 - 1))
    expected = (one.mean(0) - two.mean(0)).square().sum() + one.var(0).sum() + two.var(0).sum() - 2 * trace
    found = Moments.of(one).statistics().distance(Moments.of(two).statistics())
    assert found == pytest.approx(float(expected), rel=1e-7)


def test_2048_singular_dimensions() -> None:
    """Of n < d samples and the same ones scaled: (1 - s)^2 tr(S) and the distance of the means."""
    one = features(40, 2048, 0)
    scaled = one * 1.5
    expected = 0.25 * (one.var(0).sum() + one.mean(0).square().sum())
    found = Moments.of(one).statistics().distance(Moments.of(scaled).statistics())
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_it_is_zero_of_a_distribution_to_itself_symmetric_and_not_fooled_by_rotations() -> None:
    one, two = (Moments.of(features(300, 16, seed)).statistics() for seed in (0, 1))
    assert one.distance(one) == pytest.approx(0.0, abs=1e-6 * float(one.covariance_DD.trace()))
    assert one.distance(two) == pytest.approx(two.distance(one), rel=1e-9)
    basis = torch.linalg.qr(features(16, 16, 5)).Q
    turned_too = (Moments.of(features(300, 16, seed) @ basis).statistics() for seed in (0, 1))
    assert next(turned_too).distance(next(turned_too)) == pytest.approx(one.distance(two), rel=1e-9)


def test_moments_are_numpys_however_they_are_streamed() -> None:
    x = features(101, 7, 0).float() + 1000.0  # Far from zero, where single precision would lose the covariance.
    moments = Moments.empty(7)
    for part in x.split(13):
        moments.add(part)
    found = moments.statistics()
    assert found.count == 101
    np.testing.assert_allclose(found.mean_D, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance_DD, np.cov(x.double().numpy(), rowvar=False), rtol=1e-7)


def test_wrong_shapes_and_values_are_refused() -> None:
    eye = np.eye(3)
    with pytest.raises(ValueError, match="expected equal sizes"):
        frechet_distance(np.zeros(3), eye, np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(np.zeros(3), eye, np.array([0.0, np.nan, 0.0]), eye)
    assert frechet_distance(np.array(1.0), np.array(4.0), np.array(3.0), np.array(1.0)) == pytest.approx(5.0)


def test_statistics_are_exchanged_with_pytorch_fid_both_ways(tmp_path: Path) -> None:
    from pytorch_fid.fid_score import compute_statistics_of_path

    statistics = Moments.of(features(50, 5, 0)).statistics()
    write_statistics(tmp_path / "ours.npz", statistics)
    mu, sigma = compute_statistics_of_path(str(tmp_path / "ours.npz"), None, 1, 5, "cpu")
    assert np.array_equal(mu, statistics.mean_D)
    assert np.array_equal(sigma, statistics.covariance_DD)

    np.savez_compressed(tmp_path / "theirs.npz", mu=mu, sigma=sigma)  # As pytorch-fid saves them.
    back = read_statistics(tmp_path / "theirs.npz")
    assert back.count is None
    assert torch.equal(back.covariance_DD, statistics.covariance_DD)
    assert read_statistics(tmp_path / "ours.npz").count == 50


def test_damaged_statistics_are_refused_in_one_line(tmp_path: Path) -> None:
    good = tmp_path / "good.npz"
    write_statistics(good, Moments.of(features(50, 5, 0)).statistics())
    cases = {
        "missing.npz": None,
        "empty.npz": b"",
        "text.npz": b"mu and sigma",
        "cut.npz": good.read_bytes()[:300],
    }
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.eye(2))
    np.savez(tmp_path / "nan.npz", mu=np.zeros(2), sigma=np.full((2, 2), np.nan))
    np.savez(tmp_path / "pickle.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    for name in [*cases, "other.npz", "shapes.npz", "nan.npz", "pickle.npz"]:
        with pytest.raises(DataError) as refusal:
            read_statistics(tmp_path / name)
        assert name in str(refusal.value)
        assert "\n" not in str(refusal.value)
