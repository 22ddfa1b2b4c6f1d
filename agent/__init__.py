"""The thin agent: the only place where configuration, model, pruner and W&B meet.

``python -m agent`` runs one trial, ``python -m agent.sweep`` a sweep of them.
"""

import sys

from diffusion_core.signals import leave_at_once, remember_if_handed_out

if sys.argv[:1] == ["-m"]:  # Python is looking for the module of `python -m agent`, whose imports take seconds.
    if sys.orig_argv[-len(sys.argv)].endswith("agent"):  # Or -magent; not agent.sync.
        remember_if_handed_out()  # Before there is a handler: the signal may come at once.
    leave_at_once()
