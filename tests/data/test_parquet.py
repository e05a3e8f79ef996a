"""Images in Parquet files."""

from __future__ import annotations

import itertools
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from awconv.data import BrokenImageError, Parquet
from tests.data.samples import DIGITS, digit, png, spoilt, write_parquet


class TestParquet:
    def test_names_labels_and_pictures_come_out(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "train-0.parquet", range(150))
        write_parquet(tmp_path / "train-1.parquet", range(150, 300))
        write_parquet(tmp_path / "test.parquet", range(300, 350))
        data = Parquet(str(tmp_path / "train-*.parquet"), test=str(tmp_path / "test.parquet"), image_size=8)
        assert data.classes == [f"digit{i}" for i in range(10)]
        assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [270, 30, 50]
        assert data.dataset("test").targets.tolist() == DIGITS.target[300:350].tolist()
        expected = np.stack([np.array(digit(index)) for index in range(300, 350)])
        assert np.array_equal(data.dataset("test").images[:, 0].numpy(), expected)

    def test_without_metadata_classes_are_numbers(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "train.parquet", range(100), names=False)
        assert Parquet(str(tmp_path / "train.parquet")).classes == [str(i) for i in range(10)]

    def test_errors_name_the_file_the_column_and_the_row(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no file matches .*nothing\.parquet"):
            Parquet(str(tmp_path / "nothing.parquet")).classes  # noqa: B018
        train = str(tmp_path / "train.parquet")
        write_parquet(Path(train), range(100))
        with pytest.raises(ValueError, match=r"must have a column 'img', got \['image', 'label'\]; .*image_column"):
            Parquet(train, image_column="img").classes  # noqa: B018
        write_parquet(tmp_path / "wrong.parquet", range(20), label=lambda target: 10 if target == 7 else int(target))
        with pytest.raises(ValueError, match=r"labels must be from 0 to 9, got 10 in row 7 \(and 1 more\)"):
            Parquet(str(tmp_path / "wrong.parquet")).classes  # noqa: B018
        pq.write_table(
            pa.table({"image": [{"bytes": b"broken", "path": ""}] * 4, "label": [0, 1] * 2}), tmp_path / "b.parquet"
        )
        with pytest.raises(BrokenImageError, match=r"b\.parquet, row 0: cannot identify"):
            Parquet(str(tmp_path / "b.parquet"), val_fraction=0).dataset("train")

        def refused(image: object, label: object, message: str) -> None:
            pq.write_table(pa.table({"image": image, "label": label}), tmp_path / "odd.parquet")
            with pytest.raises(ValueError, match=message):
                Parquet(str(tmp_path / "odd.parquet"), val_fraction=0).dataset("train")

        nothing = {"bytes": None, "path": "x"}
        refused([nothing] * 3, [0, 1, 2], r"odd\.parquet, row 0: the row has no image")
        refused([1, 2, 3], [0, 1, 2], r"column 'image' must hold the content of image files, .*got int64")
        refused([{"a": 1}] * 3, [0, 1, 2], r"column 'image' must hold .*structs with the fields 'bytes'.*got struct<a")
        refused([{"bytes": [1]}] * 3, [0, 1, 2], r"column 'image' must hold .*got struct<bytes: list<")
        refused([nothing] * 3, [0, 1, -1], r"odd\.parquet: labels must be at least 0, got -1 1 times; -1 usually marks")
        refused([nothing] * 3, [0, 1, 2**31], r"the largest label is 2147483648, and 2,147,483,646 below it have no")
        refused([nothing] * 3, [0, 0, 0], r"odd\.parquet: a classification needs at least two classes, got \['0'\]")
        refused([nothing] * 3, ["a", " ", "b"], r"odd\.parquet: the name of class 0 must be text, got ' '")
        for labels, kind in (
            ([0, None, 2], "int64 with 1 nulls"),
            (["a", None, "b"], "string with 1 nulls"),
            ([0.0, 1.0, float("nan")], "double with 0 nulls"),
            ([True, False, True], "bool with 0 nulls"),
            ([[0], [1], [0, 1]], r"list<.*> with 0 nulls"),
        ):
            refused([nothing] * 3, labels, rf"column 'label' must hold a class index .integer. or a name.*got {kind}")
        write_parquet(tmp_path / "more.parquet", range(20), names=False, label=lambda target: int(target) + 5)
        with pytest.raises(ValueError, match=r"more\.parquet must have the 10 classes of"):
            Parquet(train, test=str(tmp_path / "more.parquet"), image_size=8).dataset("test")

    def test_real_cifar10_images(self, shared_data: Path) -> None:
        folder = shared_data / "cifar10-jpeg"
        data = Parquet(str(folder / "test.parquet"), image_size=32)
        assert data.classes[:3] == ["airplane", "automobile", "bird"]
        images, targets = next(iter(data.val_dataloader()))
        assert images.shape == (125, 3, 32, 32)  # 1,000 images are held out, for 8 batches
        assert len(targets.unique()) == 10
        assert images.float().std() > 40


class TestStreamedParquet:
    def test_row_groups_are_read_when_needed_and_forgotten(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "small.parquet", range(500))
        table = pq.read_table(tmp_path / "small.parquet")
        for part in range(2):
            pq.write_table(table.slice(250 * part, 250), tmp_path / f"part{part}.parquet", row_group_size=20)
        data = Parquet(
            str(tmp_path / "part*.parquet"), image_size=8, batch_size=16, in_memory=False, num_workers=0, val_fraction=0
        )
        source = data.open("train")
        assert source.chunks == [20] * 12 + [10] + [20] * 12 + [10]
        assert not source._kept
        for index in (0, 19, 20, 249, 250, 499):
            assert np.array_equal(np.asarray(source[index][0]), np.asarray(digit(index)))
        source._forget()
        read: list[int] = []
        original = source._read
        source._read = lambda group: (read.append(group) if group not in source._kept else None, original(group))[1]
        loader = data.train_dataloader()
        drawn = [draw.image for batch in loader.batch_sampler for draw in batch]
        assert len(set(drawn)) == len(drawn) == 496
        for _ in loader:
            assert len(source._kept) <= 8
        # Each window of 8 groups once; a batch across two windows may read a group of the first again.
        assert len(read) <= 26 + 3 * 8
        assert sorted(set(read)) == list(range(26))
        neighbours = sum(abs(a - b) == 1 for a, b in itertools.pairwise(drawn))
        assert neighbours < 50  # of 495: rows are shuffled within windows of 160, not only groups

    def test_a_broken_file_is_named(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "a.parquet", range(50))
        (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"b\.parquet is not a Parquet file, or is broken"):
            Parquet(str(tmp_path / "*.parquet")).classes  # noqa: B018

    def test_a_broken_row_group_is_named(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "a.parquet", range(50))
        content = bytearray((tmp_path / "a.parquet").read_bytes())
        content[1000:2000] = bytes(1000)  # of the images' pages
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(BrokenImageError, match=r"a\.parquet(: row group 0 is broken|, row \d+: cannot identify)"):
            Parquet(str(tmp_path / "a.parquet"), image_size=8, val_fraction=0).dataset("train")


def write_rows(path: Path, images: list[Any], labels: list[Any], metadata: Any = None, **more: list[Any]) -> None:
    table = pa.table({"image": images, "label": labels, **more})
    if metadata is not None:
        content = metadata if isinstance(metadata, str) else json.dumps(metadata)
        table = table.replace_schema_metadata({"huggingface": content})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def named(names: Any, **more: Any) -> dict[str, Any]:
    return {"info": {"features": {"label": {"names": names, **more}}}}


def seen(data: Parquet, split: Any = "train") -> list[tuple[bytes, str]]:
    """The pictures and the names of their classes."""
    source = data.open(split)
    assert source is not None
    return [(np.asarray(source[i][0]).tobytes(), data.classes[source.targets[i]]) for i in range(len(source))]


class TestLayouts:
    """What Hugging Face's tools, pandas and others write."""

    DIGITS = tuple(png(digit(index)) for index in range(6))
    CLASSES = ("cat", "dog", "cat", "emu", "dog", "cat")

    def expected(self) -> list[tuple[bytes, str]]:
        return [(np.asarray(digit(i)).tobytes(), name) for i, name in enumerate(self.CLASSES)]

    @pytest.mark.parametrize("layout", ["structs", "bytes", "paths", "path only", "bytes or path"])
    def test_images(self, layout: str, tmp_path: Path) -> None:
        (tmp_path / "pictures").mkdir()
        names = [f"pictures/{index}.png" for index in range(6)]
        for name, content in zip(names, self.DIGITS, strict=True):
            (tmp_path / name).write_bytes(content)
        both = list(zip(self.DIGITS, names, strict=True))
        images: list[Any] = {
            "structs": [{"bytes": content, "path": None} for content in self.DIGITS],
            "bytes": list(self.DIGITS),
            "paths": names,
            "path only": [{"bytes": None, "path": name} for name in names],
            "bytes or path": [
                {"bytes": content, "path": "elsewhere/x.png"} if i % 2 else {"bytes": None, "path": name}
                for i, (content, name) in enumerate(both)
            ],
        }[layout]
        write_rows(tmp_path / "a.parquet", images, list(self.CLASSES))
        assert seen(Parquet(str(tmp_path / "a.parquet"))) == self.expected()

    @pytest.mark.parametrize("layout", ["structs", "bytes", "paths"])
    def test_arrows_views(self, layout: str, tmp_path: Path) -> None:
        names = [f"{index}.png" for index in range(6)]
        for name, content in zip(names, self.DIGITS, strict=True):
            (tmp_path / name).write_bytes(content)
        fields: Any = pa.struct({"bytes": pa.binary_view(), "path": pa.string_view()})
        structs = [{"bytes": one if i % 2 else None, "path": names[i]} for i, one in enumerate(self.DIGITS)]
        images = {
            "structs": pa.array(structs, fields),
            "bytes": pa.array(self.DIGITS, pa.binary_view()),
            "paths": pa.array(names, pa.string_view()),
        }[layout]
        write_rows(tmp_path / "a.parquet", images, pa.array(self.CLASSES, pa.string_view()))
        read = pq.read_schema(tmp_path / "a.parquet")
        assert (read.field("image").type, read.field("label").type) == (images.type, pa.string_view())
        data = Parquet(str(tmp_path / "a.parquet"))
        assert data.classes == ["cat", "dog", "emu"]
        assert seen(data) == self.expected()

    @pytest.mark.parametrize("kind", ["text", "categories", "indices", "indices without _type"])
    def test_labels(self, kind: str, tmp_path: Path) -> None:
        indices = [["cat", "dog", "emu"].index(name) for name in self.CLASSES]
        labels: Any = {"text": list(self.CLASSES), "categories": pa.array(self.CLASSES).dictionary_encode()}.get(kind)
        more = {} if "without" in kind else {"_type": "ClassLabel"}
        metadata = named(["cat", "dog", "emu"], **more) if labels is None else {"info": {"features": {}}}
        labels = indices if labels is None else labels
        write_rows(tmp_path / "a.parquet", list(self.DIGITS), labels, metadata)
        write_rows(tmp_path / "b.parquet", list(self.DIGITS)[:2], labels[:2], metadata)
        data = Parquet(str(tmp_path / "a.parquet"), test=str(tmp_path / "b.parquet"))
        assert data.classes == ["cat", "dog", "emu"]
        assert seen(data) == self.expected()
        assert seen(data, "test") == self.expected()[:2]

    @pytest.mark.parametrize(
        "metadata",
        [
            "not JSON", "[" * 100_000, "null", [], {"info": None}, {"info": {"features": [1]}},
            {"info": {"features": {"label": {"dtype": "int64", "_type": "Value"}}}},
            {"info": {"features": {"label": {"feature": {"names": ["a"]}, "_type": "Sequence"}}}},
            named(None, num_classes=3), {"features": {"label": {"names": ["a", "b", "c"]}}},
        ],
    )  # fmt: skip
    def test_metadata_of_other_shapes_name_no_classes(self, metadata: Any, tmp_path: Path) -> None:
        write_rows(tmp_path / "a.parquet", list(self.DIGITS), [0, 1, 2] * 2, metadata)
        assert Parquet(str(tmp_path / "a.parquet")).classes == ["0", "1", "2"]

    def test_names_of_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        write_rows(tmp_path / "a [1].parquet", list(self.DIGITS), list(self.CLASSES))
        for pattern in (str(tmp_path / "a [1].parquet"), "~/a [1].parquet", "~/*.parquet"):
            assert len(Parquet(pattern).open("train")) == 6
        write_rows(tmp_path / "a [1]" / "b" / "c 1.parquet", list(self.DIGITS), list(self.CLASSES))
        monkeypatch.chdir(tmp_path / "a [1]")
        for pattern in (
            "~/a [1]/b/*.parquet",
            "~/a [1]/**/*1.parquet",
            "~/a*/b/c [0-9].parquet",
            "../a [1]/?/c*",
            "b/c*",
        ):
            assert len(Parquet(pattern).open("train")) == 6
        with pytest.raises(ValueError, match=r"is a folder; expected a Parquet file or a glob pattern"):
            Parquet("~").classes  # noqa: B018
        os.mkfifo(tmp_path / "pipe.parquet")
        with pytest.raises(ValueError, match=r"pipe\.parquet is not a regular file; expected a Parquet file"):
            Parquet("~/pipe.parquet").classes  # noqa: B018

    def test_what_is_not_used_is_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO", "lightning.pytorch")  # which a comparison silences
        write_rows(tmp_path / "train.parquet", list(self.DIGITS), list(self.CLASSES), caption=["a"] * 6)
        write_rows(tmp_path / "test.parquet", list(self.DIGITS), list(self.CLASSES))
        data = Parquet(str(tmp_path / "train.parquet"))
        assert len(data.classes) == 3
        assert f"{tmp_path}/train.parquet: columns not used: caption" in caplog.text
        assert f"files not used by any split: {tmp_path}/test.parquet, 1 in all" in caplog.text

    def test_a_split_in_a_folder_of_its_own_is_said_to_be_unused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", "lightning.pytorch")  # which a comparison silences
        splits = ("train", "validation", "test", "test/deeper", "@eaDir")  # as Hugging Face's converted branch has them
        for split in splits:
            write_rows(tmp_path / "a" / split / "0000.parquet", list(self.DIGITS), list(self.CLASSES))
        (tmp_path / "a" / "test" / "notes.txt").write_text("")
        write_rows(tmp_path / "b" / "0000.parquet", list(self.DIGITS), list(self.CLASSES))  # another data set
        monkeypatch.chdir(tmp_path / "a" / "train")
        test, validation = (f"{tmp_path}/a/{split}/0000.parquet" for split in ("test", "validation"))
        for train in (f"{tmp_path}/a/train/*.parquet", "*.parquet", "../train/0000.parquet"):
            caplog.clear()
            assert len(Parquet(train).classes) == 3
            assert f"files not used by any split: {test}, {validation}, 2 in all" in caplog.text
        caplog.clear()
        assert len(Parquet("0000.parquet", val=validation, test="../test/*").classes) == 3
        assert len(Parquet(f"{tmp_path}/b/*").classes) == 3
        assert "not used by any" not in caplog.text


class TestSizes:
    """A few kilobytes may stand for any number of zeros."""

    @pytest.mark.parametrize("compression", ["zstd", "gzip"])
    @pytest.mark.parametrize("as_struct", [True, False])
    def test_what_is_packed_too_tightly_is_not_read(
        self, compression: str, as_struct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        images = [png(digit(0)), png(digit(1)), bytes(2**25)]
        column: Any = [{"bytes": one, "path": "x"} for one in images] if as_struct else images
        pq.write_table(pa.table({"image": column, "label": [0, 1, 0]}), tmp_path / "a.parquet", compression=compression)
        source = Parquet(str(tmp_path / "a.parquet")).open("train")
        monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *_, **__: pytest.fail("it is read"))
        with pytest.raises(
            BrokenImageError,
            match=r"a\.parquet: row group 0 is broken: its column 'image' would grow from [\d,]+ to [\d,]+ bytes,",
        ):
            source[0]

    def test_images_of_too_many_bytes_are_not_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        images = [os.urandom(2**21), os.urandom(2**21), png(digit(0))]
        pq.write_table(pa.table({"image": images, "label": [0, 1, 0]}), tmp_path / "a.parquet")
        assert Parquet(str(tmp_path / "a.parquet")).open("train")[2][0].size == (8, 8)
        source = Parquet(str(tmp_path / "a.parquet"), max_pixels=64).open("train")
        monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *_, **__: pytest.fail("it is read"))
        with pytest.raises(
            BrokenImageError, match=r"a\.parquet, row group 0: its [\d,]+ bytes are more than .* max_pixels = 64 allows"
        ):
            source[2]


class TestSpoiledFiles:
    def test_are_read_or_named(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "a.parquet", range(20))
        images = [png(digit(index)) for index in range(20)]
        write_rows(tmp_path / "b.parquet", images, [f"name {index % 3}" for index in range(20)])
        spoiled, refused = tmp_path / "spoiled.parquet", 0
        for content in ((tmp_path / name).read_bytes() for name in ("a.parquet", "b.parquet")):
            for damaged in spoilt(content, 80, behind=len(content) - 2500):
                spoiled.write_bytes(damaged)
                try:
                    Parquet(str(spoiled), image_size=8, val_fraction=0).dataset("train")
                except ValueError as error:
                    assert str(spoiled) in str(error)  # noqa: PT017  # some bytes say nothing
                    refused += 1
        assert refused > 50

    def test_a_checksum_is_heeded_where_there_is_one(self, tmp_path: Path) -> None:
        labels = pa.array([0, 1] * 500, pa.int32())
        table = pa.table({"image": [b"x"] * 1000, "label": labels})
        options: Any = {"use_dictionary": False, "compression": "none", "write_page_checksum": True}
        pq.write_table(table, tmp_path / "a.parquet", **options)
        content = (tmp_path / "a.parquet").read_bytes()
        values = labels.to_numpy().tobytes()
        place = content.index(values)
        changed = b"\1" + values[1:]  # the first label
        (tmp_path / "a.parquet").write_bytes(content[:place] + changed + content[place + len(values) :])
        with pytest.raises(ValueError, match=r"a\.parquet is not a Parquet file, or is broken: .*CRC"):
            Parquet(str(tmp_path / "a.parquet")).classes  # noqa: B018


class TestFilesThatDisagree:
    """Shards of one split, and splits, whose labels mean different things."""

    @pytest.mark.parametrize(
        ("labels", "metadata", "message"),
        [
            ([0, 1], named(["dog", "cat"]), r"class indices of 2 classes, 'cat', 'dog'; got .*classes, 'dog', 'cat'"),
            ([0, 1], named(["cat", "dog", "emu"]), r"of 2 classes, 'cat', 'dog'; got class indices of 3 classes"),
            ([0, 1], None, r"of 2 classes, 'cat', 'dog'; got class indices, without a list of names"),
            (["1", "0"], named(["cat", "dog"]), r"class indices of 2 classes, 'cat', 'dog'; got names as labels"),
            ([0, 2], named(["cat", "dog"]), r"labels must be from 0 to 1, got 2 in row 1 \(and 0 more\)"),
            (
                [0, -1],
                named(["cat", "dog"]),
                r"labels must be from 0 to 1, got -1 in row 1 .*; -1 marks images",
            ),
            ([0, 1], named(["cat", "cat"]), r"the names of classes must differ, got 'cat' of \[0, 1\]"),
            ([0, 1], named(["cat", 5]), r"the name of class 1 must be text, got 5"),
            ([0, 1], named("cats"), r"must be a list, got 'cats'"),
        ],
    )
    def test_are_refused(self, labels: list[Any], metadata: Any, message: str, tmp_path: Path) -> None:
        images = [png(digit(index)) for index in range(2)]
        write_rows(tmp_path / "a0.parquet", images, [0, 1], named(["cat", "dog"]))
        write_rows(tmp_path / "a1.parquet", images, labels, metadata)
        with pytest.raises(ValueError, match=rf"a1\.parquet.*{message}"):
            Parquet(str(tmp_path / "a*.parquet")).classes  # noqa: B018
        data = Parquet(str(tmp_path / "a0.parquet"), test=str(tmp_path / "a1.parquet"))
        with pytest.raises(ValueError, match=rf"a1\.parquet.*{message}"):
            data.open("test")

    def test_a_name_that_the_training_images_lack(self, tmp_path: Path) -> None:
        images = [png(digit(index)) for index in range(2)]
        write_rows(tmp_path / "a.parquet", images, ["cat", "dog"])
        write_rows(tmp_path / "b.parquet", images, ["dog", "emu"])
        data = Parquet(str(tmp_path / "a.parquet"), test=str(tmp_path / "b.parquet"))
        with pytest.raises(ValueError, match=r"b\.parquet: labels must be one of cat, dog, got 'emu' in row 1"):
            data.open("test")

    @pytest.mark.parametrize("texts", [True, False])
    def test_an_accent_is_the_same_in_both_of_unicodes_forms(self, texts: bool, tmp_path: Path) -> None:
        images = [png(digit(index)) for index in range(2)]
        for file, form in (("a0", "NFC"), ("a1", "NFD")):
            names = [unicodedata.normalize(form, "é"), "f"]  # type: ignore[arg-type]
            write_rows(
                tmp_path / f"{file}.parquet", images, names if texts else [0, 1], None if texts else named(names)
            )
        data = Parquet(str(tmp_path / "a0.parquet"), test=str(tmp_path / "a1.parquet"))
        assert list(data.open("train").targets) == list(data.open("test").targets)
        assert len(Parquet(str(tmp_path / "a*.parquet")).classes) == 2

    def test_a_column_given_twice(self, tmp_path: Path) -> None:
        table = pa.table([pa.array([b"a"]), pa.array([0]), pa.array([1])], names=["image", "label", "label"])
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=r"must have a column 'label', got \['image', 'label', 'label'\]"):
            Parquet(str(tmp_path / "a.parquet")).classes  # noqa: B018
