"""Several trials on one machine: how they share it, and processes that do not outlive their parent."""
