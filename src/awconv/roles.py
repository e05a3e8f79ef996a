"""What a setting decides. The class that has an argument declares its role in ``roles``."""

from __future__ import annotations

import enum


class Role(enum.IntEnum):
    """What depends on a setting; each role includes those before it.

    Two trainings give the same result if they agree in what decides the result. A training goes on from the checkpoint
    of another one if both agree in what decides the steps. Weights fit if both agree in what decides the network.
    """

    NOTHING = 0
    """Speed, messages and files."""
    RESULT = 1
    """What comes of the training, though each step would be the same: its length."""
    STEPS = 2
    """Each step."""
    NETWORK = 3
    """Which weights there are, and what they mean."""
    DATA = 4
    """The same, where the data decide it: nobody sets it."""
