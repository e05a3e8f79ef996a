"""The README's links, as PyPI shows it."""

from __future__ import annotations

import re

from tests.documents import ROOT
from tools.links import absolute

HERE = "https://example.org/somebody/awconv"


def test_links_lead_to_the_repository() -> None:
    assert absolute("[a](docs/a.md#b)", HERE, "v1") == f"[a]({HERE}/blob/v1/docs/a.md#b)"
    assert absolute("[a](#b)", HERE, "v1") == f"[a]({HERE}/blob/v1/README.md#b)"
    assert absolute("![a](docs/a.png)", HERE, "v1") == f"![a]({HERE}/raw/v1/docs/a.png)"
    assert absolute("[![a](a.png)](b)", HERE, "v1") == f"[![a]({HERE}/raw/v1/a.png)]({HERE}/blob/v1/b)"
    assert absolute("[a](https://b.org)", HERE, "v1") == "[a](https://b.org)"


def test_no_link_of_the_readme_is_left_relative() -> None:
    readme = (ROOT / "README.md").read_text()
    targets = re.findall(r"\]\(([^)]*)\)", absolute(readme, HERE, "v1"))
    assert len(targets) == len(re.findall(r"\]\(([^)]*)\)", readme)) >= 10
    assert all(target.startswith("https://") for target in targets), targets
