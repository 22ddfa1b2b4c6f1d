"""Why a trial was told to stop: somebody wants it to end, or its machine is being taken away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    """Whether a user or early termination asked W&B to end this run, by the server's word.

    A signal alone does not tell: an agent ends a run with the same SIGTERM that a cluster sends before it takes a
    machine away. A server that does not answer within :data:`ANSWER_WITHIN_S` counts as no: a run that is handed back
    in vain costs less than one that is lost.
    """
    if is_offline(run):
        return False
    import wandb

    try:
        # The public API has no name for these two fields.
        service = wandb.Api(timeout=ANSWER_WITHIN_S)._service_api
        names = {"entity": run.entity, "project": run.project, "run": run.id}
        answer: Any = service.execute_graphql(QUERY, variables=names, timeout=ANSWER_WITHIN_S)
        state = answer["project"]["run"]
        return bool(state["shouldStop"] or state["stopped"])
    except Exception:
        return False
