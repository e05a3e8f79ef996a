"""Runs of a comparison as jobs of SLURM. Needs the extra ``slurm``."""

from awconv.compare.slurm.options import SlurmOptions
from awconv.compare.slurm.trainer import OnSlurm

__all__ = ["OnSlurm", "SlurmOptions"]
