"""Makes the README's links work elsewhere, such as on PyPI: ``python tools/links.py ADDRESS TAG`` rewrites it in place.

The release does so in its own checkout; the README in the repository keeps links that follow a clone or a fork.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\(([^)\s]+)\)")
_ADDRESS = re.compile(r"[a-z]+:")


def absolute(text: str, repository: str, tag: str) -> str:
    """A page of the repository's root, with links that work anywhere.

    Args:
        text: Markdown.
        repository: the address of the repository.
        tag: or branch, that the links lead to.
    """

    def link(match: re.Match[str]) -> str:
        image, label, target = match.groups()
        label = _LINK.sub(link, label)  # an image may be what is clicked on
        if not _ADDRESS.match(target):
            page = f"README.md{target}" if target.startswith("#") else target
            target = f"{repository}/{'raw' if image else 'blob'}/{tag}/{page}"
        return f"{image}[{label}]({target})"

    return _LINK.sub(link, text)


if __name__ == "__main__":
    README.write_text(absolute(README.read_text(), *sys.argv[1:3]))
