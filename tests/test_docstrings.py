"""The examples in docstrings run, and each public name has one."""

from __future__ import annotations

import doctest
import sys
from types import ModuleType

import pytest

import awconv

NAMES = [name for name in awconv.__all__ if name != "__version__"]


def module_of(value: object) -> ModuleType:
    return value if isinstance(value, ModuleType) else sys.modules[value.__module__]


PUBLIC = [getattr(awconv, name) for name in NAMES] + [getattr(awconv.models, name) for name in awconv.models.__all__]
MODULES = {module_of(value).__name__: module_of(value) for value in PUBLIC if not isinstance(value, dict)}
EXAMPLES = {
    test.name: test
    for module in MODULES.values()
    for test in doctest.DocTestFinder(exclude_empty=True).find(module)
    if test.examples
}


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_has_an_example(name: str) -> None:
    value = getattr(awconv, name)
    path = value.__name__ if isinstance(value, ModuleType) else f"{value.__module__}.{value.__qualname__}"
    assert path in EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_its_docstring_says(name: str) -> None:
    report: list[str] = []
    example = EXAMPLES[name]
    example.globs = {}  # it imports what it needs, as its reader does
    result = doctest.DocTestRunner().run(example, out=report.append)
    assert result.attempted
    assert not result.failed, "".join(report)
