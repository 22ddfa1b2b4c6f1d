"""The core's configuration as a whole, and the figures that it makes a run log."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Annotated, Self

from pydantic import Field, model_validator

from diffusion_core.config.checks import combination_problems, upsampling_problems
from diffusion_core.config.knobs import (
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
    UpsampleConfig,
)
from diffusion_core.config.metrics import goal_of
from diffusion_core.registries import DATASETS, METRICS

PLUGIN_NAME = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$"


class CoreConfig(Section):
    """What the core needs to train and sample one model."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of every random draw: weights, batches, noise, dropout, samples. (What is held out never changes.)"""
    draws: Annotated[int, Field(ge=1, le=3)] = 3
    """Version of the random draws of training and sampling: 3 are the same on every device, with other noise for each
    model of a chain; 2 share noise between the models of a chain; 1 are those of PyTorch. Runs and models of earlier
    versions keep theirs."""
    plugins: list[Annotated[str, Field(pattern=PLUGIN_NAME)]] = Field(default=[])
    """Your own Python modules that add samplers, schedules, data sets and so on (docs/extending.md); imported before
    the configuration is checked."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    upsample: UpsampleConfig = UpsampleConfig()
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
        yield from upsampling_problems(self.upsample, self.data.image_shape[1])
        metric = self.checkpoint.best_metric
        if metric == "eval/class_agreement" and not self.has_classifier:
            yield (
                "checkpoint.best_metric = 'eval/class_agreement': needs a classifier: data.name=digits or "
                "eval.classifier=network, and model.class_conditional=true"
            )
        elif not self.logs(metric):
            default = "" if "best_metric" in self.checkpoint.model_fields_set else ", the default, is not measured here"
            yield f"checkpoint.best_metric = {metric!r}{default}: expected one of {', '.join(self.logged_figures())}"

    @property
    def has_classifier(self) -> bool:
        """Whether generated images are shown to a classifier."""
        choice = self.eval.classifier
        wanted = choice == "network" or (choice == "auto" and DATASETS[self.data.name].quick_classifier)
        return wanted and self.model.class_conditional

    @property
    def judges_images(self) -> bool:
        """Whether images are generated to be judged."""
        return self.has_classifier or any(METRICS[figure].of_images for figure in self.eval.figures)

    def logs(self, metric: str) -> bool:
        """Whether a figure that is better one way is among those that this configuration logs."""
        return goal_of(metric) is not None and any(fnmatchcase(metric, name) for name in self.logged_figures())

    def logged_figures(self) -> list[str]:
        """Names of the figures that are better one way, by pattern (``*``) where a file or a data set decides."""
        names = ["train/loss", "val/loss", *(["eval/class_agreement"] if self.has_classifier else [])]
        for figure in self.eval.figures:
            names += METRICS[figure].names(figure, self.eval, self.data)
        return list(dict.fromkeys(names))
