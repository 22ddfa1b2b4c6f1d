"""Knobs of step distillation that are set although no method uses them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from diffusion_core.config.knobs import StepsConfig
from diffusion_core.registries import STEP_METHODS


def without_effect(steps: StepsConfig, tried: Collection[str] = ()) -> Iterator[str]:
    """Yield the knobs ``steps.*`` that are set although no method uses them, each as one line for the user.

    Args:
        steps: the knobs.
        tried: the methods that a sweep tries; empty: ``steps.method`` only.
    """
    methods = [name for name in tried if name in STEP_METHODS] or [steps.method]
    used = [STEP_METHODS[name].knobs for name in methods if name in STEP_METHODS]
    special = frozenset[str]().union(*(record.knobs for record in STEP_METHODS.values()))
    for name, field in StepsConfig.model_fields.items():
        value = getattr(steps, name)
        if name == "method" or value == field.default or (used and (name not in special or name in set().union(*used))):
            continue
        users = " or ".join(key for key, record in STEP_METHODS.items() if name in record.knobs or name not in special)
        now = " or ".join(methods)
        yield f"steps.{name} = {value!r}: has no effect with steps.method={now}; drop it or use {users}"
    if steps.huber_c is not None and steps.loss != "pseudo_huber" and used:
        yield f"steps.huber_c = {steps.huber_c}: has no effect with steps.loss={steps.loss}; use pseudo_huber"
