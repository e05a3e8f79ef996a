"""WebDataset's tar files."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from awconv.data import BrokenImageError, WebDataset
from tests.data.samples import DIGITS, digit, png, spoilt, write_shard, write_tar


class TestWebDataset:
    @pytest.mark.parametrize("label", ["cls", "json"])
    @pytest.mark.parametrize("pax", [True, False])
    def test_images_and_labels_are_those_of_the_shards(self, label: str, pax: bool, tmp_path: Path) -> None:
        for shard in range(3):
            write_shard(tmp_path / f"train-{shard}.tar", range(40 * shard, 40 * shard + 40), label, pax)
        write_shard(tmp_path / "test.tar", range(200, 230), label, pax)
        data = WebDataset(
            str(tmp_path / "train-*.tar"), test=str(tmp_path / "test.tar"), image_size=8, batch_size=16, num_workers=2
        )
        assert data.classes == [str(index) for index in range(10)]
        source = data.open("train")
        assert list(source.targets) == DIGITS.target[:120].tolist()
        for index in (0, 41, 119):
            assert np.array_equal(np.asarray(source[index][0]), np.asarray(digit(index)))
        assert sum(len(targets) for _, targets in data.test_dataloader()) == 30
        with pytest.raises(FileNotFoundError, match=r"no file matches .*train-3\.tar"):
            WebDataset(str(tmp_path / "train-{1..3}.tar")).classes  # noqa: B018
        numbered = WebDataset(str(tmp_path / "train-{1..2}.tar"), image_size=8)
        assert list(numbered.open("train").targets) == DIGITS.target[40:120].tolist()
        streamed = WebDataset(
            str(tmp_path / "train-*.tar"), image_size=8, batch_size=16, in_memory=False, num_workers=2, val_fraction=0
        )
        assert sum(len(targets) for _, targets in streamed.train_dataloader()) == 112

    def test_mistakes_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no file matches .*none\.tar"):
            WebDataset(str(tmp_path / "none.tar")).classes  # noqa: B018
        write_shard(tmp_path / "a.tar", range(20))
        (tmp_path / "cut.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:3000])
        with pytest.raises(ValueError, match=r"cut\.tar is not a plain tar file, or is broken"):
            WebDataset(str(tmp_path / "cut.tar")).classes  # noqa: B018
        whole = (tmp_path / "a.tar").read_bytes()
        end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
        for length in (end, end - 512 * 3):  # without the headers of zeros, and with a member of which nothing is left
            (tmp_path / "short.tar").write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"short\.tar is (cut off|not a plain tar file, or is broken)"):
                WebDataset(str(tmp_path / "short.tar")).classes  # noqa: B018
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
        with pytest.raises(ValueError, match=r"a\.tar\.gz is not a plain tar file"):
            WebDataset(str(tmp_path / "a.tar.gz")).classes  # noqa: B018
        write_shard(tmp_path / "none.tar", range(5), label="txt")
        with pytest.raises(ValueError, match=r"image images/0000\.png has no label; expected images/0000\.cls"):
            WebDataset(str(tmp_path / "none.tar")).classes  # noqa: B018
        with pytest.raises(
            ValueError, match=r"labels must be from 0 to 1, got 9; give the names of all classes with class_names"
        ):
            WebDataset(str(tmp_path / "a.tar"), class_names=["a", "b"]).classes  # noqa: B018

    def test_a_file_that_is_cut_anywhere_is_refused_or_whole(self, tmp_path: Path) -> None:
        write_shard(tmp_path / "a.tar", range(6))
        whole = (tmp_path / "a.tar").read_bytes()
        end = len(whole.rstrip(b"\0"))
        for length in range(1, len(whole), 131):
            (tmp_path / "cut.tar").write_bytes(whole[:length])
            try:
                source = WebDataset(str(tmp_path / "cut.tar")).open("train")
            except ValueError as error:
                assert "cut.tar is" in str(error)  # noqa: PT017  # cut off, or no tar file
            else:
                assert len(source) == 6  # cut within the zeros that fill it up: nothing is lost
                assert length >= end + 1024
        (tmp_path / "95.tar").write_bytes(whole[: int(0.95 * end)])
        with pytest.raises(ValueError, match=r"95\.tar is (not a plain tar file, or is broken|cut off)"):
            WebDataset(str(tmp_path / "95.tar")).classes  # noqa: B018


A, B = png(digit(0)), png(digit(1))
PLAIN: dict[str, bytes | str] = {"a.png": A, "a.cls": "0", "b.png": B, "b.cls": "1"}


def test_spoiled_files_are_read_or_named(tmp_path: Path) -> None:
    content = Path(write_tar(tmp_path / "a.tar", PLAIN)).read_bytes()
    spoiled, refused = tmp_path / "spoiled.tar", 0
    for damaged in spoilt(content[:8192], 150):
        spoiled.write_bytes(damaged + content[8192:])
        try:
            WebDataset(str(spoiled), image_size=8, val_fraction=0).dataset("train")
        except ValueError as error:
            assert str(spoiled) in str(error)  # noqa: PT017  # some bytes say nothing
            refused += 1
    assert refused > 50


class TestLayouts:
    """What img2dataset, WebDataset's own writer, a Mac's tar and people write."""

    @pytest.mark.parametrize(
        "content",
        [
            PLAIN,
            {"./a.png": A, "./a.cls": "0\n", "./b.png": B, "./b.cls": " 1 "},
            {"a.cls": "\ufeff0", "b.cls": "1\r\n", "a.png": A, "b.png": B},
            {
                **PLAIN,
                "a.json": '{"url": "https://example.org/a", "status": "success", "width": 8}',
                "a.txt": "A nought",
            },
            {**PLAIN, "a.json": '{"label": 0}', "b.json": "[1]"},
            {"a.json": '{"label": "nought"}', "b.JSON": '{"label": null}', **PLAIN},
            {**PLAIN, "a.json": '{"label": ["nought"]}', "b.json": '{"label": true}'},
            {"a.png": A, "a.json": '{"label": 0, "caption": "x"}', "b.PNG": B, "b.JSON": '{"label": 1}'},
            {**PLAIN, "._a.png": b"\0\5\x16\7\0\2\0\0Mac OS X", "__MACOSX/._b.png": b"\0\5\x16\7", ".DS_Store": b"x"},
            {**PLAIN, "a.pdf": b"%PDF-1.4", "a.h5": b"\x89HDF\r\n\x1a\n", "a.npy": b"x", "b.mpg": b"x"},
            {**PLAIN, ".ipynb_checkpoints/a.png": A, "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg": A},
        ],
        ids=["plain", "dot", "windows", "img2dataset", "both", "texts", "lists", "json", "mac", "others", "leftovers"],
    )
    def test_are_read(self, content: dict[str, bytes | str], tmp_path: Path) -> None:
        source = WebDataset(write_tar(tmp_path / "a.tar", content)).open("train")
        assert list(source.targets) == [0, 1]
        for index in range(2):
            assert np.array_equal(np.asarray(source[index][0]), np.asarray(digit(index)))

    @pytest.mark.parametrize("name", ["", ".", "..", "./..", "a/.."])
    def test_members_that_are_called_nothing_are_passed_over(self, name: str, tmp_path: Path) -> None:
        content = {"0.png": png(digit(0)), "0.cls": "0", "1.png": png(digit(1)), "1.cls": "1", name: b"x"}
        assert list(WebDataset(write_tar(tmp_path / "a.tar", content)).open("train").targets) == [0, 1]

    def test_what_is_not_used_is_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO", "lightning.pytorch")  # which a comparison silences
        path = write_tar(tmp_path / "a.tar", {**PLAIN, "c.cls": "0", "d.cls": "1", "a.txt": "x", "\x1b[2J": "y"})
        write_tar(tmp_path / "b.tar", PLAIN)
        assert WebDataset(path).classes == ["0", "1"]
        assert f"{path}: not used: 2 labels without an image, 1 not named as images (.txt)" in caplog.text
        assert "\\x1b[2J" in caplog.text
        assert f"files not used by any split: {tmp_path}/b.tar, 1 in all" in caplog.text
        for split in ("train", "test"):
            write_shard(tmp_path / split / "0.tar", range(20))
        assert len(WebDataset(str(tmp_path / "train" / "{0..0}.tar")).classes) == 10
        assert f"files not used by any split: {tmp_path}/test/0.tar, 1 in all" in caplog.text

    def test_names_of_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        write_tar(tmp_path / "a [1].tar", PLAIN)
        for pattern in ("~/a [1].tar", "~/a*.tar", str(tmp_path / "*{1..1}*.tar")):
            assert len(WebDataset(pattern).open("train")) == 2
        (tmp_path / "x[1]").mkdir()
        write_tar(tmp_path / "x[1]" / "a.tar", PLAIN)
        assert len(WebDataset(str(tmp_path / "x[1]" / "*.tar")).open("train")) == 2
        write_tar(tmp_path / "0-07.tar", PLAIN)
        assert len(WebDataset(str(tmp_path / "{0..0}-{07..07}.tar")).open("train")) == 2
        with pytest.raises(FileNotFoundError, match=r"no file matches .*/1-06\.tar"):
            WebDataset(str(tmp_path / "{1..2}-{06..07}.tar")).classes  # noqa: B018
        for pattern in (
            "a{5..1}.tar",
            "a{0..99999999999}.tar",
            "a{0..99999999999999999999}.tar",
            "a{0..999}{0..999}{0..1}.tar",  # the product counts
            "a{0..999999}{0..999999}.tar",
            "a{0..9}{5..1}{5..1}.tar",
        ):
            with pytest.raises(ValueError, match="must count up, by at most 1,000,000 files"):
                WebDataset(pattern).classes  # noqa: B018


def test_an_image_of_too_many_bytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", {**PLAIN, "c.png": B + bytes(2**20 + 8 * 64), "c.cls": "1"})
    source = WebDataset(path, max_pixels=64).open("train")
    assert source is not None
    assert source[0][0].size == (8, 8)
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("it is read"))
    with pytest.raises(
        BrokenImageError, match=r"a\.tar, c\.png: its [\d,]+ bytes are more than .* max_pixels = 64 allows"
    ):
        source[2]


class TestLabels:
    @pytest.mark.parametrize("label", ["-1", "nan", "None", "true", "1.0", "cat", "", "1_0", "9" * 5000, "\u0663"])
    def test_no_class_index_is_refused(self, label: str, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "a.tar", {**PLAIN, "b.cls": label})
        with pytest.raises(ValueError, match=r"a\.tar, b\.cls must hold a class index of at least 0: got"):
            WebDataset(path).classes  # noqa: B018

    @pytest.mark.parametrize("label", ["-1", "NaN", "null", "true", "1.0", '"cat"', "1e999", "[1]", "[" * 100_000, "{"])
    def test_no_class_index_in_json_is_refused(self, label: str, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "a.tar", {"a.png": A, "a.cls": "0", "b.png": B, "b.json": f'{{"label": {label}}}'})
        with pytest.raises(ValueError, match=r"a\.tar, b\.json must hold a class index of at least 0"):
            WebDataset(path).classes  # noqa: B018

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"b.json": '{"label": 0}'}, r"a\.tar: the label of b is 1 in b\.cls, and 0 in b\.json"),
            ({"b.json": '{"label": -1}'}, r"a\.tar, b\.json must hold a class index of at least 0: got -1"),
            ({"b.png": B, "b.cls": "2147483648"}, r"the largest label is 2147483648, and 2,147,483,647 below it have"),
            ({"b.cls": "0"}, r"a\.tar: a classification needs at least two classes, got \['0'\]"),
            ({"b.jpg": B}, r"a\.tar: b\.png and b\.jpg are both images of b; keep one"),
            ({"c.png": B}, r"a\.tar: image c\.png has no label; expected c\.cls"),
            (
                {"c.png": B, "c.json": "{}"},
                r"image c\.png has no label; .*or c\.json with it .*; c\.json has none",
            ),
        ],
    )
    def test_labels_that_cannot_be_trained_on_are_refused(
        self, content: dict[str, bytes | str], message: str, tmp_path: Path
    ) -> None:
        path = write_tar(tmp_path / "a.tar", {**PLAIN, **content})
        with pytest.raises(ValueError, match=message):
            WebDataset(path).classes  # noqa: B018

    def test_a_member_written_twice_is_refused_where_it_differs(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "a.tar", PLAIN)
        with tarfile.open(path, "a") as tar:
            member = tarfile.TarInfo("b.cls")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"0"))
        with pytest.raises(ValueError, match=r"a\.tar: the label of b is 1 in b\.cls, and 0 in b\.cls"):
            WebDataset(path).classes  # noqa: B018

    def test_links_are_refused(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "a.tar", PLAIN)
        with tarfile.open(path, "a") as tar:
            member = tarfile.TarInfo("c.png")
            member.type, member.linkname = tarfile.LNKTYPE, "a.png"
            tar.addfile(member)
        with pytest.raises(ValueError, match=r"a\.tar: c\.png must be a plain copy, got a link or a sparse file"):
            WebDataset(path).classes  # noqa: B018

    @pytest.mark.parametrize(
        ("names", "message"),
        [(["a", "a"], "must differ, got 'a' of"), (["a", ""], "must be text"), (["a"], "at least two")],
    )
    def test_names_are_checked(self, names: list[str], message: str, tmp_path: Path) -> None:
        content = PLAIN if len(names) > 1 else {"a.png": A, "a.cls": "0"}
        path = write_tar(tmp_path / "a.tar", content)
        with pytest.raises(ValueError, match=rf"class_names: .*{message}"):
            WebDataset(path, class_names=names).classes  # noqa: B018
