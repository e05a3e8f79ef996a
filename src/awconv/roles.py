"""Roles of settings. A class declares the roles of its arguments in ``roles``."""

from __future__ import annotations

import enum


class Role(enum.IntEnum):
    """What a setting decides. A role includes those before it.

    Two trainings give the same result if their settings with the role ``RESULT`` or a later one agree. A training can
    resume from a checkpoint if those from ``STEPS`` on agree. Weights fit if those from ``NETWORK`` on agree.
    """

    NOTHING = 0
    """No result: speed, messages, files."""
    RESULT = 1
    """The result but not the steps, such as the number of epochs."""
    STEPS = 2
    """The steps of the training."""
    NETWORK = 3
    """The network, and so the meaning of its weights."""
    DATA = 4
    """The same, but the data set the value, such as the classes."""
