"""Sweeps: read a sweep file, run its trials online or offline, report what they reached."""
