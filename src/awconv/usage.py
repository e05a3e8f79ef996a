"""Arguments that cannot be parsed, explained in a line or two."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import reduce
from importlib import import_module
from operator import or_
from pydoc import locate
from typing import Any, NoReturn, get_args

_NEAR = 3  # names that are offered
_LENGTH = 300  # of a message of the parser's that is passed on
_SECTIONS = (
    "model",
    "data",
    "trainer",
    "seed_everything",
    "recent_checkpoint",
    "processes",
    "detections",
)  # of awconv fit


class UsageError(ValueError):
    """Arguments that cannot be parsed. The message says which, and what there is."""


class Strict:
    """For jsonargparse's parsers: options are written out, and an error is raised as :class:`UsageError`."""

    exit_on_error: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises."""
        if not self.exit_on_error:  # a parser within another one, which goes on
            super().error(message, ex)  # type: ignore[misc]
        raise UsageError(message) from ex


def near(given: str, known: Iterable[str]) -> list[str]:
    """The known names like the given one, the nearest first."""
    by_lower = {name.lower(): name for name in known}
    lower = given.lower()
    close = get_close_matches(lower, by_lower, _NEAR, 0.7) or get_close_matches(lower, by_lower, _NEAR, 0.6)
    inside = [name for name in by_lower if len(lower) > 2 and lower in name and name not in close]
    return [by_lower[name] for name in [*close, *inside][:_NEAR]]


def near_options(given: str, options: Collection[str]) -> list[str]:
    """The options like the given one: those of the same name in other sections, or else of the same section."""
    section, _, last = given.rpartition(".")
    same = [option for option in options if option.rpartition(".")[2] == last]
    inside = {option.rpartition(".")[2]: option for option in options if option.rpartition(".")[0] == section}
    return sorted(same)[:_NEAR] or [inside[name] for name in near(last, inside)] or near(given, options)


def is_option(name: str, options: Collection[str]) -> bool:
    """Whether there is an option, or one of dictionaries or classes of which this names a part."""
    if name in options:
        return True
    parts = name.split(".")
    parents = [".".join(parts[:end]) for end in range(1, len(parts))]
    # A section has options of its own, which are all that it takes.
    return any(parent in options and not _is_section(parent, options) for parent in parents)


def _is_section(name: str, options: Collection[str]) -> bool:
    return any(option.startswith(f"{name}.") and option != f"{name}.help" for option in options)


def unknown(name: str, options: Collection[str], dashes: str = "--") -> str:
    """Says that there is no such option, and which ones are like it."""
    found = [f"{dashes}{option}" for option in near_options(name, options)]
    what = "option" if dashes else "setting"
    return f"there is no {what} {dashes}{name}" + (f"; near it: {', '.join(found)}" if found else "")


def unwrapped(message: str) -> tuple[str, str]:
    """The message of a class's parser within that of the outer one, and the outer option with a dot behind it."""
    inner = re.match(
        r'Parser key "([^"]+)":.*?Problem with given class_path \'[^\']*\':\n(.*?)(?=\n    - Expected|\n  Given|$)',
        message,
        re.DOTALL,
    )
    return ("", message) if inner is None else (f"{inner[1]}.", inner[2].strip())


def invalid(message: str, classes: Mapping[str, Collection[str]] | None = None) -> str:
    """A message of jsonargparse about a value, in one line.

    Args:
        message: the message.
        classes: names of classes that options take, which may not be imported yet.
    """
    prefix, inner = unwrapped(message)
    option = re.match(r'Parser key "([^"]+)":', inner)
    value = re.search(r"(?:Given|Got) value: (.*)", inner, re.DOTALL)
    expected = [line for line in inner.splitlines() if re.match(r"[\s-]*(Expected an? |Subtypes: )", line)]
    help_on = re.match(r"--(\S+)\.help: Expected a dot import path string: (.*)", message)
    if help_on and (names := (classes or {}).get(help_on[1])):
        return _no_class(help_on[2], help_on[1], names)
    if option is None or value is None or not expected:
        return f"{prefix.removesuffix('.')}: {_shortened(inner)}" if prefix else _shortened(message)
    path = re.search(r"dot import path string: (.*)", inner)
    name, given = f"{prefix}{option[1]}", (path or value)[1].strip()
    text = next((line for line in expected if "Subtypes:" in line), expected[0]).partition("Got value")[0]
    names = (classes or {}).get(name) or _subclasses(text)
    if names:
        return _no_class(given, name, names)
    choices = [choice.strip("'\" ") for group in re.findall(r"Literal\[([^]]*)\]", text) for choice in group.split(",")]
    kinds = re.findall(r"(?<=<class ')[\w.]+|\b(?:dict|list)(?=\[)", text)
    wanted = list(dict.fromkeys([*choices, *(_KINDS.get(kind, kind.rpartition(".")[2]) for kind in kinds)]))
    found = near(given, choices)
    ending = f"; near it: {', '.join(found)}" if found else ""
    if not wanted:
        return _shortened(message)
    return f"{name} must be {', '.join(wanted[:-1])}{' or ' * (len(wanted) > 1)}{wanted[-1]}, got {given!r:.80}{ending}"


def _no_class(given: str, name: str, names: Collection[str]) -> str:
    found = near(given, names)
    offered = f"near it: {', '.join(found)}" if found else f"there are {', '.join(names)}"
    return f"there is no class {given!r:.80} for {name}; {offered}"


_KINDS = {"NoneType": "null", "int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}
_KINDS |= {"dict": "a mapping such as {key: value}", "list": "a list such as [1, 2]"}


def _subclasses(text: str) -> list[str]:
    """The names of the subclasses of the classes that a message expects."""
    found: set[str] = set()

    def add(kind: Any) -> None:
        for one in kind.__subclasses__():
            if not one.__name__.startswith("_"):
                found.add(one.__name__)
            add(one)

    for path in re.findall(r"(?:awconv|lightning|torch)[\w.]*\.[A-Z]\w*", text):
        kind = locate(path)
        if isinstance(kind, type):
            add(kind)
    return sorted(found)


def _shortened(message: str) -> str:
    text = " ".join(message.split())
    return text if len(text) <= _LENGTH else f"{text[:_LENGTH]} ..."


def subparsers(parser: Any) -> list[Any]:
    """The parsers of a parser's subcommands."""
    return [one for action in parser._actions if isinstance(action.choices, dict) for one in action.choices.values()]


def integers_first(parser: Any) -> None:
    """Lets a parser read ``1`` as a whole number where a number of either kind is allowed, and means something else.

    The types of ``Union[int, float]`` are tried in the order in which any library of the process first named them, for
    Python keeps one such type.
    """
    for option in parser._actions:
        kinds = get_args(getattr(option, "_typehint", None))
        if {int, float} <= set(kinds):
            option._typehint = reduce(or_, sorted(kinds, key=lambda kind: kind is float))


def explained(message: str, parser: Any, arguments: Sequence[str], passing_on: str) -> str:
    """A line or two in the place of a message of jsonargparse about a command's arguments.

    Args:
        message: the message.
        parser: of the command, or of its subcommand.
        arguments: those that were refused.
        passing_on: how arguments are passed on to ``awconv fit``, if they are.
    """
    options = {name[2:] for name in parser._option_string_actions if name.startswith("--")}
    for argument in arguments:
        name = argument[2:].partition("=")[0]
        if not argument.startswith("--") or is_option(name, options):
            continue
        if passing_on and name.partition(".")[0] in _SECTIONS:
            return f"--{name} is an option of awconv fit; those follow --, as in: {passing_on}{argument}"
        return unknown(name, options)
    missing = re.match(r"the following arguments are required: ([\w, ]+)$", message)
    if missing:
        actions = [action for action in parser._actions if action.dest in missing[1].split(", ")]
        named = [(action.option_strings or [action.dest])[-1] + f": {_plain(action.help)}" for action in actions]
        return f"missing: {' '.join('; '.join(named).split())}" if named else message
    if "data.help" in options:  # a data set's, whose options depend on it
        option = import_module("awconv.training.data_option")
        return str(option.explained_option(message, arguments, frozenset(options)))
    return invalid(message)


def _plain(text: str) -> str:
    return text.replace("``", "").rstrip(".")


def expanded(argument: str) -> str:
    """Expands ``~`` in ``--name=~/path``; a shell expands it only at the start of a word."""
    name, equals, value = argument.partition("=")
    return f"{name}={os.path.expanduser(value)}" if equals and value.startswith("~/") else argument


def is_text(argument: str) -> bool:
    """Whether an argument of the process is UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True
