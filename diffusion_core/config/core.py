"""The core's configuration as a whole, and the figures that it makes a run log."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Annotated, Self

from pydantic import Field, model_validator

from diffusion_core.config.checks import combination_problems
from diffusion_core.config.knobs import (
    FIGURE_PARTS,
    CheckpointConfig,
    DataConfig,
    DiffusionConfig,
    EmaConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    SampleConfig,
    Section,
    TrainConfig,
)
from diffusion_core.config.metrics import LOSS_BUCKETS, count_name, goal_of, space_figure
from diffusion_core.registries import DATASETS

PLUGIN_NAME = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$"


class CoreConfig(Section):
    """What the core needs to train and sample one model."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of every random draw: weights, batches, noise, dropout, samples. (What is held out never changes.)"""
    plugins: list[Annotated[str, Field(pattern=PLUGIN_NAME)]] = Field(default=[])
    """Your own Python modules that add samplers, schedules, data sets and so on (docs/extending.md); imported before
    the configuration is checked."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    train: TrainConfig = TrainConfig()
    ema: EmaConfig = EmaConfig()
    sample: SampleConfig = SampleConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        """Combinations that cannot work, each as one line for the user."""
        yield from combination_problems(
            self.data, self.model, self.diffusion, self.train, self.ema, self.sample, self.eval
        )
        metric = self.checkpoint.best_metric
        if metric == "eval/class_agreement" and not self.has_classifier:
            yield (
                "checkpoint.best_metric = 'eval/class_agreement': needs a classifier: data.name=digits or "
                "eval.classifier=network, and model.class_conditional=true"
            )
        elif not self.logs(metric):
            yield f"checkpoint.best_metric = {metric!r}: expected one of {', '.join(self.logged_figures())}"

    @property
    def has_classifier(self) -> bool:
        """Whether generated images are shown to a classifier."""
        choice = self.eval.classifier
        wanted = choice == "network" or (choice == "auto" and DATASETS[self.data.name].quick_classifier)
        return wanted and self.model.class_conditional

    @property
    def judges_images(self) -> bool:
        """Whether images are generated to be judged."""
        return self.has_classifier or self.eval.in_features or "synthetic_accuracy" in self.eval.figures

    def logs(self, metric: str) -> bool:
        """Whether a figure that is better one way is among those that this configuration logs."""
        return goal_of(metric) is not None and any(fnmatchcase(metric, name) for name in self.logged_figures())

    def logged_figures(self) -> list[str]:
        """Names of the figures that are better one way, by pattern (``*``) where a file or a data set decides."""
        wanted, count, reference = self.eval.figures, self.eval.num_images, self.eval.reference
        names = ["train/loss", "val/loss"]
        if "loss_by_timestep" in wanted:
            names += [f"val/loss_t{part}" for part in range(LOSS_BUCKETS)]
        if self.has_classifier:
            names.append("eval/class_agreement")
        if "synthetic_accuracy" in wanted:
            names.append(f"eval/synthetic_accuracy_{count_name(count)}")
        for space in self.eval.space_names(self.data.name):
            for figure in wanted:
                for part in FIGURE_PARTS.get(figure, ()):
                    names += _space_figures(part, space, count, None if part == "score" else reference, self.data.name)
        if "per_class" in wanted:
            names.append(f"eval/f*_{reference}/*")
        return list(dict.fromkeys(names))


def _space_figures(figure: str, space: str, count: int, reference: str | None, data: str) -> list[str]:
    """What a figure may be called: a distance to few real images is not called FID, and how many there are in a folder
    is known once it is read.
    """
    least = DATASETS[data].least_images
    sizes = [1, count] if least is None else [least]
    return [space_figure(figure, space, count, reference, size) for size in sizes]
