"""Networks of one's own: a file or module that registers them with timm (``--import``)."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import timm

_imported: dict[str, str] = {}  # digests by name, of this process
_TERMINATED = 128 + signal.SIGTERM  # how the program ends by that signal


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


def imported_for(network: str) -> list[str]:
    """What was imported in this process for a network; nothing for one of timm's or of this package."""
    package = timm.models.model_entrypoint(network).__module__.partition(".")[0]
    return [] if package in ("timm", "awconv") else list(_imported)


def _of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"import {path} is not a file; expected Python that registers networks with timm")
    path = path.resolve()
    main = sys.modules.get("__main__")
    if main is not None and Path(str(getattr(main, "__file__", None))).resolve() == path:
        return main  # a script that names itself
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()
    name = f"{path.stem}_{digest[:12]}" if _is_taken(path) else path.stem
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # of a name that ends with .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where timm looks for it
    with _searched(path.parent):  # for the modules beside it
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            _refuse(str(path), error)
    return module


def _is_taken(path: Path) -> bool:
    """Whether the name that a file has as a module belongs to another one, loaded or installed."""
    if path.stem in sys.modules:
        file = getattr(sys.modules[path.stem], "__file__", None)
    elif not path.stem.isidentifier():
        return False
    else:
        spec = importlib.util.find_spec(path.stem)
        if spec is None:
            return False
        file = spec.origin
    return file is None or Path(file).resolve() != path


@contextmanager
def _searched(folder: Path) -> Iterator[None]:
    """Looks for modules in a folder first; later, when functions import theirs, after all others."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):  # the code may have changed the path
            sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _of_name(name: str) -> ModuleType:
    here = Path.cwd()
    with _searched(here):
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


def _refuse(name: str, error: BaseException) -> NoReturn:
    """Raises a ValueError for an error in somebody's code, but lets signals through."""
    if isinstance(error, SystemExit) and error.code != _TERMINATED:
        raise ValueError(
            f"import {name} would end awconv by sys.exit; put what it runs as a program under if __name__ == '__main__'"
        ) from error
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
