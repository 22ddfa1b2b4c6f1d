"""Values of the knobs by name: starting points that suit a data set (what is given besides overrides them), and ways to
say what the network learns.
"""

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
    # The network of cifar10, trained in minutes: docs/results.md, "Four minutes of a GPU".
    "cifar10-fast": {
        "model.dropout": 0.0,
        "diffusion.schedule": "cosine",
        "diffusion.prediction": "v",
        "diffusion.weighting": "min_snr",
        "train.steps": 4000,
        "train.batch_size": 256,
        "train.lr": 6e-4,
        "train.lr_schedule": "cosine",
        "train.warmup_steps": 200,
        "ema.decay": 0.998,
        "sample.sampler": "dpmpp_2m",
        "sample.steps": 25,
        "sample.guidance": 1.5,
    },
}

PRESET_HELP = {
    "cifar10": "the defaults: the model of Ho et al. 2020, class-conditional, on CIFAR-10 (downloaded once); for GPUs",
    "cifar100": "the same on CIFAR-100",
    "mnist": "a smaller model for MNIST (downloaded once), 20,000 steps",
    "digits": "a small model for the digits of scikit-learn (built in), half a minute on two cores",
    "cifar10-fast": "the model of cifar10 in 4,000 steps of 256: four minutes of an H100",
}
"""What each preset is, in one line."""

FORMULATIONS: dict[str, dict[str, Any]] = {
    "eps": {},
    "v": {"diffusion.prediction": "v"},
    "x0": {"diffusion.prediction": "x0"},
    "EDM": {
        "diffusion.schedule": "karras",
        "diffusion.prediction": "edm",
        "diffusion.weighting": "edm",
        "diffusion.timestep_sampling": "lognormal",
    },
    "learned variance": {"model.learned_variance": True},
    "self-conditioning": {"model.self_conditioning": True},
    "zero terminal SNR": {"diffusion.zero_terminal_snr": True, "diffusion.prediction": "v"},
    "min-SNR": {"diffusion.schedule": "cosine", "diffusion.weighting": "min_snr"},
    "P2, L1": {"diffusion.schedule": "sigmoid", "diffusion.weighting": "p2", "diffusion.loss": "l1"},
    "shifted cosine, Huber, offset noise": {
        "diffusion.schedule": "cosine",
        "diffusion.logsnr_shift": 1.4,
        "diffusion.prediction": "v",
        "diffusion.loss": "huber",
        "diffusion.offset_noise": 0.1,
        "model.conditioning": "scale_shift",
    },
}
"""What the network learns, and how: what the scripts that compare formulations train."""
