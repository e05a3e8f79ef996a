"""Networks of one's own: a file or module that registers them with timm (``--import``)."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

_imported: dict[str, str] = {}  # digests by name, of this process


def import_own(names: Iterable[str]) -> dict[str, str]:
    """Runs files or modules that register networks with timm, each once.

    ::

        @timm.models.register_model
        def my_net(pretrained=False, num_classes=1000, in_chans=3, **kwargs):
            return MyNet(num_classes, in_chans)

    Args:
        names: paths of Python files, or names of modules, which are looked for in the current folder, too.

    Returns:
        The SHA-256 of each file, in hexadecimal digits, by its name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no such module, or it failed.
    """
    for name in names:
        if name not in _imported:
            module = _of_file(Path(os.path.expanduser(name))) if name.endswith(".py") else _of_name(name)
            _imported[name] = _digest(module)
    return {name: _imported[name] for name in names}


def _of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"import {path} is not a file; expected Python that registers networks with timm")
    there = sys.modules.get(path.stem)
    for module in (there, sys.modules.get("__main__")):  # a script may name itself
        if module is not None and Path(str(getattr(module, "__file__", None))).resolve() == path.resolve():
            return module
    name = path.stem if there is None else f"awconv_import_{len(_imported)}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # of a name that ends with .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where timm looks for it
    sys.path.insert(0, str(path.resolve().parent))  # for the modules beside it
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        _refuse(str(path), error)
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _of_name(name: str) -> ModuleType:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            _refuse(name, error)
        raise ValueError(
            f"import {name}: there is no such module in {here} or installed; the name of a file ends with .py"
        ) from error
    except BaseException as error:
        _refuse(name, error)
    finally:
        sys.path.remove(here)


def _refuse(name: str, error: BaseException) -> NoReturn:
    """Raises a ValueError for an error in somebody's code, but lets the end of the program through."""
    if not isinstance(error, Exception):
        raise error
    raise ValueError(f"import {name} failed: {type(error).__name__}: {error}") from error


def _digest(module: ModuleType) -> str:
    file = getattr(module, "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def as_names(given: str | Sequence[str] | None) -> list[str]:
    """The names in an argument or a recipe: a list, or text with commas between them."""
    parts = given.split(",") if isinstance(given, str) else list(given or ())
    return [part.strip() for part in parts if part.strip()]


def taken_out(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes ``--import`` out of arguments: what it names, and the other arguments."""
    names: list[str] = []
    others: list[str] = []
    following = iter(arguments)
    for argument in following:
        option, equals, value = argument.partition("=")
        if argument == "--":
            others += [argument, *following]
        elif option == "--import":
            names += as_names(value if equals else next(following, ""))
        else:
            others.append(argument)
    return names, others
