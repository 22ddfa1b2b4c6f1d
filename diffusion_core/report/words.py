"""The sentences of a report."""

from __future__ import annotations

from collections.abc import Sequence

from diffusion_core.report.findings import Candidate, equal_to, front_of_objectives
from diffusion_core.report.study import ENDED, SHARES, Study
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
    equal = equal_to(winner, ranked)
    others, unmeasured = len(ranked) - 1, sum(other.interval is None for other in ranked)
    if others and winner.interval is None:
        spread = "One trial does not tell" if len(winner.trials) == 1 else "Equal values of all its seeds do not tell"
        found.append(
            f"{spread} how much {study.metric} varies, so no other trial can be called equal or worse: "
            "repeat the best trials with other seeds."
        )
    elif others:
        some = "The other one" if others == 1 else f"{len(equal)} of the {others} others"
        rest = "The other one differs from it" if others == 1 else "The others differ from it"
        which = f"{some} cannot be told from it" if equal else rest
        zero = "contains" if equal else "does not contain"
        found.append(
            f"{which}: the 95% interval of the difference {zero} zero."
            + (f" {unmeasured} have no interval and were not compared." if unmeasured else "")
        )
    if study.metric in SHARES and winner.interval is not None and len(winner.trials) == 1:
        found.append("The interval covers the draw of the images, not the seed of the training.")
    if others and len(winner.trials) == 1:
        found.append(f"It was chosen as the best of {len(ranked)}, which flatters its figure.")
    protocols = {trial.protocols.get(study.metric) for group in ranked for trial in group.trials}
    if len(protocols) > 1:
        count = f"there are {len(protocols)} protocols"
        found.append(f"{study.metric} was not measured in the same way in all trials: {count}.")
    if any(trial.state not in ENDED for trial in winner.trials):
        found.append("It has not ended.")
    return found
