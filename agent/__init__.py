"""The thin agent: the only place where configuration, model, pruner and W&B meet.

``python -m agent`` runs one trial, ``python -m agent.sweep`` a sweep of them.
"""

import sys

from diffusion_core.signals import leave_at_once

if sys.argv[:1] == ["-m"]:  # Python is looking for the module of `python -m agent`, whose imports take seconds.
    leave_at_once(of_trial=sys.orig_argv[-len(sys.argv)].endswith("agent"))  # The module: `agent`, or `agent.sweep`.
