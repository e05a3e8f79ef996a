"""Says what is wrong with arguments of a training that the parser refused."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import docstring_parser

from awconv.training.find_task import data_sets, find_data, recipes
from awconv.training.settings import parameters
from awconv.usage import invalid, is_option, unknown, unwrapped
from awconv.yaml_files import parse_recipe, read_recipe

_DEFAULT = "Digits"


def explained(
    message: str, arguments: Sequence[str], options: frozenset[str], kinds: Mapping[str, type[Any]] | None = None
) -> str:
    """A line or two in the place of a message of jsonargparse.

    Args:
        message: the message.
        arguments: those that were refused.
        options: the names of the parser's options, without those of the class of data.
        kinds: the classes of data that there are, by name; by default those of all tasks.
    """
    known = kinds or {name: kind for kinds in data_sets().values() for name, kind in kinds.items()}
    kind = known.get(find_data(arguments) or _DEFAULT)
    if kind is not None:
        of_data = (
            name for name, one in parameters(kind).items() if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
        )
        options |= {f"data.{name}" for name in ("class_path", "init_args", *of_data) if name != "self"}
    for where, given in _names(arguments):
        name = _short(given)
        if kind is None and name.startswith("data."):
            continue  # the class is what is wrong
        if not is_option(name, options):
            return f"recipe {where}: {unknown(name, options, dashes='')}" if where else unknown(name, options)
    refused = re.match(r"Subcommand '\w+' does not accept option '([^']+)'", message)  # as in --model='{lrr: 1}'
    if refused:
        return unknown(refused[1], options, dashes="")
    stray = re.match(r"unrecognized arguments: ((?!--)\S+)", message)
    if stray:
        return f"{stray[1]!r:.80} is no option: options are written as --NAME=VALUE"
    missing = re.match(r"the following arguments are required: ([\w, ]+)$", unwrapped(message)[1])
    if missing and kind is not None:
        return "; ".join(_missing(kind, name) for name in missing[1].split(", "))
    wrong = invalid(message, {"data": sorted(known)})
    key = re.match(r'Parser key "([^"]+)"', unwrapped(message)[1])
    name = unwrapped(message)[0] + (key[1] if key else "")
    places = [where for where, given in _names(arguments) if f"{_short(given)}.".startswith(f"{name}.")]
    return f"recipe {places[-1]}: {wrong}" if name and places and places[-1] else wrong


def _short(name: str) -> str:
    return name.replace("data.init_args.", "data.", 1)


def _missing(kind: type[Any], name: str) -> str:
    """What to give for an argument of the data that is missing, in the words of the class."""
    words = descriptions(kind).get(name, "")
    layout = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split()).replace("``", "")
    return f"--data.{name} is missing: {words.replace('``', '')} {kind.__name__} reads {layout[:1].lower()}{layout[1:]}"


def descriptions(kind: type[Any]) -> dict[str, str]:
    """The descriptions of a class's arguments, and of its base classes', in one line each."""
    found: dict[str, str] = {}
    for one in reversed(inspect.getmro(kind)):
        for text in (vars(one).get("__doc__"), getattr(vars(one).get("__init__"), "__doc__", None)):
            for parameter in docstring_parser.parse(text or "").params:
                found[parameter.arg_name] = " ".join((parameter.description or "").split())
    return found


def _names(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The options given, each with the recipe that it stands in; the recipes come first."""
    for recipe in recipes(arguments):
        inline = recipe.lstrip().startswith("{")
        content = parse_recipe(recipe, "--config", Path()) if inline else read_recipe(Path(recipe))
        for name in _flat(content):
            yield ("given as --config" if inline else recipe), name
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            yield "", argument[2:].partition("=")[0].removesuffix("+")


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name
