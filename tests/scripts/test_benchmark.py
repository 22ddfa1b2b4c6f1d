"""The benchmarks run, say what they ran on, and judge a figure by its target. Their figures are no test's business."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import benchmark
import pytest
from benchmarks.measurement.profile import is_range, kind_of
from benchmarks.measurement.rows import HEADER, Row
from benchmarks.scaling import Point, growth


@pytest.mark.parametrize(
    ("value", "target", "at_least", "holds"),
    [(1.7, 1.7, True, True), (1.69, 1.7, True, False), (0.62, 0.62, False, True), (0.63, 0.62, False, False),
     (None, 1.0, True, None), (1.0, None, True, None)],
)  # fmt: skip
def test_a_target_is_met_or_missed(value: float | None, target: float | None, at_least: bool, holds: bool) -> None:
    row = Row("s", "what", value, target=target, at_least=at_least)
    assert row.holds is holds
    cells = row.cells()
    assert len(cells) == len(HEADER)
    assert ("not measured" in cells) == (value is None)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_growth_is_the_exponent(exponent: float) -> None:
    points = [Point("batch size", value, 3.0 * value**exponent, float(value)) for value in (1, 2, 4, 8)]
    assert math.isclose(growth(points), exponent)


@pytest.mark.extra("bench")
def test_a_report_says_on_what_it_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "deep" / "report.json"
    assert benchmark.main(["ema", "loading", "--short", "--rounds", "1", "--json", "--out", str(file)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(file.read_text())
    assert {"date", "processor", "cores", "gpu", "versions", "commit"} <= report["machine"].keys()
    assert report["short"]
    assert [row["subject"] for row in report["rows"]] == ["ema", "loading"]
    assert all(row["value"] > 0 and row["holds"] is (row["value"] >= row["target"]) for row in report["rows"])


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ema_pytorch", None)
    assert benchmark.main(["ema", "--short", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "not measured" in out
    assert "ema_pytorch" in out
    assert "[bench]" in out


@pytest.mark.parametrize("words", [["nothing"], ["ema", "--rounds", "0"], []])
def test_wrong_arguments(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        benchmark.main(words)
    assert refused.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        # Fused kernels carry the names of all operations in them.
        ("triton_red_fused__to_copy_add_convolution_var_mean_15", "fused reductions (norms)"),
        ("triton_poi_fused__to_copy_add_convolution_silu_16", "fused elementwise"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolutions"),
        (
            "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16_128x128_32x4>",
            "convolutions",
        ),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x256", "attention"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNN", "matrix products"),
        ("void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>", "optimizer and averages"),
        ("Memset (Device)", "copies and fills"),
        ("some_other_kernel", "other"),
    ],
)
def test_kernels_are_counted_by_what_they_do(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind
    assert not is_range(kernel)


def test_ranges_around_kernels_are_not_counted_twice() -> None:
    assert is_range("Optimizer.step#AdamW.step")
