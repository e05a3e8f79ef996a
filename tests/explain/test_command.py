"""``awconv explain``: its page, its figures and its folder."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import awconv
from awconv.cli import main
from awconv.data import Digits
from awconv.sources import load_task
from awconv.tasks import ClassificationTask
from tests.test_fold_command import NAME, STAGES, checkpoint_of, images_of, written

for _library in ("pytorch_grad_cam", "jinja2"):
    pytest.importorskip(_library, reason="awconv explain needs the extra explain")
FEW = "--images=48"


def explained(out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    assert main(["explain", *arguments, f"--out={out}"]) == 0
    return json.loads((out / "explain.json").read_text()), (out / "index.html").read_text()


@pytest.fixture(scope="module")
def of_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("explained") / "page"
    explained(out, NAME, "--data=Digits", "--shown=4")
    return out


def figures(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "explain.json").read_text())


def test_the_figures_are_those_of_the_network(of_digits: Path) -> None:
    found, (images, targets) = figures(of_digits), images_of("val")
    model = awconv.load(NAME).network
    with torch.no_grad():
        right = int((model(images).argmax(1) == targets).sum())
    assert found["images"] == len(targets) == 144
    assert found["accuracy"] == pytest.approx(100 * right / 144)
    assert [layer["layer"] for layer in found["layers"]] == STAGES
    maps = awconv.attention_maps(model, images)
    report = awconv.fold(model, [(images, targets)], max_drop=100)
    trials = {trial.layer: trial for trial in report.trials}
    for layer in found["layers"]:
        attention = maps[layer["layer"]].double()
        assert layer["variation"] == pytest.approx(trials[layer["layer"]].variation, rel=1e-4)
        assert sum(layer["variance"].values()) == pytest.approx(float(attention.var(correction=0)), rel=1e-4)
        torch.testing.assert_close(
            torch.tensor(layer["pattern"]["mean"]), attention.mean((0, 1, 2)).float(), rtol=1e-3, atol=1e-5
        )
        lost = found["accuracy"] - trials[layer["layer"]].accuracy_alone
        assert layer["worth"]["points"] == pytest.approx(lost, abs=1e-6)
    assert found["without"]["mean"]["points"] == pytest.approx(found["accuracy"] - report.accuracy_after, abs=1e-6)


def test_the_page_says_at_the_top_where_attention_acts(of_digits: Path) -> None:
    found, page = figures(of_digits), html.unescape((of_digits / "index.html").read_text())
    most = max(found["layers"], key=lambda layer: layer["variation"])
    assert f"Attention acts most in {most['layer']}: from image to image it changes the weights by" in page
    assert found["summary"] in page
    lead = page.index('class="lead"')
    assert page.index("<h1>") < lead < page.index('<img class="overview"') < page.index('class="photo"')
    assert page.count("<details") == len(STAGES)
    for layer in found["layers"]:
        worth = f"{layer['worth']['points']:+.2f}".replace("-", "\N{MINUS SIGN}").replace("+0.00", "0.00")
        assert re.search(
            rf'<th scope="row">{re.escape(layer["layer"])}</th><td>[\d.]+ %</td><td>{re.escape(worth)}<', page
        )


def test_the_page_needs_nothing_else_and_names_each_picture(of_digits: Path) -> None:
    page = (of_digits / "index.html").read_text()
    pictures = re.findall(r"<img[^>]*>", page)
    assert len(pictures) > 50
    for picture in pictures:
        assert 'src="data:image/png;base64,' in picture
        assert re.search(r'alt="[^"]{3,}"', picture), picture[-200:]
    assert not re.search(r"<script|<link|@import|https?://", page)
    assert "prefers-color-scheme: dark" in page
    assert (of_digits / "index.html").stat().st_size < 3e6
    assert set(figures(of_digits)["files"]) == {file.name for file in of_digits.iterdir()}
    for file in of_digits.glob("*.png"):
        Image.open(file).verify()
    light, dark = (Image.open(of_digits / f"overview{end}.png").convert("L") for end in ("", "_dark"))
    assert light.size == dark.size
    assert light.getpixel((1, 1)) > 200 > 60 > dark.getpixel((1, 1))


def test_a_narrow_screen_shows_the_page_without_scrolling_it_sideways(of_digits: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    page = (of_digits / "index.html").read_text().replace("<details", "<details open")
    copy = tmp_path / "page.html"
    told = "<script>document.title = `${document.documentElement.scrollWidth} of ${innerWidth}`</script>"
    copy.write_text(page.replace("</body>", f"{told}</body>"))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        "--dump-dom",
    ]
    options += ["--dump-dom", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=400,900"]
    dom = subprocess.run([browser, *options, copy.as_uri()], capture_output=True, text=True, timeout=120).stdout
    width, window = map(int, re.search(r"<title>(\d+) of (\d+)</title>", dom).groups())  # type: ignore[union-attr]
    assert width <= window <= 500


def test_image_files_have_no_labels_and_names_may_hold_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = [f"<i>{index}$_$" for index in range(10)]
    task = ClassificationTask(classes, [1, 8, 8], [0.305], [0.376], network="aw_resnet8_cifar")
    source, folder = written(task, tmp_path / "any.ckpt"), tmp_path / "photos"
    folder.mkdir()
    names = ["<b>&'\".png", "{{ 7 * 7 }}.png", os.fsdecode(b"\xff.png"), "turned\u202egnp.png"]
    for index, name in enumerate(names):
        Image.fromarray(Digits().dataset("val").images[index, 0].numpy()).save(folder / name)
    (folder / "broken.png").write_bytes(b"no image")
    page = folder / "page"  # whose pictures are no images of a later run
    for _ in range(2):
        assert main(["explain", str(source), f"--out={page}", str(folder)]) == 1  # of the broken image
        assert "broken image: " in capsys.readouterr().err
        found = figures(page)
        assert sorted(one["image"] for one in found["predictions"]) == sorted(str(folder / name) for name in names)
    text = (page / "index.html").read_text()
    assert "<b>" not in text
    assert "<i>" not in text
    assert all(name in html.unescape(text) for name in (names[0], names[1], r"\xff.png", r"turned\u202egnp.png"))
    assert "\u202e" not in text
    assert any(name in html.unescape(text) for name in classes)
    assert found["accuracy"] is None
    assert all(layer["worth"]["points"] is None and not layer["classes"] for layer in found["layers"])
    assert "Without labels" in text
    assert "Class by class" not in text
    assert "predictions that change" in text


def test_two_networks_stand_side_by_side(tmp_path: Path) -> None:
    plain = checkpoint_of(tmp_path / "plain.ckpt", network="resnet8_cifar")
    found, page = explained(tmp_path / "page", NAME, "--data=Digits", f"--compare={plain}", "--shown=2")
    images, targets = images_of("val")
    first, second = (awconv.load(source).network(images).argmax(1) for source in (NAME, plain))
    only = [int(((a == targets) & (b != targets)).sum()) for a, b in ((first, second), (second, first))]
    difference = found["compare"]["difference"]
    assert [difference["lost"], difference["gained"]] == only
    assert found["compare"]["other"]["accuracy"] == pytest.approx(100 * float((second == targets).double().mean()))
    assert len(found["compare"]["disagreements"]) == int((first != second).sum())
    assert f"{int((first != second).sum())} images on which they disagree" in page
    assert (tmp_path / "page" / "photo-01-cam-other.png").is_file()
    assert "layers" not in found["compare"]["other"]


def test_of_two_networks_with_attention_both_are_shown_and_of_an_averaged_one_the_average(tmp_path: Path) -> None:
    other = checkpoint_of(tmp_path / "averaged.ckpt", network="aw_resnet8_cifar", ema_decay=0.9)
    found, page = explained(tmp_path / "page", NAME, "--data=Digits", f"--compare={other}", "--shown=1")
    images, targets = images_of("val")
    with torch.no_grad():
        right = (load_task(other).evaluated(images).argmax(1) == targets).double().mean()
    assert found["compare"]["other"]["accuracy"] == pytest.approx(100 * float(right))
    assert len(found["compare"]["other"]["layers"]) == 6
    assert "overview_other_dark.png" in found["files"]
    assert "weights change by, averaged.ckpt" in page


def test_a_checkpoints_own_digits_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, folded = checkpoint_of(tmp_path / "aw.ckpt", network="aw_resnet8_cifar"), tmp_path / "folded.ckpt"
    arguments = ["--data=Digits", "--data.val_fraction=0.2", "--max_drop=0.5"]
    assert main(["fold", str(source), *arguments, f"--out={folded}"]) == 0  # its checkpoint names the data
    found, _ = explained(tmp_path / "page", str(folded), "--shown=1")
    assert found["images"] == len(Digits(val_fraction=0.2).dataset("val"))
    assert "the images are those of Digits" in capsys.readouterr().err


def test_attention_that_is_the_same_for_all_images_is_said_to_be(tmp_path: Path) -> None:
    converted = dict(network="resnet8_cifar", convert={"init": "identity"})
    task = ClassificationTask([str(digit) for digit in range(10)], [1, 8, 8], [0.305], [0.376], **converted)
    source = written(task, tmp_path / "identity.ckpt")
    found, page = explained(tmp_path / "page", str(source), "--data=Digits", FEW, "--shown=1")
    assert "Attention does not depend on the image in any layer" in page
    assert {layer["variation"] for layer in found["layers"]} == {0.0}
    assert found["without"]["zero"]["changed"] == 0


def test_more_images_than_memory_holds_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("awconv.explain.images.IN_MEMORY_BYTES", 100 * 64)
    assert main(["explain", NAME, "--data=Digits", f"--out={tmp_path / 'page'}"]) == 1
    assert "144 images of 64 bytes are kept in memory" in (said := capsys.readouterr().err)
    assert "give --images=100 or fewer" in said


def test_a_folder_with_anything_else_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["explain", "missing.ckpt", "--data=Digits", f"--out={tmp_path}"]) == 1
    assert "holds what awconv explain did not write (notes.txt); give --out another name" in capsys.readouterr().err


OUT = "--out={here}/page"
REFUSED = {
    "no images": (f"{NAME} {OUT}", "missing: images, or --data: the data set, such as --data=Digits"),
    "images twice": (f"{NAME} {{here}}/a.png --data=Digits {OUT}", "either image files or --data name the images"),
    "one image": (f"{NAME} {{here}}/a.png {OUT}", "needs at least 2 that can be read; got 1"),
    "no file": (f"{NAME} {{here}}/none.png {OUT}", "none.png is neither an image file nor a folder"),
    "a plain network": (f"{{here}}/plain.ckpt --data=Digits {OUT}", "has no AW-convolution, so it has no attention to"),
    "no checkpoint": (f"{{here}}/none.ckpt --data=Digits {OUT}", "none.ckpt is not there"),
    "a file as folder": (f"{NAME} --data=Digits --out={{here}}/a.png", "is there already and no folder"),
    "below a file": (f"{NAME} --data=Digits --out={{here}}/a.png/page", "a.png/page cannot be one: .*a.png is none"),
    "no such option": (f"{NAME} --data=Digits --show=1 {OUT}", "there is no option --show; near it: --shown"),
    "no such split": (f"{NAME} --data=Digits --data.val_fraction=0 {OUT}", "the data have no val split"),
    "images without pixels": (f"{NAME} {{here}}/a.png --max_pixels=0 {OUT}", "max_pixels must be at least 1, got 0"),
    "data whose folder is not known": (
        f"{{here}}/folder.ckpt {OUT}",
        "trained on ImageFolder, whose folder is not known",
    ),
    "data that a checkpoint spoils": (f"{{here}}/spoiled.ckpt {OUT}", "cannot be opened: .*; give --data"),
    "data of somebody else": (f"{{here}}/other.ckpt {OUT}", "missing: images, or --data"),
    "too few": (f"{NAME} --data=Digits --images=1 {OUT}", "images must be a number from 2"),
    "none shown": (f"{NAME} --data=Digits --shown=0 {OUT}", "shown must be a number from 1"),
    "other classes": (
        f"{NAME} --data=Digits --compare={{here}}/three.ckpt {OUT}",
        r"three.ckpt has classes \['a', 'b', 'c'\], the first \['0'",
    ),
}


TRAINED_ON = {
    "folder.ckpt": {"data.class_path": '"awconv.data.ImageFolder"', "data.init_args.root": '"photos"'},
    "spoiled.ckpt": {"data.class_path": '"awconv.data.Digits"', "data.init_args.val_fraction": '"much"'},
    "other.ckpt": {"data.class_path": '"os.system"'},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_a_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = REFUSED[name]
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    if "plain" in arguments:
        checkpoint_of(tmp_path / "plain.ckpt", network="resnet8_cifar")
    if "three" in arguments:
        task = ClassificationTask(["a", "b", "c"], [1, 8, 8], [0.305], [0.376], network="aw_resnet8_cifar")
        written(task, tmp_path / "three.ckpt")
    for file, data in TRAINED_ON.items():
        if file in arguments:
            checkpoint = torch.load(checkpoint_of(tmp_path / file, network="aw_resnet8_cifar"), weights_only=True)
            checkpoint["callbacks"] = {"SameSettings": {"settings": data}}
            torch.save(checkpoint, tmp_path / file)
    before = sorted(tmp_path.iterdir())
    assert main(["explain", *arguments.format(here=tmp_path).split()]) in (1, 2)
    printed, said = capsys.readouterr()
    assert re.search(message, said), said
    assert printed == ""
    assert sorted(tmp_path.iterdir()) == before


def test_a_detector_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("awconv.explain.command.load_task", lambda *arguments: nn.Identity())
    assert main(["explain", "detector.ckpt", "--data=Digits", f"--out={tmp_path}/o"]) == 1
    said = capsys.readouterr().err
    assert "only classifiers are explained, and detector.ckpt is a detector; awconv.attention_maps" in said
