"""The launcher ``slurm``: jobs of a cluster, how they are submitted, followed and told to end."""
