"""Noise schedules, the parametrisation of the network, losses, and random draws."""
