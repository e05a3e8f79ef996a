"""Optional dependencies: an error that names the extra to install."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """Imports an optional module.

    Raises:
        ModuleNotFoundError: it is not installed; the message gives the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise ModuleNotFoundError(
            f"this part of awconv needs {module!r}, which is not installed: pip install 'awconv[{extra}]'",
            name=error.name,
        ) from error
