"""SLURM: the script of a job, its submission, and what became of it."""
