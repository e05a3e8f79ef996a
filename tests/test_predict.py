"""Predictions on folders as users have them, and drawn copies. Networks are not trained."""

from __future__ import annotations

import csv
import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from awconv.cli import main
from awconv.predict import Detected, classify, detect, predict
from awconv.tasks import ClassificationTask, DetectionTask
from tests.data.samples import digit, png

CKPT = Path("invented.ckpt")


@pytest.fixture
def classifier(monkeypatch: pytest.MonkeyPatch) -> ClassificationTask:
    """Takes the place of a checkpoint's."""
    task = ClassificationTask(
        ["a\x1b[2J[red]:cat:", "b"], [3, 8, 8], mean=[0.5] * 3, std=[0.5] * 3, network="resnet8_cifar"
    ).eval()
    monkeypatch.setattr("awconv.predict.load_task", lambda ckpt, *_: task)
    return task


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> DetectionTask:
    """Finds the same thing in every image."""
    task = DetectionTask(["\x1bcat"], [1], network="resnet8_cifar").eval()
    found = {"boxes": torch.tensor([[2.0, 2, 6, 6]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    monkeypatch.setattr(task, "forward", lambda images: [found])
    monkeypatch.setattr("awconv.predict.load_task", lambda ckpt, *_: task)
    return task


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, name in enumerate(("a.png", "b [1].png")):
        digit(index, 16).save(folder / name)
    return folder


def predicted(capsys: pytest.CaptureFixture[str], *images: Path, status: int = 0, **arguments: Any) -> list[str]:
    assert predict(images, CKPT, format="json", **arguments) == status
    return [one["image"] for one in json.loads(capsys.readouterr().out)["predictions"]]


class TestWhichImages:
    def test_what_programs_leave_behind_is_passed_over(
        self, classifier: ClassificationTask, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        names = (
            "readme.pdf", "clip.mpg", "features.h5", "logo.eps", "._a.png", ".ipynb_checkpoints/a-checkpoint.png",
            "@eaDir/a.png/x.jpg", "__MACOSX/a.png", "Thumbs.db", "a.psd",
        )  # fmt: skip
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"invented")
        assert predicted(capsys, folder) == [str(folder / "a.png"), str(folder / "b [1].png")]

    def test_an_image_named_twice_is_predicted_once(
        self, classifier: ClassificationTask, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (folder.parent / "link").symlink_to(folder)
        same = (folder, folder, folder / "a.png", folder / ".." / "photos", folder.parent / "link" / "b [1].png")
        assert predicted(capsys, *same) == [str(folder / "a.png"), str(folder / "b [1].png")]

    def test_a_name_that_is_not_utf8_is_an_argument_too(
        self, classifier: ClassificationTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
        digit(0).save(name)
        assert main(["predict", f"--ckpt={CKPT}", "--format=json", name]) == 0
        assert json.loads(capsys.readouterr().out)["predictions"][0]["image"] == name

    def test_the_home_folder(
        self,
        classifier: ClassificationTask,
        folder: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("HOME", str(folder.parent))
        asked: list[str] = []
        monkeypatch.setattr("awconv.predict.load_task", lambda ckpt, *_: (asked.append(ckpt), classifier)[1])
        assert predict([Path("~/photos")], Path("~/x.ckpt"), format="json") == 0
        assert asked == [str(folder.parent / "x.ckpt")]
        assert str(folder / "a.png") in capsys.readouterr().out

    def test_nothing_to_predict_is_named(self, classifier: ClassificationTask, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.png")
        for name, message in (("", "holds no image file"), ("pipe.png", "is neither"), ("none", "is neither")):
            with pytest.raises(FileNotFoundError, match=message):
                predict([tmp_path / name], CKPT)

    def test_a_telephones_picture_is_seen_as_in_training(self, classifier: ClassificationTask, tmp_path: Path) -> None:
        upright = digit(3, 8)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter, clockwise
        upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "stored.png", exif=exif)
        upright.save(tmp_path / "upright.png")
        files = [tmp_path / "stored.png", tmp_path / "upright.png"]
        first, second = classify(classifier, files, 2)
        assert first.top == second.top


class TestWhatIsPrinted:
    def test_names_cannot_steer_the_terminal(
        self, classifier: ClassificationTask, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        content = png(digit(0))
        names = {b"caf\xe9.png": r"caf\xe9.png", b"\x1b[2J.png": r"\x1b[2J.png", b"[bold]:dog:.png": "[bold]:dog:.png"}
        for name in names:
            (Path(os.fsdecode(os.fsencode(folder) + b"/" + name))).write_bytes(content)
        (folder / "cut\x1b[2J.png").write_bytes(content[:40])
        assert main(["predict", f"--ckpt={CKPT}", str(folder)]) == 1
        printed = capsys.readouterr()
        assert "\x1b" not in printed.out + printed.err
        printed.out.encode()  # there is nothing that UTF-8 cannot hold
        for shown in (*names.values(), "b [1].png"):
            assert f"{folder}/{shown} " in printed.out
        assert r"\x1b[2J[red]:cat:" in printed.out or " b " in printed.out  # whichever class it takes them for
        assert r"cut\x1b[2J.png: " in printed.err
        # JSON holds the names as they are.
        assert main(["predict", f"--ckpt={CKPT}", "--format=json", str(folder)]) == 1
        found = [one["image"] for one in json.loads(capsys.readouterr().out)["predictions"]]
        assert {os.fsencode(Path(name).name) for name in found} == {*names, b"a.png", b"b [1].png"}

    def test_class_names_cannot_either(
        self, classifier: ClassificationTask, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        classifier.classes[1] = classifier.classes[0]
        assert predict([folder], CKPT) == 0
        assert capsys.readouterr().out.count(r"a\x1b[2J[red]:cat:") == 2

    @pytest.mark.parametrize("format", ["json", "table"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_outputs_that_are_not_finite_are_an_error(
        self,
        classifier: ClassificationTask,
        folder: Path,
        value: float,
        format: Any,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        with torch.no_grad():
            next(classifier.network.parameters()).fill_(value)
        assert main(["predict", f"--ckpt={CKPT}", f"--format={format}", str(folder)]) == 1
        printed = capsys.readouterr()
        assert f"outputs for {folder}/a.png are not finite; the checkpoint is damaged" in printed.err
        assert printed.out == ""

    def test_a_detectors_too(self, detector: DetectionTask, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in (("boxes", [[0.0, 0, 1, float("nan")]]), ("scores", [float("nan")])):
            found = {"boxes": torch.ones(1, 4), "labels": torch.tensor([1]), "scores": torch.ones(1)}
            found[name] = torch.tensor(value)
            monkeypatch.setattr(detector, "forward", lambda images, found=found: [found])
            with pytest.raises(ValueError, match=r"outputs for .*a\.png are not finite"):
                predict([folder], CKPT)


class TestBounds:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (dict(batch_size=0), "batch_size must be at least 1, got 0"),
            (dict(max_pixels=0), "max_pixels must be at least 1, got 0"),
            (dict(top_k=0), "top_k must be at least 1, got 0"),
            (dict(threshold=float("nan")), "threshold must be from 0 to 1, got nan"),
        ],
    )
    def test_numbers_out_of_range_are_refused(
        self, arguments: dict[str, Any], message: str, classifier: ClassificationTask, folder: Path
    ) -> None:
        with pytest.raises(ValueError, match=message):
            predict([folder], CKPT, **arguments)

    def test_an_image_of_too_many_pixels_is_reported_and_the_rest_goes_on(
        self, classifier: ClassificationTask, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        digit(0, 100).save(folder / "large.png")
        assert len(predicted(capsys, folder, status=1, max_pixels=9_999)) == 2
        assert len(predicted(capsys, folder, max_pixels=10_000)) == 3

    def test_an_image_that_is_too_long_for_a_detector_is_reported(
        self, detector: DetectionTask, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.undo()  # the real detector
        monkeypatch.setattr("awconv.predict.load_task", lambda ckpt, *_: detector)
        Image.new("L", (1334, 1)).save(folder / "long.png")
        assert main(["predict", f"--ckpt={CKPT}", str(folder / "long.png")]) == 1
        assert "long.png: 1334x1 pixels shrink to less than one in width or height" in capsys.readouterr().err
        Image.new("L", (1333, 1)).save(folder / "long.png")
        assert predict([folder / "long.png"], CKPT) == 0

    def test_a_large_image_takes_a_few_bytes_a_pixel(self, tmp_path: Path) -> None:
        """Pillow's is let go, and single precision is not held twice."""
        task = DetectionTask(["cat"], [1], network="resnet8_cifar", min_size=32, max_size=32).eval()
        side = 4000
        for name, size in (("small", 32), ("large", side)):
            Image.new("RGB", (size, size), "red").save(tmp_path / f"{name}.png", compress_level=1)
        child = os.fork()
        if child == 0:
            list(detect(task, [tmp_path / "small.png"], 0.5))  # what the libraries take is none of the image's
            has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            # uint8 and float32 are 15 bytes a pixel. Addresses, and not memory, which the system swaps as it likes.
            resource.setrlimit(resource.RLIMIT_AS, (has + 20 * side**2,) * 2)
            results = list(detect(task, [tmp_path / "large.png"], 0.5))
            os._exit(0 if isinstance(results[0], Detected) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class TestForms:
    def test_several_classes_in_every_form(
        self, classifier: ClassificationTask, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def printed(format: Any, **arguments: Any) -> str:
            assert predict([folder / "a.png"], CKPT, format=format, **arguments) == 0
            return capsys.readouterr().out

        one = json.loads(printed("json", top_k=2))["predictions"][0]
        (other,) = one["others"]
        assert one["probability"] >= other["probability"]
        assert one["probability"] + other["probability"] == pytest.approx(1)
        assert {one["label"], other["label"]} == set(classifier.classes)
        head, row = csv.reader(printed("csv", top_k=9).splitlines())  # there are two classes
        assert head == ["image", "class 1", "probability 1", "class 2", "probability 2"]
        assert row[0] == str(folder / "a.png")
        assert [float(row[2]), float(row[4])] == [one["probability"], other["probability"]]
        assert "\x1b" not in row[1] + row[3]
        assert printed("csv").startswith("image,class,probability\n")
        assert "class 2" in printed("table", top_k=2)

    def test_a_detectors_rows(self, detector: DetectionTask, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert predict([folder], CKPT, format="csv") == 0
        head, *rows = csv.reader(capsys.readouterr().out.splitlines())
        assert head == ["image", "class", "score", "x1", "y1", "x2", "y2"]
        assert [row[0] for row in rows] == [str(folder / "a.png"), str(folder / "b [1].png")]
        assert [float(cell) for cell in rows[0][2:]] == pytest.approx([0.9, 2, 2, 6, 6])
        with pytest.raises(ValueError, match=r"top_k is a classifier's"):
            predict([folder], CKPT, top_k=2)


class TestCopies:
    @pytest.mark.parametrize("place", ["photos/drawn", "drawn"])
    def test_those_of_a_former_run_are_renewed_and_not_predicted(
        self, place: str, detector: DetectionTask, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        draw = folder.parent / place
        for _ in range(2):
            assert len(predicted(capsys, folder, draw=draw)) == 2
        assert {path.name for path in draw.iterdir()} == {"a.png", "b [1].png"}

    def test_are_never_written_over_an_image(self, detector: DetectionTask, folder: Path) -> None:
        digit(5, 16).save(folder / "c.png")
        (folder / "sub").mkdir()
        digit(6, 16).save(folder / "sub" / "c.png")
        before = {path: path.read_bytes() for path in folder.rglob("*.png")}
        for images in ([folder], [folder / "sub" / "c.png"]):  # as an input, and as a stranger
            with pytest.raises(ValueError, match=r"\.png.*; give draw another folder"):
                predict(images, CKPT, draw=folder)
        assert {path: path.read_bytes() for path in folder.rglob("*.png")} == before

    @pytest.mark.parametrize("broken", [True, False])
    def test_follow_no_link(self, broken: bool, detector: DetectionTask, folder: Path) -> None:
        target = folder.parent / "precious.png"
        if not broken:
            digit(5, 16).save(target)
        before = None if broken else target.read_bytes()
        drawn = folder.parent / "drawn"
        drawn.mkdir()
        (drawn / "a.png").symlink_to(target)
        with pytest.raises(ValueError, match=r"a\.png would be written through the link .*drawn/a\.png"):
            predict([folder], CKPT, draw=drawn)
        assert (target.read_bytes() if target.exists() else None) == before

    def test_lie_side_by_side_under_names_that_differ(self, detector: DetectionTask, folder: Path) -> None:
        drawn, elsewhere = folder.parent / "drawn", folder.parent / "elsewhere"
        for place in (folder / "may", folder / "june" / "may", elsewhere):
            place.mkdir(parents=True)
            digit(2, 16).convert("RGB").save(place / "c.jpg")
        digit(2, 16).convert("RGB").save(folder / "d.bmp")
        digit(2, 16).convert("RGB").save(folder / "e.webp")
        for _ in range(2):  # the second one replaces the first
            assert predict([folder, elsewhere], CKPT, draw=drawn) == 0
        names = {"june_may_c.jpg": "JPEG", "photos_may_c.jpg": "JPEG", "elsewhere_c.jpg": "JPEG", "a.png": "PNG"}
        names |= {"b [1].png": "PNG", "d.bmp.png": "PNG", "e.webp": "WEBP"}
        assert {path.name: Image.open(path).format for path in drawn.iterdir()} == names

    def test_say_where_nothing_was_found(self, detector: DetectionTask, tmp_path: Path) -> None:
        Image.new("RGB", (200, 100), "white").save(tmp_path / "plain.png")
        drawn = tmp_path / "drawn"
        assert predict([tmp_path / "plain.png"], CKPT, draw=drawn, threshold=0.95) == 0
        copy = np.asarray(Image.open(drawn / "plain.png").convert("RGB"))
        assert (copy[:20, :150] != 255).any()  # the note, in the upper left corner
        assert (copy[30:] == 255).all()

    def test_a_link_planted_meanwhile_is_replaced(
        self, detector: DetectionTask, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        precious, drawn = folder.parent / "precious", folder.parent / "drawn"
        precious.write_text("mine")

        def plant(images: list[Tensor]) -> list[dict[str, Tensor]]:
            (drawn / "a.png").symlink_to(precious)
            return [{"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.long), "scores": torch.empty(0)}]

        monkeypatch.setattr(detector, "forward", plant)
        assert predict([folder / "a.png"], CKPT, draw=drawn) == 0
        assert precious.read_text() == "mine"
        assert Image.open(drawn / "a.png").size == (16, 16)
        assert {path.name for path in drawn.iterdir()} == {"a.png"}

    def test_what_a_killed_run_left_is_removed_after_an_hour(self, detector: DetectionTask, folder: Path) -> None:
        (folder / "sub").mkdir()
        digit(2, 16).save(folder / "sub" / "c.png")
        drawn, name = folder.parent / "drawn", ".0123456789abcdef.partial"
        old = {drawn / name}
        others = {
            drawn / "sub" / name,
            drawn / ".fedcba9876543210.partial",
            drawn / "x.partial",
            drawn / ".0123.partial",
        }
        (drawn / "sub").mkdir(parents=True)
        for file in old | others:
            file.write_bytes(b"half")
        for file in old | others - {drawn / ".fedcba9876543210.partial"}:
            os.utime(file, (0, 0))
        assert predict([folder], CKPT, draw=drawn) == 0
        assert {file for file in drawn.rglob("*") if file.suffix == ".partial"} == others

    def test_a_file_is_no_folder_for_them(
        self, detector: DetectionTask, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (folder.parent / "drawn").write_text("mine")
        for draw in (folder.parent / "drawn", folder.parent / "drawn" / "deeper"):
            assert main(["predict", f"--ckpt={CKPT}", f"--draw={draw}", str(folder)]) == 1
            assert f"draw must be a folder, and {draw} cannot be made one: " in capsys.readouterr().err
        assert (folder.parent / "drawn").read_text() == "mine"

    def test_links_in_a_circle_are_no_folder_either(
        self, detector: DetectionTask, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (folder.parent / "drawn").symlink_to("drawn")
        assert main(["predict", f"--ckpt={CKPT}", f"--draw={folder.parent / 'drawn'}", str(folder)]) == 1
        assert f"draw must be a folder, and {folder.parent / 'drawn'} cannot be made one" in capsys.readouterr().err

    def test_a_folder_that_cannot_be_written(
        self, detector: DetectionTask, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root, who can write anywhere
        with pytest.raises(ValueError, match=r"nothing can be written into .*drawn; give draw another folder"):
            predict([folder], CKPT, draw=folder.parent / "drawn")

    def test_one_that_fails_loses_no_prediction(
        self, detector: DetectionTask, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        long = "x" * 251 + ".bmp"  # with .png behind it, longer than names may be
        digit(2, 16).save(folder / long)
        assert len(predicted(capsys, folder, status=1, draw=folder.parent / "drawn")) == 3
        assert predict([folder], CKPT, draw=folder.parent / "drawn") == 1
        error = capsys.readouterr().err
        assert "cannot be written: File name too long" in error
        assert "broken image" not in error
        assert {path.name for path in (folder.parent / "drawn").iterdir()} == {"a.png", "b [1].png"}
