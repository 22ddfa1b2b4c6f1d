"""Feature networks: Inception is pytorch-fid's own, bit by bit but for rounding; others are named for what they are."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import one_line
from torch import nn

from diffusion_core import cache
from diffusion_core.evaluation.distances import Moments
from diffusion_core.evaluation.extractors.find import read_extractor
from diffusion_core.evaluation.extractors.inception import (
    InceptionExtractor,
    build_inception,
    download_inception,
    read_inception,
)
from diffusion_core.evaluation.features import ExtractorError
from diffusion_core.evaluation.folders import image_folder

CPU = torch.device("cpu")
COUNT = 7


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pytorch-fid's network, randomly initialised so that features keep their scale, saved in its format."""
    torch.manual_seed(0)
    network = build_inception()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            assert module.running_mean is not None
            nn.init.normal_(module.running_mean, std=0.1)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def extractor(weights: Path) -> InceptionExtractor:
    return read_inception(weights, CPU)


@pytest.fixture(scope="module")
def theirs(weights: Path) -> nn.Module:
    """pytorch-fid's own class, whose download is the file."""
    from pytorch_fid import inception

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: torch.load(weights, weights_only=True))
        return inception.InceptionV3().eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of images: noise, and smooth ones, one of them grey."""
    root = tmp_path_factory.mktemp("images")
    source = np.random.default_rng(0)
    for name, size in (("noise", 32), ("smooth", 4)):
        (root / name).mkdir()
        for index in range(COUNT):
            image = Image.fromarray(source.integers(0, 256, (size, size, 3), dtype=np.uint8)).resize((32, 32))
            (image.convert("L") if index == 3 else image).save(root / name / f"{index}.png")
    return root / "noise", root / "smooth"


def test_features_and_fid_are_pytorch_fids_of_the_same_files(
    extractor: InceptionExtractor, theirs: nn.Module, folders: tuple[Path, Path]
) -> None:
    from pytorch_fid.fid_score import calculate_frechet_distance, get_activations

    sets = []
    for path in folders:
        files = sorted(path.glob("*.png"))
        expected = torch.from_numpy(get_activations(files, theirs, 5, 2048, "cpu", 0))
        found = torch.cat([extractor(images).features_BD for images, _ in image_folder(path).batches(range(COUNT), 4)])
        assert expected.std() > 0.01  # Else equality would say nothing.
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
        sets.append((found, expected))
    (ours1, theirs1), (ours2, theirs2) = sets
    distance = Moments.of(ours1).statistics().distance(Moments.of(ours2).statistics())
    # Of the data themselves: the trace is a nuclear norm (pytorch-fid's root of 2048 x 2048 takes a minute).
    a, b = (x - x.mean(0) for x in (theirs1, theirs2))
    trace = torch.linalg.svdvals(a @ b.T).sum() / (COUNT - 1)
    mean_part = (theirs1.mean(0) - theirs2.mean(0)).square().sum()
    expected_distance = mean_part + theirs1.var(0).sum() + theirs2.var(0).sum() - 2 * trace
    assert distance == pytest.approx(float(expected_distance), rel=1e-3)
    # And by pytorch-fid's formula where its root exists: in a few directions.
    basis = torch.linalg.qr(torch.randn(2048, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    few = [Moments.of(x.double() @ basis).statistics() for x in (ours1, ours2)]
    arrays = [part for x in (theirs1 @ basis, theirs2 @ basis) for part in (x.mean(0).numpy(), np.cov(x.T))]
    try:
        peer = calculate_frechet_distance(*arrays)
    except TypeError:  # SciPy 1.18 removed what pytorch-fid 0.3.0 calls.
        return
    assert few[0].distance(few[1]) == pytest.approx(peer, rel=1e-3)


def test_the_script_reads_the_weights_that_it_is_given(
    extractor: InceptionExtractor, weights: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    paths = [str(path) for path in folders]
    more = ["--inception-weights", str(weights), "--figures", "frechet", "--json", str(tmp_path / "a.json")]
    assert evaluate.main([*paths, *more, "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    ours, theirs = (
        Moments.of(
            torch.cat([extractor(images).features_BD for images, _ in image_folder(path).batches(range(COUNT), 4)])
        )
        for path in folders
    )
    name = f"eval/fd_{extractor.name}_{COUNT}_smooth"
    assert found["figures"][name] == pytest.approx(ours.statistics().distance(theirs.statistics()), rel=1e-4)
    assert extractor.weights[:8] in found["protocols"][name]


def test_other_weights_are_not_called_inception(extractor: InceptionExtractor) -> None:
    assert extractor.name == f"inception-{extractor.weights[:8]}"
    published = InceptionExtractor(build_inception().eval(), "6726825d" + "0" * 56)
    assert published.name == "inception"


def test_logits_are_torch_fidelitys_without_bias(extractor: InceptionExtractor, weights: Path) -> None:
    judged = extractor(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    state = torch.load(weights, weights_only=True)
    assert judged.logits_BK is not None
    torch.testing.assert_close(judged.logits_BK, judged.features_BD @ state["fc.weight"].T)
    assert judged.logits_BK.shape == (1, 1008)


def test_weights_that_are_missing_damaged_or_of_another_network_are_refused_in_one_line(
    weights: Path, tmp_path: Path
) -> None:
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:10_000])
    (tmp_path / "text.pth").write_text("weights")
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")  # A pickle of code is not run.
    for name in ("missing.pth", "cut.pth", "text.pth", "other.pth", "module.pth"):
        with pytest.raises(ExtractorError) as refusal:
            read_inception(tmp_path / name, CPU)
        assert name in one_line(refusal.value)


def test_the_download_is_kept_if_its_hash_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_fid import inception as peer

    from diffusion_core.evaluation.extractors import inception as ours
    from diffusion_core.evaluation.features import weights_file_hash

    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    source = tmp_path / "there.pth"
    monkeypatch.setattr(peer, "FID_WEIGHTS_URL", source.as_uri())
    for content in (None, b"something else"):
        if content is not None:
            source.write_bytes(content)
        with pytest.raises(ExtractorError) as refusal:
            download_inception()
        assert "--inception-weights" in one_line(refusal.value)
    assert not list((tmp_path / "cache").rglob("*.pth"))
    monkeypatch.setattr(ours, "PUBLISHED_HASH", weights_file_hash(source)[:8])
    kept = download_inception()
    source.unlink()
    assert download_inception() == kept
    assert kept.read_bytes() == b"something else"


def test_a_failed_download_is_not_called_a_fault_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pytorch_fid import inception as peer

    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(peer, "FID_WEIGHTS_URL", (tmp_path / "nowhere.pth").as_uri())
    with pytest.raises(ExtractorError, match=r"cannot download \S+nowhere\.pth \(<urlopen error .+\); copy the file"):
        download_inception()
    assert capsys.readouterr().err == ""


def test_a_download_that_the_disk_cannot_hold_is_not_called_a_fault_of_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr("torch.hub.download_url_to_file", full)
    with pytest.raises(ExtractorError, match="the cache cannot hold the download"):
        download_inception()
    assert "(No space left on device); set DIFFUSION_SWEEPS_CACHE to another folder" in capsys.readouterr().err


class Means(nn.Module):
    """Mean and deviation of each channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float().flatten(2)
        return torch.cat([x.mean(2), x.std(2)], dim=1)


class TooFew(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_torchscript_network_is_a_feature_space(tmp_path: Path) -> None:
    scripted: Callable[[nn.Module], torch.jit.ScriptModule] = torch.jit.script
    scripted(Means()).save(str(tmp_path / "my_net.pt"))
    space = read_extractor(tmp_path / "my_net.pt", CPU)
    images = torch.randint(0, 256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert space.name == "my-net"
    assert len(space.weights) == 16
    torch.testing.assert_close(space(images).features_BD, Means()(images))
    assert space(images).logits_BK is None
    assert not math.isnan(float(space(images).features_BD.sum()))

    scripted(TooFew()).save(str(tmp_path / "few.pt"))
    with pytest.raises(ExtractorError) as refusal:
        read_extractor(tmp_path / "few.pt", CPU)(images)
    one_line(refusal.value)
    (tmp_path / "text.pt").write_text("network")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    (tmp_path / "net.onnx").write_text("")
    for name in ("text.pt", "module.pt", "net.onnx", "missing.pt"):
        with pytest.raises(ExtractorError) as refusal:
            read_extractor(tmp_path / name, CPU)
        assert name in one_line(refusal.value)
