"""The folder of an explanation is written whole or not at all, and over nothing but a former one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from awconv.explain.folder import check_folder, write_folder


def files(*names: str, text: str = "") -> Mapping[str, bytes]:
    content = dict(tool="awconv explain", files=[*names, "explain.json"])
    return {name: text.encode() for name in names} | {"explain.json": json.dumps(content).encode()}


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A former explanation."""
    write_folder(tmp_path / "page", files("index.html", "old.png", text="former"))
    return tmp_path / "page"


@pytest.mark.parametrize("where", ["new", "below/new", "empty", "link"])
def test_a_folder_is_made_where_there_is_none_or_an_empty_one(where: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    write_folder(tmp_path / where, made := files("index.html"))
    assert content(tmp_path / where) == made
    assert (tmp_path / "link").is_symlink()
    assert not list(tmp_path.rglob("*.partial"))


def test_the_folder_that_one_is_in_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="give --out a folder inside"):
        check_folder(Path("."))


def test_a_check_makes_no_folder(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_others_may_not_read_stays_so(tmp_path: Path) -> None:
    (tmp_path / "page").mkdir(mode=0o700)
    write_folder(tmp_path / "page", files("index.html"))
    assert (tmp_path / "page").stat().st_mode & 0o777 == 0o700


def test_a_former_explanation_is_replaced(page: Path) -> None:
    write_folder(page, made := files("index.html", "new.png"))
    assert content(page) == made
    assert list(page.parent.iterdir()) == [page]


@pytest.mark.parametrize("spoiled", ["notes.txt", "explain.json"])
def test_anything_else_is_refused_and_stays(spoiled: str, page: Path) -> None:
    (page / spoiled).write_text("[[]]")
    before = content(page)
    for write in (check_folder, lambda folder: write_folder(folder, files("index.html"))):
        with pytest.raises(FileExistsError, match=r"holds what awconv explain did not write .*; give --out another"):
            write(page)
        assert content(page) == before


def test_figures_that_name_files_elsewhere_do_not_make_them_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    folder = tmp_path / "page"
    folder.mkdir()
    (folder / "explain.json").write_text(json.dumps(dict(tool="awconv explain", files=["../mine.txt", "explain.json"])))
    write_folder(folder, files("index.html"))
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_what_comes_there_meanwhile_is_kept(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, before = os.rename, content(page)

    def late(old: Any, new: Any) -> None:
        if Path(old) == page:
            (page / "late").write_text("mine")
        rename(old, new)

    monkeypatch.setattr("awconv.explain.folder.os.rename", late)
    with pytest.raises(FileExistsError, match=r"did not write \(late\)"):
        write_folder(page, files("index.html"))
    assert content(page) == before | {"late": b"mine"}
    assert list(page.parent.iterdir()) == [page]


def test_an_interruption_brings_the_former_one_back(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, before, calls = os.rename, content(page), []

    def stopped(old: Any, new: Any) -> None:
        calls.append(old)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(old, new)

    monkeypatch.setattr("awconv.explain.folder.os.rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_folder(page, files("index.html"))
    assert content(page) == before
    assert list(page.parent.iterdir()) == [page]


def test_a_full_disk_leaves_what_was_there(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(page)

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_folder(page, files("index.html"))
    assert content(page) == before
    assert list(page.parent.iterdir()) == [page]
