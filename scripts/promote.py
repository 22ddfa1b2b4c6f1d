"""Link the best model of a sweep, or any model, to a collection of your organization's W&B registry."""

from __future__ import annotations

if __name__ == "__main__":
    from diffusion_core.signals import leave_at_once

    leave_at_once()  # Until main handles signals: the imports take seconds.


from agent.command import fail, run_and_leave
from agent.tracking.environment import has_key, load_environment
from agent.tracking.registry import best_model, promote
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.messages import Parser


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--sweep", metavar="ENTITY/PROJECT/ID", help="the best model of its best run, by its metric")
    source.add_argument("--artifact", metavar="NAME:ALIAS", help="a model, such as model-RUN_ID:best")
    parser.add_argument("--collection", required=True, metavar="NAME", help="made if there is none")
    parser.add_argument("--registry", default="model", metavar="[ORG/]NAME", help="the registry (model)")
    parser.add_argument("--alias", action="append", default=[], help="such as production; may be given again")
    arguments = parser.parse_args(argv)
    load_environment()
    try:
        if not has_key():
            raise CheckpointError("WANDB_API_KEY = None: set it (see .env.example), or run `wandb login`")
        name = arguments.artifact or best_model(arguments.sweep)
        target = promote(name, arguments.registry, arguments.collection, arguments.alias)
    except CheckpointError as error:
        return fail(str(error))
    print(f"{name} is in {target}")
    return 0


if __name__ == "__main__":
    run_and_leave(main, interruptible=True)
