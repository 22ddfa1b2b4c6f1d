"""Train a student that samples in few steps: consistency tuning and progressive distillation."""
