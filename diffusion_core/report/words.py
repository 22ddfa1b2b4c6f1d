"""The sentences of a report."""

from __future__ import annotations

import re
from collections.abc import Sequence

from diffusion_core.config.ranking import BROKEN, ENDED
from diffusion_core.report.findings import Candidate, equal_to, front_of_objectives
from diffusion_core.report.study import SHARES, Study
from diffusion_core.runs.inputs import differing_inputs
from diffusion_core.search.objectives import goals_in_words
from diffusion_core.tables import cell

BETTER = {"minimize": "lower is better", "maximize": "higher is better"}


def headline(study: Study, winner: Candidate | None) -> str:
    """Return the result in one sentence: the Pareto front of several objectives, or the winner with its uncertainty."""
    if (front := front_of_objectives(study)) is not None:
        count = f"{len(front.trials)} of {len(study.trials)} trials"
        return f"{count} are on the Pareto front of {goals_in_words(study.objectives)}."
    return best_in_words(study, winner)


def best_in_words(study: Study, winner: Candidate | None) -> str:
    """Return which trial is the best by the metric, with its uncertainty, in one sentence."""
    if winner is None and study.trials and all(trial.state in BROKEN for trial in study.trials):
        return "All trials failed, so none is the best."
    if winner is None or study.metric is None:
        return f"No trial has a value of {study.metric} yet." if study.metric else "No figure of quality was measured."
    step = f" at step {winner.best.step:,}" if winner.best.step is not None else ""
    verb = "leads" if study.running else "is the best"
    return f"{winner.best.name} {verb}: {study.metric} {winner.text()} ({BETTER[study.goals[study.metric]]}){step}."


def notes(study: Study, winner: Candidate | None, ranked: Sequence[Candidate]) -> list[str]:
    """Return what a reader must know to judge the headline."""
    found = []
    if (front := front_of_objectives(study)) is not None:
        ends = zip(study.objectives, front.reference, strict=True)
        reference = ", ".join(f"{each.name} {cell(end)}" for each, end in ends)
        found.append(f"It dominates a hypervolume of {front.volume:.6g}, measured from {reference}.")
        found += [best_in_words(study, winner)] if winner is not None else []
    if winner is None or study.metric is None:
        return found
    found += _comparison(study.metric, winner, ranked)
    others = len(ranked) - 1
    if study.metric in SHARES and winner.interval is not None and len(winner.trials) == 1:
        found.append("The interval covers the draw of the images, not the seed of the training.")
    if others and len(winner.trials) == 1:
        found.append(f"It was chosen as the best of {len(ranked)}, which flatters its figure.")
    protocols = {_without_seed(trial.protocols.get(study.metric)) for group in ranked for trial in group.trials}
    if len(protocols) > 1:
        count = f"there are {len(protocols)} protocols"
        found.append(f"{study.metric} was not measured in the same way in all trials: {count}.")
    for key, taken in differing_inputs(trial.inputs for group in ranked for trial in group.trials):
        found.append(f"Trials of the same {key} took different ones, so they cannot be compared: {'; '.join(taken)}.")
    if any(trial.state not in ENDED for trial in winner.trials):
        found.append("It has not ended.")
    return found


def _without_seed(protocol: str | None) -> str | None:
    """Return a protocol without the seed of its images: other draws are no other way to measure."""
    return None if protocol is None else re.sub(r"(^|, )seed=-?\d+(?=,|$)", "", protocol)


def _comparison(metric: str, winner: Candidate, ranked: Sequence[Candidate]) -> list[str]:
    """Return how many of the others cannot be told from the winner, in one sentence; empty if there are no others."""
    others, again = len(ranked) - 1, "repeat the best trials with other seeds"
    if others == 0:
        return []
    if winner.interval is None:
        spread = "One trial does not tell" if len(winner.trials) == 1 else "Equal values of all its seeds do not tell"
        return [f"{spread} how much {metric} varies, so no other trial can be called equal or worse: {again}."]
    compared = sum(other is not winner and other.interval is not None for other in ranked)
    if compared == 0:
        none = "The other one has" if others == 1 else f"The {others} others have"
        return [f"{none} no interval of {metric}, so nothing could be compared with it: {again}."]
    equal = len(equal_to(winner, ranked))
    measured = "" if compared == others else " that have an interval" if compared > 1 else " that has an interval"
    if compared == 1:
        which = f"The other one{measured} {'cannot be told' if equal else 'differs'} from it"
    elif equal:
        which = f"{equal} of the {compared} others{measured} cannot be told from it"
    else:
        which = f"The {compared} others{measured} differ from it"
    zero = "contains" if equal else "does not contain"
    left = others - compared
    rest = f" {left} more {'has' if left == 1 else 'have'} none and could not be compared." if left else ""
    return [f"{which}: the 95% interval of the difference {zero} zero.{rest}"]
