"""The thin agent: the only place where configuration, model, pruner and W&B meet.

``python -m agent`` runs one trial, ``python -m agent.sweep`` a sweep of them.
"""
