"""What the page shows, without a browser: see ``test_process.py`` for one."""

from __future__ import annotations

import asyncio
import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="serving needs fastapi: pip install '.[serve]'")
pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[serve]'")

import awconv
from awconv.predict import open_network
from awconv.predictions import Prediction
from awconv.serve import sections
from awconv.serve.looking import Gains, look, usual_layers
from awconv.serve.page import _Shown
from awconv.serve.service import Limits, Service
from awconv.tasks import ClassificationTask, DetectionTask
from tests.data.samples import digit, png
from tests.photographs import photograph
from tests.serve.servers import NAME, encoded


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service(open_network(NAME, False), Limits(max_bytes=100_000))
    service.start()
    yield service
    service.close()


def shown(service: Service, folder: Path, content: bytes, choice: Any = None, name: str = "photo.png") -> str:
    (folder / name).write_bytes(content)
    photograph = {"path": str(folder / name), "orig_name": name}
    return asyncio.run(_Shown(service, folder).show(photograph, choice))


def headings(page: str) -> list[str]:
    return re.findall(r"<h3[^>]*>(.*?)</h3>", page)


def pictures(page: str) -> list[Image.Image]:
    return [
        Image.open(io.BytesIO(base64.b64decode(data)))
        for data in re.findall(r'src="data:image/\w+;base64,([^"]+)"', page)
    ]


class TestAPhotograph:
    def test_has_its_classes_its_places_and_the_attention_of_the_chosen_layers(
        self, service: Service, tmp_path: Path
    ) -> None:
        page = shown(service, tmp_path, png(digit(3)), ["layer2.0.conv1", "layer3.0.conv2"])
        assert headings(page) == [
            "3",
            "Where it finds 3",
            "Attention of layer2.0.conv1",
            "Attention of layer3.0.conv2",
        ]
        assert page.count('class="bar"') == 5
        assert [picture.size for picture in pictures(page)] == [(448, 448), (448, 448), (32, 9), (64, 9)]
        assert page.count('class="kernel"') == 12
        assert "32 output channels, kernel 3x3" in page

    def test_needs_no_layers(self, service: Service, tmp_path: Path) -> None:
        assert headings(shown(service, tmp_path, png(digit(4)), [])) == ["4", "Where it finds 4"]

    def test_that_is_broken_or_too_large_is_refused_in_words(self, service: Service, tmp_path: Path) -> None:
        assert "photo.png: cannot identify an image" in shown(service, tmp_path, b"no image at all")
        assert "may have 100,000 bytes, got 100,001" in shown(service, tmp_path, bytes(100_001))
        assert 'role="alert"' in shown(service, tmp_path, b"")

    def test_cannot_name_a_file_elsewhere(self, service: Service, tmp_path: Path) -> None:
        uploaded, elsewhere = tmp_path / "uploaded", tmp_path / "secret.png"
        uploaded.mkdir()
        elsewhere.write_bytes(png(digit(5)))
        (uploaded / "link.png").symlink_to(elsewhere)
        for path in (str(elsewhere), f"{uploaded}/../secret.png", str(uploaded / "link.png"), str(uploaded), "None"):
            page = asyncio.run(_Shown(service, uploaded).show({"path": path}, []))
            assert "not there any more" in page
            assert headings(page) == []

    def test_finds_a_full_queue_said_in_words(self, tmp_path: Path) -> None:
        full = Service(open_network(NAME, False), Limits(queue_size=1))
        with full.batcher.admitted():
            assert "drop yours again" in shown(full, tmp_path, png(digit(3)), [])

    def test_is_taken_away(self, service: Service, tmp_path: Path) -> None:
        assert "No photograph yet" in asyncio.run(_Shown(service, tmp_path).show(None, []))

    def test_has_the_boxes_of_a_detector(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        task = DetectionTask(["<b>temple", "tree"], [1, 2], network="resnet8_cifar", min_size=64, max_size=96).eval()
        service = Service(task, Limits(threshold=0.1))
        service.start()
        try:
            content = encoded(photograph("china"), "PNG")
            page = shown(service, tmp_path, content, 0.1)
            count = page.count("<tr>") - 1
            assert count > 0
            assert headings(page) == [f"{count} objects" if count > 1 else "1 object"]
            assert [picture.size for picture in pictures(page)] == [photograph("china").size]
            assert "<b>" not in page
            assert headings(shown(service, tmp_path, content, 1.0)) == ["0 objects"]
        finally:
            service.close()


class TestGains:
    def test_are_one_and_the_map_in_the_papers_form(self) -> None:
        task: Any = open_network(NAME, False)
        image = torch.randint(256, (1, 8, 8), dtype=torch.uint8)
        looks = look(task, image, "3", ["layer1.0.conv2"])
        normalised = (image[None] - task.mean) / task.std
        (gains,) = looks.gains
        map = awconv.attention_maps(task.evaluated, normalised)["layer1.0.conv2"][0]
        torch.testing.assert_close(gains.values, 1 + map)
        assert gains.neutral == pytest.approx(float(map.mean()) + 1)
        assert looks.heat is not None
        assert looks.heat.shape == (8, 8)

    def test_are_all_one_in_a_network_converted_by_identity(self) -> None:
        classes = [str(number) for number in range(10)]
        task = ClassificationTask(classes, [1, 8, 8], [0.3], [0.4], network="resnet8_cifar").eval()
        assert usual_layers(task) == ([], [])
        awconv.convert(task.network, init="identity")
        names, first = usual_layers(task)
        assert first == [names[0], names[-1]]
        looks = look(task, torch.randint(256, (1, 8, 8), dtype=torch.uint8), "3", names[:1])
        (gains,) = looks.gains
        assert gains.is_relative
        assert gains.reach == 0
        assert "the image moves no weight" in sections.attention(gains)

    def test_a_gain_over_input_channels_is_said_to_be_left_out(self) -> None:
        still = Gains("layer", torch.ones(4, 1, 3, 3), 1, 1.0, True, input_gain=True)
        moving = Gains("layer", torch.rand(4, 1, 3, 3), 1, 0.5, False, input_gain=True)
        for gains in (still, moving):
            assert "gain over input channels, by which they are multiplied too, is not shown" in sections.attention(
                gains
            )
        assert "the image moves no weight" not in sections.attention(still)
        without = Gains("layer", torch.rand(4, 1, 3, 3), 1, 0.5, False)
        assert "input channels, by which" not in sections.attention(without)

    def test_most_moved_channels_are_those_farthest_from_the_neutral_gain(self) -> None:
        values = torch.ones(5, 2, 3, 3)
        values[1] += 0.1
        values[4] -= 0.5
        values[2, 0, 0, 0] += 0.2
        gains = Gains("layer", values, 4, 1.0, True)
        assert gains.moved(3) == [4, 1, 2]
        assert gains.rows().shape == (18, 5)
        page = sections.attention(gains)
        assert re.findall(r"channels \d+ to \d+", page)[:3] == [
            "channels 16 to 19",
            "channels 4 to 7",
            "channels 8 to 11",
        ]
        assert "20 output channels in blocks of 4" in page
        assert "2 blocks of input channels" in page

    def test_colours_go_from_blue_below_to_red_above_the_neutral_gain(self) -> None:
        values = torch.tensor([0.5, 1.0, 1.5])[:, None, None, None].expand(3, 1, 1, 1)
        (map, *_) = pictures(sections.attention(Gains("layer", values, 1, 1.0, True)))
        below, neutral, above = (map.getpixel((column, 0)) for column in range(3))
        assert below[2] > below[0] + 100
        assert max(neutral) - min(neutral) < 10
        assert above[0] > above[2] + 100


def test_names_of_classes_and_layers_are_text_and_no_html() -> None:
    spoiled = "<script>alert(1)</script>"
    assert "<script" not in sections.classes(Prediction("photo.png", [(spoiled, 0.5)]))
    assert "<script" not in sections.places(spoiled, Image.new("RGB", (8, 8)), None)
    assert "<script" not in sections.error(spoiled)
    assert "<script" not in sections.attention(Gains(spoiled, torch.rand(4, 1, 3, 3), 1, 0.5, False))
