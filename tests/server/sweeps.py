"""Sweeps and their agents: who gets which run, which run has to stop, and when a sweep is over."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import yaml

from . import search
from .filters import flatten_summary, matches, order_by
from .graphql import Handler, Json, OperationError, connection
from .store import TERMINAL_STATES, Agent, Project, Run, Sweep, decode_id, iso, random_id

if TYPE_CHECKING:
    from .backend import Backend


class SweepOperations:
    """What `wandb sweep`, `wandb agent` and the public API do with sweeps."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.store = backend.store

    def handlers(self) -> dict[str, Handler]:
        return {
            "upsertSweep": self.upsert,
            "createAgent": self.create_agent,
            "agentHeartbeat": self.heartbeat,
            "enqueueSweepRun": self.enqueue,
        }

    # Writing

    def upsert(self, args: Json) -> Json:
        given = args["input"]
        if "id" in given:
            key = given["id"]
            sweep = self.store.sweeps.get(key) or self.store.sweeps[decode_id(key).split(":")[1]]
        else:
            config = yaml.safe_load(given["config"])
            problems = search.violations(config)
            if problems:
                raise OperationError("invalid sweep config: " + "; ".join(problems))
            project = self.store.project(given.get("entityName"), given.get("projectName"))
            sweep = Sweep(random_id(), project, given["config"], config)
            self.store.sweeps[sweep.id] = sweep
            if "priorRunsFilters" in given:
                query = json.loads(given["priorRunsFilters"])
                runs = [run for run in self.store.runs.values() if run.project is project]
                sweep.prior_runs = [run for run in runs if matches(run, _run_name, query)]
        if "config" in given:
            sweep.config_yaml, sweep.config = given["config"], yaml.safe_load(given["config"])
        sweep.state = given.get("state", sweep.state)
        sweep.display_name = given.get("displayName") or sweep.config.get("name") or sweep.display_name
        sweep.description = given.get("description", sweep.description)
        sweep.controller = given.get("controller", sweep.controller)
        sweep.scheduler = given.get("scheduler", sweep.scheduler)
        sweep.updated_at = time.time()
        return {"sweep": self.node(sweep), "configValidationWarnings": search.warnings_about(sweep.config)}

    def adopt(self, run: Run, sweep_id: str) -> None:
        """A client says that its run belongs to a sweep: one that was handed out, or one of its own making."""
        sweep = self.store.sweeps.get(sweep_id)
        if sweep is None:
            raise OperationError(f"sweep {sweep_id} not found", status=404)
        run.sweep_id = sweep_id
        if run not in sweep.runs:
            sweep.runs.append(run)

    def requeue(self, run: Run) -> None:
        """A preempted run waits for the next agent that asks."""
        sweep = self.store.sweeps[run.sweep_id or ""]
        if run not in sweep.requeued:
            sweep.requeued.append(run)

    def enqueue(self, args: Json) -> Json:
        """`wandb sweep-scheduler` has chosen a trial, which waits for the next agent that asks."""
        given = args["input"]
        sweep = self.store.sweeps[decode_id(given["id"]).split(":")[1]]
        parameters = json.loads(given["config"])
        run = Run(random_id(), sweep.project, sweep_id=sweep.id, suggested=parameters, raw_config=dict(parameters))
        run.display_name, run.state = given.get("displayName") or run.id, "pending"
        self.store.runs[run.id] = run
        sweep.runs.append(run)
        sweep.enqueued.append(run)
        return {"id": run.id, "runQueueItemId": run.id}

    def terminate_early(self, sweep_id: str) -> None:
        """Mark the runs that hyperband ends, as soon as there is new history: it looks at the last band only that a run
        has reached, and at an agent's next heartbeat a fast run would be beyond all that it could be compared with.
        """
        for run_id in search.to_stop(self.store.sweeps[sweep_id]):
            self.store.runs[run_id].stop_requested = True

    def create_agent(self, args: Json) -> Json:
        given = args["input"]
        sweep = self.store.sweeps.get(given["sweep"])
        if sweep is None:
            raise OperationError(f"sweep {given['sweep']} not found", status=404)
        agent = Agent(random_id(), sweep, given["host"])
        self.store.agents[agent.id] = agent
        return {"agent": self.agent_node(agent)}

    def heartbeat(self, args: Json) -> Json:
        """What an agent is to do. It is given a run only when it has none, and no answer to it is sent twice."""
        given = args["input"]
        agent = self.store.agents.get(decode_id(given["id"]))
        if agent is None or agent.sweep.id not in self.store.sweeps:
            raise OperationError("sweep not found", status=404)
        agent.heartbeat_at = time.time()
        alive = set(json.loads(given.get("runState") or "{}"))
        for run_id in sorted(agent.active - alive):
            if run_id in self.store.runs:
                self.backend.runs.lose(self.store.runs[run_id])
        agent.active = alive
        commands = self._stop_commands(agent) if alive else self._next_command(agent)
        return {"agent": self.agent_node(agent), "commands": json.dumps(commands)}

    def _stop_commands(self, agent: Agent) -> list[Json]:
        """Said at every heartbeat until the run is gone: the agent kills what ignores it for long."""
        if agent.sweep.state == "CANCELED":
            for run_id in agent.active:
                self.store.runs[run_id].stop_requested = True
        stopped = [run_id for run_id in sorted(agent.active) if self.store.runs[run_id].stop_requested]
        return [{"type": "stop", "run_id": run_id} for run_id in stopped]

    def _next_command(self, agent: Agent) -> list[Json]:
        sweep = agent.sweep
        if sweep.state == "PAUSED":
            return []
        if sweep.state == "RUNNING":
            if sweep.requeued:
                run = sweep.requeued.pop(0)
                return [self._hand_out(agent, run, "resume", run.raw_config)]
            if sweep.enqueued:
                run = sweep.enqueued.pop(0)
                return [self._hand_out(agent, run, "run", run.raw_config)]
            if "scheduler" in sweep.config:
                return []  # Until the scheduler says that the sweep is finished.
            suggested = self._suggest(sweep)
            if suggested is not None:
                run = Run(
                    random_id(), sweep.project, sweep_id=sweep.id, suggested=suggested, raw_config=dict(suggested)
                )
                run.display_name = f"sweep-run-{len(sweep.runs) + 1}"
                self.store.runs[run.id] = run
                sweep.runs.append(run)
                return [self._hand_out(agent, run, "run", suggested)]
            if all(run.state in TERMINAL_STATES for run in sweep.runs):
                sweep.state = "FINISHED"
        agent.exited = True
        return [{"type": "exit"}]

    def _suggest(self, sweep: Sweep) -> Json | None:
        cap = sweep.config.get("run_cap")
        if cap is not None and len(sweep.runs) >= cap:
            return None
        return search.suggest(sweep)

    def _hand_out(self, agent: Agent, run: Run, kind: str, arguments: Json) -> Json:
        run.state = "running"
        run.stop_requested = run.interrupt = False
        agent.active.add(run.id)
        agent.runs.append(run)
        return {"type": kind, "run_id": run.id, "program": agent.sweep.config.get("program"), "args": arguments}

    # Reading

    def project_fields(self, project: Project) -> Json:
        """The fields of a project that are about sweeps."""

        def sweeps() -> list[Sweep]:
            return [sweep for sweep in self.store.sweeps.values() if sweep.project is project]

        def sweep(args: Json) -> Json | None:
            found = self.store.sweeps.get(args["sweepName"])
            return self.node(found) if found and found.project is project else None

        return {
            "sweep": sweep,
            "sweeps": lambda args: connection(sweeps(), args, self.node),
            "totalSweeps": lambda args: len(sweeps()),
        }

    def node(self, sweep: Sweep) -> Json:
        def runs(args: Json) -> Json:
            return connection(sweep.runs, args, self.backend.runs.node)

        def agent(args: Json) -> Json | None:
            found = self.store.agents.get(args["agentName"])
            return self.agent_node(found) if found and found.sweep is sweep else None

        return {
            "__typename": "Sweep",
            "id": sweep.gql_id,
            "name": sweep.id,
            "project": lambda args: self.backend.projects.info(sweep.project),
            "displayName": sweep.display_name,
            "description": sweep.description,
            "method": sweep.config.get("method"),
            "state": sweep.state,
            "config": sweep.config_yaml,
            "controller": sweep.controller,
            "scheduler": sweep.scheduler,
            "controllerRunName": f"controller-{sweep.id}",
            "earlyStopJobRunning": False,
            "bestLoss": lambda args: _best_loss(sweep),
            "createdAt": iso(sweep.created_at),
            "updatedAt": iso(sweep.updated_at),
            "heartbeatAt": iso(sweep.updated_at),
            "runCount": len(sweep.runs),
            "runCountExpected": lambda args: search.expected_runs(sweep.config),
            "runs": runs,
            "agent": agent,
            "agents": lambda args: connection(
                [found for found in self.store.agents.values() if found.sweep is sweep], args, self.agent_node
            ),
        }

    def agent_node(self, agent: Agent) -> Json:
        return {
            "id": agent.gql_id,
            "name": agent.id,
            "host": agent.host,
            "state": "FINISHED" if agent.exited else "RUNNING",
            "totalRuns": len(agent.runs),
            "createdAt": iso(agent.created_at),
            "heartbeatAt": iso(agent.heartbeat_at),
            "runs": lambda args: connection(agent.runs, args, self.backend.runs.node),
        }


def _run_name(run: Run, key: str) -> str | None:
    return run.id if key == "name" else None


def _best_loss(sweep: Sweep) -> float | None:
    metric = sweep.config.get("metric", {})
    goal = metric.get("goal", "minimize")

    def value(run: Run, key: str) -> object:
        return flatten_summary(run.summary, goal).get(key)

    sign = "-" if goal == "maximize" else "+"
    best = order_by(sweep.runs, value, sign + metric["name"]) if "name" in metric else []
    loss = value(best[0], metric["name"]) if best else None
    return float(loss) if isinstance(loss, (int, float)) else None
