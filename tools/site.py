"""MkDocs' hook: what lies outside docs/ and is linked from there becomes a part of the site.

The README, the changelog and CONTRIBUTING are pages of it. Another file becomes a page that shows its text, and a
folder a page that lists its files. Links in the Markdown stay those of the repository, so that they work there as well.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
_ROLE = re.compile(r":(?:func|class|meth|data|mod|attr):<code>([\w.]+)</code>")
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".c": "c", ".h": "c", ".cff": "yaml"}
SHOWN = "repository"  # the folder of the site that holds what lies outside docs/
_NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"
_LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)\s]*)?\))")  # ](path#anchor), and no address


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the repository's root, and one for each other file or folder that a page links to."""
    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    linked: set[str] = set()
    for file in files.documentation_pages():
        linked.update(path for path in _links(file) if not _is_documentation(path))
    for path in sorted(linked | {part for folder in linked for part in _parts(folder)}):
        files.append(_shown(path, config))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes links between files of the repository links between pages of the site."""
    here = page.file

    def in_the_site(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        uri = _uri(_resolve(here, target))
        return f"{before}{posixpath.relpath(uri, posixpath.dirname(here.src_uri) or '.')}{after}"

    return markdown if here.src_uri.startswith(f"{SHOWN}/") else _LINK.sub(in_the_site, markdown)


def _links(file: File) -> Iterator[str]:
    """The paths, from the repository's root, that a page links to."""
    for _, target, _ in _LINK.findall(file.content_string):
        yield _resolve(file, target)


def _resolve(file: File, target: str) -> str:
    """A link's path from the repository's root."""
    roots = {uri: source for source, uri in PAGES.items()}
    source = roots.get(file.src_uri, f"docs/{file.src_uri}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def _is_documentation(path: str) -> bool:
    return path in PAGES or f"{path}/".startswith("docs/")


def _uri(path: str) -> str:
    """Where a path of the repository is in the site."""
    if _is_documentation(path):
        return PAGES.get(path, path.removeprefix("docs/"))
    if (ROOT / path).is_dir():
        return f"{SHOWN}/{path}/index.md"
    return f"{SHOWN}/{path}" if path.endswith((".json", ".md")) else f"{SHOWN}/{path}.md"


def _parts(path: str) -> Iterator[str]:
    """What is listed in a folder, and in the folders in it."""
    for part in sorted((ROOT / path).rglob("*")):
        if _is_text(part) or part.is_dir():
            yield part.relative_to(ROOT).as_posix()


def _is_text(path: Path) -> bool:
    return path.suffix in {*LANGUAGES, ".json", ".md"}


def _shown(path: str, config: MkDocsConfig) -> File:
    """A page that shows a file of the repository, or lists a folder; figures are handed out as they are."""
    whole, uri = ROOT / path, _uri(path)
    if whole.suffix == ".json":
        return File.generated(config, uri, abs_src_path=str(whole))
    if whole.suffix == ".md":  # a model card
        return File.generated(config, uri, content=whole.read_text())
    if whole.is_dir():
        parts = [part for part in sorted(whole.iterdir()) if part.is_dir() or _is_text(part)]
        text = "\n".join(f"- [`{part.name}`]({_entry(part, path)})" for part in parts)
    else:
        text = f"````{LANGUAGES.get(whole.suffix, '')}\n{whole.read_text()}````"
    return File.generated(config, uri, content=f"{_NOT_SEARCHED}# {path}\n\n{text}\n")


def _entry(part: Path, folder: str) -> str:
    return os.path.relpath(_uri(part.relative_to(ROOT).as_posix()), f"{SHOWN}/{folder}")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes links of the roles in docstrings, such as ``:func:`convert```; a name without a page stays code."""
    return _ROLE.sub(r'<autoref identifier="\1" optional><code>\1</code></autoref>', html)
