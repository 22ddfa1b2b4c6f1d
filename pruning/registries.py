"""The registries of pruning. The named modules register the built-in records at the first look-up.

The records are :class:`pruning.masks.build.MaskRecord` and :class:`pruning.channels.importance.ImportanceRecord`.
"""

from __future__ import annotations

from typing import Any

from diffusion_core.registry import Registry

MASK_STRATEGIES: Registry[Any] = Registry("prune.method", "pruning.masks.build")
IMPORTANCES: Registry[Any] = Registry("prune.importance", "pruning.channels.importance")
