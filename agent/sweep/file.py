"""Read a sweep file, which is W&B's own YAML, and check all of it before anything starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

from agent.config import TrialConfig, build_config
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config import ConfigError, flatten, list_knobs, read_yaml, unknown_key
from diffusion_core.config.metrics import COSTS
from diffusion_core.config.plugins import KEY, plugin_problems
from diffusion_core.config.steps import without_effect
from diffusion_core.messages import shortened, suggested
from diffusion_core.registries import DATASETS
from diffusion_core.search.macros import TrialCommand, read_command
from diffusion_core.search.settings import EXPONENTS, form_problems, method_of, setting_problems
from diffusion_core.search.space import flat_parameters, given_twice, grid_size, values_to_try, with_numbers
from diffusion_core.search.sweep import Sweep, SweepError, name_problems
from pruning.config import methods, unheard

FOLDER = Path("sweeps")
"""Folder of the sweep files of this project, from its root."""

DECIDE_FIGURES = ("eval.", "data.", "model.class_conditional", "steps.", "preset")
"""Knobs that decide which figures a trial logs."""

DECIDE_REACH = ("prune.", "model.", "data.", "preset")
"""Knobs that decide how narrow a network can be, and how narrow it has to be."""

MOST_COMBINATIONS = 1000
"""Number of combinations of these knobs to check."""

MAX_GRID = 100_000
"""Combinations of a grid. The engine lists all of them for every suggestion."""


@dataclass(frozen=True)
class SweepFile(Sweep):
    """A checked sweep over the knobs of :class:`TrialConfig`."""

    def trial(self, chosen: Mapping[str, Any]) -> TrialConfig:
        """Return the configuration of a trial for which the search chose these values.

        Raises:
            ConfigError: if they do not make one.
        """
        return build_config(*self.command.values(chosen))

    def trials(self, *varied: str) -> Iterator[tuple[dict[str, Any], TrialConfig]]:
        """Yield the values and the configurations of trials in which parameters that begin so have all their values.

        The others have their first. At most ``MOST_COMBINATIONS`` are tried. Those that are no configuration are left
        out: such a trial fails before it starts.
        """
        values = {key: values_to_try(spec) for key, spec in self.parameters.items()}
        first = {key: tried[0] for key, tried in values.items()}
        keys = [key for key, tried in values.items() if len(tried) > 1 and key.startswith(varied)]
        for combination in islice(product(*(values[key] for key in keys)), MOST_COMBINATIONS):
            chosen = dict(zip(keys, combination, strict=True))
            with suppress(ConfigError):
                yield chosen, self.trial(first | chosen)


def load_sweep(path: Path) -> SweepFile:
    """Read and check a sweep file.

    Every value of every parameter must make a valid configuration together with the first values of the other
    parameters. Of a distribution, its ends and a value between them are checked.

    Raises:
        SweepError: with all problems, one per line.
    """
    try:
        config = read_yaml(path)
    except ConfigError as error:
        ours = [str(place) for place in sorted(FOLDER.glob("*.yaml")) if not path.exists()]
        same = [f"did you mean {place}?" for place in ours if Path(place).name == path.name]
        hint = same[0] if same else suggested(str(path), ours)
        problem = str(error).replace("--config =", "FILE =", 1)
        raise SweepError(f"{problem}; {hint}" if hint else problem) from None
    if config and not {"method", "parameters", "program", "command"} & config.keys():
        raise SweepError(
            f"FILE = {str(path)!r}: is no sweep file; to run it as one trial: python -m agent --config {path}"
        )
    return check_sweep(config, str(path), path.stem)


def check_sweep(config: dict[str, Any], source: str, name: str) -> SweepFile:
    """Check the content of a sweep as :func:`load_sweep` does.

    Args:
        config: the content.
        source: where it comes from, for messages.
        name: the sweep's name if the content has none.

    Raises:
        SweepError: with all problems, one per line.
    """
    config = {key: value for key, value in config.items() if value is not None}  # An empty `metric:` is None.
    name = config.get("name", name)
    problems: list[str] = []
    command = TrialCommand()
    try:
        command = read_command(config.get("command"), config.get("program"))
    except ConfigError as error:
        problems += error.problems
    given = config.get("parameters")
    fields = dict(list_knobs(TrialConfig))
    flat = flat_parameters(given) if isinstance(given, Mapping) else {}
    sweep = SweepFile(name, config, {key: with_numbers(spec, fields.get(key)) for key, spec in flat.items()}, command)
    unloaded = plugins_of_trials(sweep)
    problems += unloaded
    if not unloaded:  # Without a plugin, all that it adds is unknown.
        problems += [*setting_problems(config), *_parameter_problems(sweep)]
        problems += name_problems(name) if isinstance(name, str) else []
    if not problems:
        problems += [*_unlogged_metric(sweep), *_out_of_reach(sweep)]
    if problems:
        raise SweepError("\n".join(f"{source}: {problem}" for problem in dict.fromkeys(problems)))
    return sweep


def plugins_of_trials(sweep: SweepFile) -> list[str]:
    """Import the plugins of all trials. Return what is wrong with the first one that cannot be imported."""
    named = [layer[KEY] for layer in sweep.command.layers if layer is not None and KEY in layer]
    spec = sweep.parameters.get(KEY)
    if spec is not None and not form_problems(KEY, spec, None):  # Else reported with the other parameters.
        named += values_to_try(spec)
    return plugin_problems(named)


def _unlogged_metric(sweep: SweepFile) -> Iterator[str]:
    """Check that every trial logs the objectives, whatever the sweep chooses for it. Costs are always logged."""
    wanted = {each.name: place for place, each in enumerate(sweep.objectives) if each.name not in COSTS}
    for chosen, trial in sweep.trials(*DECIDE_FIGURES) if wanted else ():
        expected = ", ".join([*trial.logged_figures(), *(COSTS if sweep.several else ())])
        for name, place in wanted.items():
            if not trial.logs(name):
                key = f"metrics[{place}]" if sweep.several else "metric"
                yield f"{key}.name = {name!r}: a trial{_where(chosen)} does not log it; expected one of {expected}"
                return


def _out_of_reach(sweep: SweepFile) -> Iterator[str]:
    """Check that structured pruning reaches its target in each trial that starts from new weights."""
    from pruning.channels.reach import Reach  # Imports PyTorch.

    reach = Reach()
    for chosen, trial in sweep.trials(*DECIDE_REACH):
        if trial.init.checkpoint is None and trial.init.artifact is None:
            try:
                reach.check(trial, trial.prune)
            except ConfigError as error:
                yield f"{error}{_where(chosen)}"
                return


def check_places(sweep: SweepFile) -> None:
    """Check that the folders of images, checkpoints and feature networks that trials name are on this machine.

    Artifacts are only downloaded when a trial starts, but not without an API key.

    Raises:
        SweepError: with all that are not, one per line.
    """
    from agent.tracking.artifacts import open_source  # Imports PyTorch.
    from agent.tracking.environment import has_key
    from diffusion_core.evaluation.extractors.find import missing_extractors

    problems: dict[str, None] = {}
    for _, trial in sweep.trials(
        "data.", "init.", "distill.", "eval.extractors", "eval.figures", "eval.inception_weights", "preset"
    ):
        data = trial.data
        if DATASETS[data.name].path == "required" and data.path is not None and not Path(data.path).is_dir():
            problems[f"data.path = {data.path!r}: no such folder"] = None
        for section, parent in (("init.", trial.init), ("distill.", trial.distill)):
            try:
                open_source(parent.checkpoint, None if has_key() else parent.artifact, section)
            except CheckpointError as error:
                problems[str(error)] = None
        problems |= dict.fromkeys(missing_extractors(trial.eval))
    if problems:
        raise SweepError("\n".join(problems))


def _where(chosen: Mapping[str, Any]) -> str:
    return " with " + ", ".join(f"{key}={value}" for key, value in chosen.items()) if chosen else ""


def _parameter_problems(sweep: SweepFile) -> list[str]:
    """Return what is wrong with the parameters: their form, and the configurations that they make."""
    given, method = sweep.config.get("parameters"), sweep.config.get("method")
    if not isinstance(given, Mapping) or not given:
        return [f"parameters = {shortened(given)}: expected a mapping from knobs such as train.lr to their values"]
    fields = dict(list_knobs(TrialConfig))
    right: dict[str, dict[str, Any]] = {}
    problems = given_twice(given)
    for key, spec in sweep.parameters.items():
        wrong = form_problems(key, spec, method)
        known = key.partition(".")[0] in TrialConfig.model_fields
        if not known or ("." in key and key not in fields):
            wrong = [unknown_key(key, spec, fields)]
        problems += wrong
        if not wrong:
            right[key] = spec
    if method == "grid" and grid_size(right) > MAX_GRID:
        problems.append(f"parameters: {grid_size(right):,} combinations; expected at most {MAX_GRID:,} for method=grid")
    search = method_of(method)
    if search is not None and search.learns and not problems and all("value" in spec for spec in right.values()):
        problems.append(f"parameters: expected one that varies, for method={method} to search")
    return problems + _value_problems(replace(sweep, parameters=right))


def _value_problems(sweep: SweepFile) -> list[str]:
    """Return what is wrong with the configurations that the values of the parameters make."""
    problems: list[str] = []
    tried = {key: values_to_try(spec) for key, spec in sweep.parameters.items()}
    first = {key: values[0] for key, values in tried.items()}
    named = [name for name in map(str, tried.get("prune.method", [])) if name in methods()]
    for key, values in tried.items():
        for value in values:
            chosen = first | {key: value}
            try:
                config = sweep.trial(chosen)
                problems += _lost_values(sweep.command, chosen, config)
            except ConfigError as error:
                problems += [problem + _about_exponents(sweep, problem) for problem in error.problems]
            else:
                problems += unheard(config.prune, named or [config.prune.method])
                problems += without_effect(config.steps, [str(name) for name in tried.get("steps.method", [])])
    return problems


def _about_exponents(sweep: SweepFile, problem: str) -> str:
    exponents = sweep.parameters.get(problem.partition(" = ")[0], {}).get("distribution") in EXPONENTS
    return "; min and max are exponents of e: log_uniform_values takes the values" if exponents else ""


def _lost_values(command: TrialCommand, chosen: Mapping[str, Any], config: TrialConfig) -> Iterator[str]:
    """Yield one line if a value that the sweep chose for a trial is another one in the trial's configuration."""
    if command.passes_all:
        return
    wanted, got = flatten(build_config(*command.values(chosen), chosen)), flatten(config)
    for key, value in wanted.items():
        if value != got[key] and (key in chosen or key.partition(".")[0] in chosen):
            if value is False:
                yield f"{key} = False: the command leaves out false values, and {got[key]} is used; use ${{args}}"
            else:
                yield f"command = '{key}={got[key]}': overrides what the sweep chooses; put it before the parameters"
            return
