"""WebDataset's tar files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from awconv.data import WebDataset
from tests.data.samples import DIGITS, digit, write_shard


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
        assert source.targets == DIGITS.target[:120].tolist()
        for index in (0, 41, 119):
            assert np.array_equal(np.asarray(source[index][0]), np.asarray(digit(index)))
        assert sum(len(targets) for _, targets in data.test_dataloader()) == 30
        with pytest.raises(FileNotFoundError, match=r"no file matches .*train-3\.tar"):
            WebDataset(str(tmp_path / "train-{1..3}.tar")).classes  # noqa: B018
        numbered = WebDataset(str(tmp_path / "train-{1..2}.tar"), image_size=8)
        assert numbered.open("train").targets == DIGITS.target[40:120].tolist()
        streamed = WebDataset(
            str(tmp_path / "train-*.tar"), image_size=8, batch_size=16, in_memory=False, num_workers=2, val_fraction=0
        )
        assert sum(len(targets) for _, targets in streamed.train_dataloader()) == 112

    def test_mistakes_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no file matches .*none\.tar"):
            WebDataset(str(tmp_path / "none.tar")).classes  # noqa: B018
        write_shard(tmp_path / "a.tar", range(20))
        (tmp_path / "cut.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:3000])
        with pytest.raises(ValueError, match=r"cut\.tar is not a plain tar file, or a broken one"):
            WebDataset(str(tmp_path / "cut.tar")).classes  # noqa: B018
        whole = (tmp_path / "a.tar").read_bytes()
        end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
        for length in (end, end - 512 * 3):  # without the blocks of zeros, and with a member of which nothing is left
            (tmp_path / "short.tar").write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"short\.tar is (cut off|not a plain tar file, or a broken one)"):
                WebDataset(str(tmp_path / "short.tar")).classes  # noqa: B018
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
        with pytest.raises(ValueError, match=r"a\.tar\.gz is not a plain tar file"):
            WebDataset(str(tmp_path / "a.tar.gz")).classes  # noqa: B018
        write_shard(tmp_path / "none.tar", range(5), label="txt")
        with pytest.raises(ValueError, match=r"image images/0000\.png has no label; expected images/0000\.cls"):
            WebDataset(str(tmp_path / "none.tar")).classes  # noqa: B018
        with pytest.raises(ValueError, match=r"labels must be from 0 to 1, got 9; name all classes with class_names"):
            WebDataset(str(tmp_path / "a.tar"), class_names=["a", "b"]).classes  # noqa: B018
