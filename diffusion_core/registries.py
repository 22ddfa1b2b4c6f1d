"""The core's registries, empty until they are asked: the named modules add the built-in records.

A registry's records are of the type that its module defines: ``SamplerRecord``, ``ScheduleRecord``,
``PredictionRecord``, ``DatasetRecord``, ``StepMethod``, ``SearchMethod``, ``LauncherRecord``; of metrics there are
``FeatureMetric``, ``ImageMetric``, ``LossMetric``.
"""

from __future__ import annotations

from typing import Any

from diffusion_core.registry import Registry

SAMPLERS: Registry[Any] = Registry("sample.sampler", "diffusion_core.sampling.samplers")
SCHEDULES: Registry[Any] = Registry("diffusion.schedule", "diffusion_core.diffusion.schedule")
PREDICTIONS: Registry[Any] = Registry("diffusion.prediction", "diffusion_core.diffusion.predictions")
DATASETS: Registry[Any] = Registry("data.name", "diffusion_core.data.datasets", "diffusion_core.data.labelled_folder")
STEP_METHODS: Registry[Any] = Registry("steps.method", "diffusion_core.step_distillation.methods")
METRICS: Registry[Any] = Registry("eval.figures", "diffusion_core.evaluation.metrics")
SEARCHES: Registry[Any] = Registry("method", "diffusion_core.search.engine", "diffusion_core.search.optuna_engine")
LAUNCHERS: Registry[Any] = Registry(
    "--launcher", "diffusion_core.machine.local", "diffusion_core.machine.slurm.launcher"
)
