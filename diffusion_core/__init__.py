"""Class-conditional denoising diffusion: data, network, schedules, samplers and the training loop.

Of use on its own: nothing here knows of sweeps or of pruning, and Weights & Biases is reached through
:mod:`diffusion_core.tracking` alone.
"""

__version__ = "0.1.0"
