"""Reads recipes (YAML) and refuses files that are too large or malformed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

_BYTES = 2**20
_VALUES = 100_000  # with those that aliases repeat
_SECTIONS = ("model", "trainer", "recent_checkpoint", "processes", "detections", "report")


def read_recipe(path: Path) -> dict[str, Any]:
    """Reads a YAML file of settings. Imports nothing.

    Returns:
        The settings. A section that names a file is replaced by the file's content.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not YAML, not a mapping, or too large.
    """
    if not path.is_file():
        raise FileNotFoundError(f"recipe {path} is not a file; expected a YAML file such as those under recipes/")
    if path.stat().st_size > _BYTES:
        raise ValueError(f"recipe {path} must have at most {_BYTES:,} bytes, got {path.stat().st_size:,}")
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {path} cannot be read as YAML: {error}") from error
    return parse_recipe(text, str(path), path.parent)


def parse_recipe(text: str, name: str, folder: Path) -> dict[str, Any]:
    """Like :func:`read_recipe`, for YAML or JSON given as text.

    Args:
        text: the settings.
        name: their name in messages.
        folder: the folder of files that sections name.

    Raises:
        ValueError: as for :func:`read_recipe`.
    """
    try:
        _check_size(yaml.compose(text, yaml.SafeLoader))
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"recipe {name} cannot be read as YAML: {error}") from error
    except RecursionError:
        raise ValueError(f"recipe {name} cannot be read as YAML: it is nested too deeply") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"recipe {name} must be a mapping such as 'model: {{lr: 0.1}}', got {type(content).__name__}")
    for section in _SECTIONS:
        given = content.get(section, {})
        if isinstance(given, str) and given.endswith((".yaml", ".yml")):
            content[section] = read_recipe(folder / given)
        elif not isinstance(given, dict):
            raise ValueError(f"recipe {name}: {section} must be a mapping of settings, got {str(given)[:80]!r}")
    return content


@contextmanager
def bounded_yaml() -> Iterator[None]:
    """Inside, parsers refuse YAML that becomes huge by its aliases, in arguments and in files."""
    load = jsonargparse.get_loader("yaml")

    def check_and_load(text: str) -> Any:
        if "*" in text:  # an alias
            try:
                _check_size(yaml.compose(text, yaml.SafeLoader))
            except ValueError as error:
                raise ValueError(f"YAML that begins with {text[:40]!r} cannot be read: {error}") from error
        return load(text)

    jsonargparse.set_loader("yaml", check_and_load, (yaml.YAMLError,))
    try:
        yield
    finally:
        jsonargparse.set_loader("yaml", load, (yaml.YAMLError,))


def _check_size(root: yaml.Node | None) -> None:
    """Raises a ValueError for a document that becomes huge or endless by its aliases."""
    sizes: dict[int, int] = {}
    open_: set[int] = set()

    def size(node: Any) -> int:
        if id(node) in open_:
            raise ValueError("an alias stands within what it names")
        if id(node) not in sizes:
            open_.add(id(node))
            inner = node.value if isinstance(node, yaml.CollectionNode) else ()
            sizes[id(node)] = 1 + sum(
                size(part) for item in inner for part in (item if isinstance(item, tuple) else (item,))
            )
            open_.remove(id(node))
        if sizes[id(node)] > _VALUES:
            raise ValueError(f"its aliases make more than {_VALUES:,} values of it")
        return sizes[id(node)]

    if root is not None:
        size(root)
