"""The parsers of commands: arguments of a function, as options and positional arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from awconv.extras import require
from awconv.usage import Strict, UsageError, explained, subparsers


@dataclass(frozen=True)
class Positional:
    """A command's positional argument.

    Attributes:
        name: of the function's argument.
        help: for ``--help``.
        several: whether several may be given.
        optional: whether none need be given.
        type: makes the argument of its text.
    """

    name: str
    help: str
    several: bool = False
    optional: bool = False
    type: Callable[[str], Any] = Path


def imported(function: str) -> Callable[..., int]:
    module, _, name = function.partition(":")
    found: Callable[..., int] = getattr(import_module(module), name)
    return found


def first_line(function: Callable[..., int]) -> str:
    return (function.__doc__ or "").split("\n")[0]


def add_arguments(
    parser: Any,
    function: Callable[..., int],
    positionals: Sequence[Positional | None],
    skip: set[str] | None = None,
) -> None:
    skip = skip or set()
    for positional in filter(None, positionals):
        kinds = {(True, True): "*", (True, False): "+", (False, True): "?"}
        number = kinds.get((positional.several, positional.optional))
        given = {} if number is None else {"nargs": number}
        parser.add_argument(positional.name, type=positional.type, help=positional.help, **given)
        skip |= {positional.name}
    parser.add_function_arguments(function, skip=skip)


def positional_first(arguments: Sequence[str]) -> list[str]:
    """Positional arguments before the options: the parser takes those of both kinds only where they stand together.

    Each option has a value, after ``=`` or a blank.
    """
    taken = [argument.startswith("--") and "=" not in argument for argument in arguments]
    positional = [
        not argument.startswith("-") and not (index and taken[index - 1]) for index, argument in enumerate(arguments)
    ]
    pairs = list(zip(arguments, positional, strict=True))
    return [argument for argument, first in pairs if first] + [argument for argument, first in pairs if not first]


def make_parser(**kwargs: Any) -> Any:
    jsonargparse = require("jsonargparse", extra="train")

    class CommandParser(Strict, jsonargparse.ArgumentParser):  # type: ignore[misc, name-defined]
        """Raises errors in place of printing the usage."""

    return CommandParser(**kwargs)


def parse(parser: Any, arguments: Sequence[str], passing_on: str = "") -> dict[str, Any]:
    """Parses. ``passing_on`` is how arguments are passed on to ``awconv fit``, if they are."""
    from awconv.yaml_files import bounded_yaml

    try:
        with bounded_yaml():
            parsed: dict[str, Any] = parser.parse_args(with_values(parser, arguments)).as_dict()
    except UsageError as error:
        subject = f" {arguments[0]}" if arguments else ""
        inner = next((one for one in subparsers(parser) if subject and one.prog.endswith(subject)), parser)
        raise UsageError(explained(str(error), inner, arguments, passing_on)) from error
    return parsed


def made(function: Callable[..., int], parsed: dict[str, Any]) -> dict[str, Any]:
    """Parsed arguments of a function, with those that are dataclasses made of their values.

    Raises:
        UsageError: of a dataclass, for values out of their range.
    """
    hints = get_type_hints(function)
    return {
        name: hints[name](**value) if is_dataclass(hints.get(name)) and isinstance(value, dict) else value
        for name, value in parsed.items()
    }


def with_values(parser: Any, arguments: Sequence[str]) -> list[str]:
    """Arguments in which an option that is true or false, and stands alone, is true."""
    known = {
        name: option for one in (parser, *subparsers(parser)) for name, option in one._option_string_actions.items()
    }
    flags = {name for name, option in known.items() if getattr(option, "_typehint", None) is bool}
    following = [*arguments, "--"][1:]
    return [
        f"{argument}=true" if argument in flags and after.lower() not in ("true", "false", "yes", "no") else argument
        for argument, after in zip(arguments, following, strict=True)
    ]


class AnyPath:
    """Makes a Path. Given the class itself, jsonargparse would write it as UTF-8, which file names need not be."""

    def __call__(self, name: str) -> Path:
        return Path(name)

    def __repr__(self) -> str:
        return "path"
