"""Find out why a trial was told to stop: to end for good, or because its machine is preempted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.tracking.api import ask
from agent.tracking.environment import is_offline

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

ANSWER_WITHIN_S = 5

QUERY = """
query StopCause($entity: String!, $project: String!, $run: String!) {
    project(name: $project, entityName: $entity) { run(name: $run) { shouldStop stopped } }
}
"""


def was_asked_to_end(run: Run) -> bool:
    """Ask the server whether a user or early termination stopped this run.

    The signal does not tell: an agent stops a run with the same SIGTERM that a cluster sends before preemption. No
    answer within :data:`ANSWER_WITHIN_S` counts as no. Repeating a run in vain costs less than losing one.
    """
    if is_offline(run):
        return False
    try:
        state = ask(run, QUERY, ANSWER_WITHIN_S)
        return bool(state["shouldStop"] or state["stopped"])
    except Exception:
        return False
