"""Data sets in zip archives: as systems pack them, damaged, or malicious."""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path

import pytest

from awconv.data import BrokenImageError, Coco
from awconv.data.files import Files
from tests.photographs import SIZE, write_coco


def pack(path: Path, content: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def patch(path: Path, local: int, central: int, value: int) -> Path:
    """Changes a field of 16 bits in both headers of the first member."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<H", content, content.index(b"PK\3\4") + local, value)
    struct.pack_into("<H", content, content.index(b"PK\1\2") + central, value)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("slash", ["/", "\\"])
@pytest.mark.parametrize("top", ["", "my data/"])
def test_what_systems_leave_in_an_archive_is_passed_over(top: str, slash: str, tmp_path: Path) -> None:
    root = write_coco(tmp_path / "root")
    content = {f"{top}{path.relative_to(root)}": path.read_bytes() for path in root.rglob("*") if path.is_file()}
    leftovers = ("__MACOSX/._x", ".DS_Store", "@eaDir/x", f"{top}train2017/._china.png", f"{top}train2017/Thumbs.db")
    content |= dict.fromkeys(leftovers, b"x")
    archive = pack(tmp_path / "a.zip", {name.replace("/", slash): data for name, data in content.items()})
    dataset = Coco(archive, val_fraction=0).dataset("train")
    assert dataset is not None
    assert len(dataset) == 2
    assert Files(archive).below("train2017") == ["train2017/china.png", "train2017/flower.png"]
    assert Files(archive).beside({"train2017/china.png"}) == ["annotations"]


@pytest.mark.parametrize("name", ["../a", "/a", "b/../../a", "..\\a", "C:\\a"])
def test_names_that_lead_out_of_an_archive_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.zip: the name .* leads out of the archive"):
        Files(pack(tmp_path / "a.zip", {name: b"a", "b": b"b"}))


@pytest.mark.parametrize(
    ("local", "central", "value", "message"),
    [
        (6, 8, 1, r"a\.zip/a is encrypted; unpack the archive"),
        (8, 10, 97, r"a\.zip/a cannot be unpacked: .*; compress it with deflate, or unpack the archive"),
        (14, 16, 7, r"a\.zip/a is damaged: Bad CRC-32"),
    ],
)
def test_members_that_cannot_be_unpacked_are_named(
    local: int, central: int, value: int, message: str, tmp_path: Path
) -> None:
    files = Files(patch(pack(tmp_path / "a.zip", {"a": b"some text", "b": b"b"}), local, central, value))
    with pytest.raises(ValueError, match=message):
        files.read("a")
    assert files.read("b") == b"b"


def test_an_archive_that_was_cut_is_named(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {"a": b"a" * 99})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"a\.zip is a damaged zip archive: its end is missing; copy the archive"):
        Files(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_damaged_archive_is_an_error_that_names_it(compression: int, tmp_path: Path) -> None:
    expected = bytes(range(256)) * 4
    path = pack(tmp_path / "a.zip", {"a": expected}, compression)
    content, messages = path.read_bytes(), []
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        try:
            assert Files(path).read("a") == expected
        except (ValueError, FileNotFoundError) as error:
            messages.append(str(error))
    assert len(messages) > 0.5 * len(content)
    assert [message for message in messages if "a.zip" not in message] == []


def test_members_that_become_too_large_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    files = Files(pack(tmp_path / "a.zip", {"bomb": bytes(2**25), "small": bytes(2**20)}))
    with pytest.raises(ValueError, match=r"a\.zip/bomb would grow from [\d,]+ to 33,554,432 bytes, more than"):
        files.read("bomb")
    with pytest.raises(ValueError, match=r"a\.zip/small has 1,048,576 bytes; expected at most 1,000"):
        files.read("small", 1000)
    assert len(files.read("small")) == 2**20


def test_an_image_that_becomes_too_large_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_coco(tmp_path / "root")
    content = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    most = SIZE[0] * SIZE[1]
    content["train2017/china.png"] += os.urandom(8 * most + 2**20)
    archive = pack(tmp_path / "a.zip", content)
    monkeypatch.setattr("awconv.data.detection.read_header", lambda *_, **__: pytest.fail("it is read"))
    with pytest.raises(
        BrokenImageError, match=r"a\.zip/train2017/china\.png: its [\d,]+ bytes are more than .*max_pixels"
    ):
        Coco(archive, val_fraction=0, max_pixels=most).dataset("train")


def test_a_damaged_image_in_an_archive_is_skipped_if_wanted(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "root")
    content = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    archive = pack(tmp_path / "a.zip", content, zipfile.ZIP_STORED)
    data = archive.read_bytes()
    archive.write_bytes(data.replace(content["train2017/china.png"], bytes(len(content["train2017/china.png"]))))
    with pytest.raises(BrokenImageError, match=r"a\.zip/train2017/china\.png.*broken_images=skip"):
        Coco(archive, val_fraction=0).dataset("train")
    skipping = Coco(archive, val="train2017", broken_images="skip", num_workers=0, batch_size=1)
    assert [len(images) for images, _ in skipping.val_dataloader()] == [0, 1]


def test_a_folder_leads_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root").mkdir()
    files = Files(tmp_path / "root")
    for path in ("../secret", str(tmp_path / "secret"), "a/../../secret"):
        assert not files.holds(path)
        with pytest.raises(FileNotFoundError, match="is not in"):
            files.read(path)
    for path in ("n" * 5000, "a\0b", "\ud800"):
        assert not files.holds(path)
        with pytest.raises(FileNotFoundError, match="is not a file"):
            files.read(path)
