"""Plugins and checkpoints: a file never decides which code runs; the scripts take the modules' names from the user."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import run_command
from forks import Forks
from tiny import tiny_config, tiny_state

from agent.config import build_config
from diffusion_core.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from diffusion_core.config import ConfigError
from diffusion_core.config.plugins import import_plugins, missing_plugins, plugin_names
from diffusion_core.files import write_json, write_text
from diffusion_core.registries import METRICS, SAMPLERS
from diffusion_core.training.checkpoints import describe

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = """
from pathlib import Path
from diffusion_core.registries import SAMPLERS
from diffusion_core.sampling.samplers import SamplerRecord, ddim

Path("imported").touch()
SAMPLERS["mine"] = SamplerRecord(ddim, "DDIM by another name")
"""

FIGURE = """
from diffusion_core.config.metrics import Part
from diffusion_core.evaluation.metrics import FeatureMetric
from diffusion_core.registries import METRICS

METRICS["mine"] = FeatureMetric([Part("mine", "minimize")], None, "a figure")
"""
RESULT = {"run_id": "r", "step": 3, "best_checkpoint": "run/checkpoints/step-00000003", "figures": {"model/params": 7}}


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that adds the sampler ``mine`` and leaves a file where it is imported."""
    (tmp_path / "plugin_with_a_sampler.py").write_text(PLUGIN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield "plugin_with_a_sampler"
    sys.modules.pop("plugin_with_a_sampler", None)
    if "mine" in SAMPLERS:
        del SAMPLERS["mine"]


@pytest.mark.parametrize("value", [["a.b", "c"], ("a.b", "c"), "a.b,c", "['a.b', 'c']", "[a.b, c]"])
def test_every_spelling_of_a_list_names_the_same_modules(value: object) -> None:
    assert plugin_names(value) == ["a.b", "c"]


@pytest.mark.parametrize("value", ["../evil.py", "a b", ["a", 3], "os;print()"])
def test_what_is_no_module_name_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="expected names of Python modules"):
        plugin_names(value)


def test_a_plugin_is_imported_before_the_configuration_is_checked(plugin: str) -> None:
    with pytest.raises(ConfigError, match="expected one of"):
        build_config({"sample.sampler": "mine"})
    config = build_config({"sample.sampler": "mine", "plugins": plugin})
    assert (config.sample.sampler, config.plugins) == ("mine", [plugin])
    assert (Path.cwd() / "imported").exists()


def test_a_plugin_that_fails_says_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('no\\nluck')", encoding="utf-8")
    (tmp_path / "leaving_plugin.py").write_text("raise SystemExit", encoding="utf-8")
    for name, reason in (
        ("broken_plugin", "no luck"),
        ("leaving_plugin", "it calls sys.exit(None)"),
        ("absent_plugin", "No module named 'absent_plugin'"),
    ):
        with pytest.raises(ConfigError) as caught:
            import_plugins({"plugins": name})
        assert str(caught.value) == (
            f"plugins = {name!r}: cannot import it ({reason}); install it, or add its folder to PYTHONPATH"
        )


def test_a_checkpoint_never_imports_its_plugins(plugin: str, tmp_path: Path) -> None:
    config = tiny_config()
    state = tiny_state(config)
    described = describe(state, config, ("a",) * 10) | {"best": None}
    described["config"] |= {"plugins": [plugin], "sample.sampler": "mine"}
    path = write_checkpoint(tmp_path / "run", 0, described, state.parts()).path
    with pytest.raises(CheckpointError, match=f"--plugins={plugin} if you trust it"):
        read_checkpoint(path).config()
    assert not (tmp_path / "imported").exists()
    import_plugins({"plugins": plugin})
    assert read_checkpoint(path).config().sample.sampler == "mine"
    assert missing_plugins({"plugins": [plugin]}) == ""


@pytest.mark.slow
@pytest.mark.parametrize("script", ["sample_images", "evaluate", "prune", "convert_diffusers", "export_model"])
def test_every_script_that_reads_checkpoints_takes_plugins(
    script: str, plugin: str, tmp_path: Path, forks: Forks
) -> None:
    absent = (
        "error: plugins = 'absent_plugin': cannot import it (No module named 'absent_plugin'); install it, or add its "
        "folder to PYTHONPATH\n"
    )
    for name, expected in ((plugin, None), ("absent_plugin", absent)):
        words = [str(ROOT / "scripts" / f"{script}.py"), f"--plugins={name}", "--checkpoint", "none"]
        environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": "", "OMP_NUM_THREADS": "1"}
        said = forks.python(words, tmp_path, environment).end(2)
        assert expected in (None, said)
        assert (tmp_path / "imported").exists()


def test_the_leaderboard_and_sync_take_plugins(
    plugin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A figure that a plugin adds has a goal only with the plugin, and is shown only then."""
    (tmp_path / "plugin_with_a_figure.py").write_text(FIGURE, encoding="utf-8")
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "result.json", RESULT)
    write_text(tmp_path / "run" / "history.jsonl", '{"step": 3, "val/loss": 0.5, "eval/mine_inception": 0.25}\n')
    monkeypatch.setenv("WANDB_MODE", "offline")
    try:
        assert run_command("agent.leaderboard", "run") == 0
        assert "mine" not in capsys.readouterr().out
        assert run_command("agent.leaderboard", "run", "--plugins=plugin_with_a_figure") == 0
        assert "eval/mine_inception" in capsys.readouterr().out
    finally:
        METRICS.pop("mine", None)
        sys.modules.pop("plugin_with_a_figure", None)
    assert run_command("agent.sync", "nowhere", "--plugins", plugin) == 2
    assert (tmp_path / "imported").exists()
