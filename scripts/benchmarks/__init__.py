"""The subjects of ``scripts/benchmark.py``, one module each."""
