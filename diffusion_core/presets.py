"""Named starting points: values for the knobs that suit a data set. What is given besides overrides them."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # The defaults of the schema: Ho et al. 2020, class-conditional.
    "cifar10": {},
    "cifar100": {"data.name": "cifar100"},
    # 28 x 28: three resolutions, 28, 14 and 7.
    "mnist": {
        "data.name": "mnist",
        "model.channels": 64,
        "model.channel_multipliers": [1, 2, 2],
        "model.attention_resolutions": [7],
        "train.steps": 20_000,
        "train.warmup_steps": 500,
        "ema.decay": 0.999,
    },
    # scikit-learn's 8 x 8 digits, half a minute on two cores.
    "digits": {
        "data.name": "digits",
        "model.channels": 32,
        "model.channel_multipliers": [1, 2],
        "model.num_res_blocks": 1,
        "model.attention_resolutions": [4],
        "model.norm_groups": 8,
        "model.dropout": 0.0,
        "diffusion.schedule": "cosine",
        "train.steps": 500,
        "train.batch_size": 64,
        "train.lr": 2e-3,
        "train.lr_schedule": "cosine",
        "train.warmup_steps": 50,
        "ema.decay": 0.995,
        "sample.steps": 25,
        "sample.guidance": 2.0,
        "sample.every": 250,
        "eval.every": 250,
        "checkpoint.every": 250,
        "checkpoint.best_metric": "eval/class_agreement",
        "log.every": 25,
    },
}
