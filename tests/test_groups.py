"""Tests that share an expensive fixture are a group, which xdist gives to one worker."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def shared() -> object:
    return object()


def test_a_test_with_a_fixture_of_its_module_is_of_its_modules_group(
    shared: object, request: pytest.FixtureRequest
) -> None:
    (group,) = request.node.iter_markers("xdist_group")
    assert group.args == ("tests/test_groups.py",)
    if hasattr(request.config, "workerinput") and request.config.getvalue("loadgroup"):
        assert request.node.nodeid.endswith("@tests/test_groups.py")  # else xdist has not seen the group


def test_others_may_run_in_any_worker(request: pytest.FixtureRequest) -> None:
    assert not list(request.node.iter_markers("xdist_group"))
