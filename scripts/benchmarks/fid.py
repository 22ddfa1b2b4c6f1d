"""Measure the Frechet distance against SciPy's matrix square root, and Inception features against pytorch-fid."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.measurement.options import Options
from benchmarks.measurement.rows import Row, seconds
from benchmarks.measurement.timing import alternating
from diffusion_core.evaluation.distances import Moments, Statistics, frechet_distance
from diffusion_core.evaluation.extractors.inception import build_inception, read_inception

SUBJECT = "fid"
DIM, SHORT_DIM = 2048, 128
IMAGES, SHORT_IMAGES, BATCH = 192, 8, 50
DISTANCE_TARGET, FEATURES_TARGET, EQUAL_TARGET = 5.0, 1.3, 1e-3


def random_weights(path: Path) -> None:
    """Write random weights in pytorch-fid's format, initialised so that features keep their scale."""
    torch.manual_seed(0)
    network = build_inception()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)


def pytorch_fid_network(path: Path) -> nn.Module:
    """Return pytorch-fid's own network with weights from a file, instead of the weights that it would download."""
    from pytorch_fid import inception

    download = inception.load_state_dict_from_url
    inception.load_state_dict_from_url = lambda *_, **__: torch.load(path, weights_only=True)
    try:
        return inception.InceptionV3().eval()
    finally:
        inception.load_state_dict_from_url = download


def statistics(count: int, dim: int, seed: int) -> Statistics:
    """Return the statistics of correlated random features."""
    source = torch.Generator().manual_seed(seed)
    mixing_DD = torch.randn(dim, dim, generator=source) / dim**0.5
    return Moments.of(torch.randn(count, dim, generator=source) @ mixing_DD).statistics()


def scipy_distance(one: Statistics, two: Statistics) -> float:
    """Return the distance by a matrix square root, as pytorch-fid computes it (its own call needs SciPy < 1.18)."""
    from scipy.linalg import sqrtm

    difference = (one.mean_D - two.mean_D).numpy()
    sigma1, sigma2 = one.covariance_DD.numpy(), two.covariance_DD.numpy()
    root = sqrtm(sigma1 @ sigma2)
    return float(difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2.0 * np.trace(root).real)


def measure_distance(options: Options) -> Row:
    """Measure the distance of two statistics of full rank."""
    dim = SHORT_DIM if options.short else DIM
    one, two = (statistics(4 * dim, dim, seed) for seed in (0, 1))
    found: dict[str, float] = {}

    def ours() -> None:
        found["ours"] = frechet_distance(one.mean_D, one.covariance_DD, two.mean_D, two.covariance_DD)

    def scipys() -> None:
        found["scipy"] = scipy_distance(one, two)

    times = alternating({"ours": ours, "scipy": scipys}, options.rounds, options.say)
    apart = abs(found["ours"] - found["scipy"]) / found["scipy"]
    return Row(
        SUBJECT,
        f"distance of two {dim}-dimensional statistics, against scipy's sqrtm",
        times["scipy"] / times["ours"],
        target=DISTANCE_TARGET,
        ours=seconds(times["ours"]),
        peer=seconds(times["scipy"]),
        note=f"relative difference {apart:.1e}",
        details=times | found,
    )


def measure_features(options: Options) -> list[Row]:
    """Measure features of the same images: in memory for our network, PNG files for pytorch-fid."""
    from pytorch_fid.fid_score import calculate_activation_statistics

    count = SHORT_IMAGES if options.short else IMAGES
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.Generator().manual_seed(0)
    images_NCHW = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=source)
    found: dict[str, Statistics] = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        random_weights(weights)
        files = [Path(folder) / f"{index:05d}.png" for index in range(count)]
        for file, pixels_CHW in zip(files, images_NCHW, strict=True):
            Image.fromarray(pixels_CHW.permute(1, 2, 0).numpy()).save(file)
        extractor, theirs = read_inception(weights, device), pytorch_fid_network(weights).to(device)

        def ours() -> None:
            moments = Moments.empty(DIM)
            for batch_BCHW in images_NCHW.split(BATCH):
                moments.add(extractor(batch_BCHW).features_BD.cpu())
            found["ours"] = moments.statistics()

        def pytorch_fids() -> None:
            workers = min(8, torch.get_num_threads())
            mean, covariance = calculate_activation_statistics(files, theirs, BATCH, DIM, device, workers)
            found["theirs"] = Statistics(count, torch.from_numpy(mean), torch.from_numpy(covariance))

        times = alternating({"ours": ours, "pytorch-fid": pytorch_fids}, options.rounds, options.say)
    other = statistics(4 * DIM, DIM, 2)
    values = {name: moments.distance(other) for name, moments in found.items()}
    apart = abs(values["ours"] - values["theirs"]) / values["theirs"]
    return [
        Row(
            SUBJECT,
            f"Inception features and moments of {count} images of 32 x 32 in memory, against pytorch-fid's from PNG",
            times["pytorch-fid"] / times["ours"],
            target=FEATURES_TARGET,
            ours=f"{count / times['ours']:.3g} images/s",
            peer=f"{count / times['pytorch-fid']:.3g} images/s",
            details=times,
        ),
        Row(
            SUBJECT,
            "relative difference of the two distances to the same statistics",
            apart,
            unit="",
            target=EQUAL_TARGET,
            at_least=False,
            details=values,
        ),
    ]


def measure(options: Options) -> list[Row]:
    """Measure the distance and the features."""
    return [measure_distance(options), *measure_features(options)]
