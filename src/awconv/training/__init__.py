"""Training by the command line: recipes, checkpoints, and what is watched (extra ``train``)."""

from awconv.extras import require

require("lightning", extra="train")

from awconv.training.cli import TrainingCLI

__all__ = ["TrainingCLI"]
