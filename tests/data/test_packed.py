"""Texts in two buffers, and the members of tar files, as lists and tarfile have them."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awconv.data.packed import PackedTexts
from awconv.data.tar_members import TarHeaders

names = st.binary(max_size=12).map(os.fsdecode)  # file names that are not UTF-8, too


@given(st.lists(st.lists(names, max_size=6), max_size=4))
def test_packed_texts_are_those_of_a_list(parts: list[list[str]]) -> None:
    joined = PackedTexts.joined(map(PackedTexts, parts))
    expected = [text for part in parts for text in part]
    for packed in (joined, PackedTexts(expected), pickle.loads(pickle.dumps(joined))):
        assert len(packed) == len(expected)
        assert list(packed) == expected == [packed[index] for index in range(len(expected))]
        for index in (-1, len(expected)):
            with pytest.raises(IndexError, match=f"there are {len(expected)} texts, from 0, got index {index}"):
                packed[index]


KINDS = {
    "file": {},
    "float time": {"mtime": 1.5},  # a PAX header, as of webdataset's own writer
    "folder": {"type": tarfile.DIRTYPE},
    "link": {"type": tarfile.SYMTYPE, "linkname": "a"},
    "hard link": {"type": tarfile.LNKTYPE, "linkname": "a"},
    "owner": {"uname": "ü" * 10},
    "large id": {"uid": 2**40},
}


@given(
    st.lists(
        st.tuples(st.sampled_from(list(KINDS)), st.sampled_from([1, 60, 99, 100, 101, 180, 300]), st.integers(0, 1500)),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.sampled_from(["x", "é", "d/"]),
)
def test_members_are_those_of_tarfile(members: list[tuple[str, int, int]], format: int, letter: str) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for kind, length, size in members:
            member = tarfile.TarInfo((letter * length)[:length].strip("/") or "x")
            for key, value in KINDS[kind].items():
                setattr(member, key, value)
            member.size = size if member.isfile() else 0
            try:
                tar.addfile(member, io.BytesIO(bytes(size)))
            except ValueError:  # too long or too large for the format
                tar.addfile(tarfile.TarInfo("x"))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(file.getvalue())
        with TarHeaders(str(path)) as headers:
            found, end = headers.members()
        with tarfile.open(path, "r:") as tar:
            expected = [
                (one.name, one.offset_data, one.size, one.isfile() and not one.issparse())
                for one in tar.getmembers()
                if not one.isdir()
            ]
            assert [tuple(one) for one in found] == expected
            assert end == tar.offset


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_usual_files_need_no_tarfile(format: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for index in range(3):
            member = tarfile.TarInfo(f"images/{index}.jpg")
            member.size, member.mtime = 600, 1.5 if format == tarfile.PAX_FORMAT else 1
            tar.addfile(member, io.BytesIO(bytes(600)))
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("headers of a usual kind"))
    with TarHeaders(str(path)) as headers:
        assert [one.name for one in headers.members()[0]] == ["images/0.jpg", "images/1.jpg", "images/2.jpg"]


def test_a_changed_header_is_tarfiles_to_judge(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("a"))
    content = bytearray(path.read_bytes())
    content[0] = ord("b")  # the checksum is that of another name
    path.write_bytes(content)
    with TarHeaders(str(path)) as headers, pytest.raises(tarfile.ReadError):
        headers.members()
