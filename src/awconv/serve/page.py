"""The page: one drops an image, and sees what the network finds and why."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI
from PIL import Image
from starlette.routing import Mount
from torchvision.transforms.v2.functional import to_pil_image

from awconv.data import to_uint8
from awconv.draw import drawn
from awconv.explain import overlay
from awconv.extras import require
from awconv.predictions import Detected, Prediction, colours, seen
from awconv.serve import sections
from awconv.serve.batching import FullError
from awconv.serve.looking import look, usual_layers
from awconv.serve.page_door import PageDoor, upload_at
from awconv.serve.service import Asked, OutputError, Service
from awconv.tasks import ClassificationTask
from awconv.terminal import say

_CLASSES = 5  # that are shown
_SHOWN = 448  # pixels: the least side of a picture
_LONGEST = 1024  # pixels: the longest side of a picture with boxes
_KEPT = (600, 1800)  # seconds: uploaded files are looked through so often, and removed at such an age
_FULL = "As many images as may be are being looked at; drop yours again in a moment."


def mount(app: FastAPI, service: Service, path: str, folder: Path) -> FastAPI:
    """Adds the page to an application.

    Args:
        app: the application.
        service: the network.
        path: of the page.
        folder: where gradio keeps what is uploaded.

    Raises:
        ModuleNotFoundError: the extra is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it reports errors while it runs, too
    folder = folder.resolve()
    with _set(GRADIO_TEMP_DIR=str(folder), GRADIO_RUN_HISTORY="False"):
        gradio = require("gradio", extra="serve")
        # Each application makes folders there; gradio reads the environment only when it is imported.
        require("gradio.routes", extra="serve").DEFAULT_TEMP_DIR = str(folder)
        blocks = _blocks(gradio, service, folder)
        mounted: FastAPI = gradio.mount_gradio_app(
            app,
            blocks,
            path=path,
            footer_links=[],
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            max_file_size=service.limits.max_bytes,
            theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=sections.CSS,
        )
    (route,) = (route for route in app.routes if isinstance(route, Mount) and route.path == path)
    service.at_end.append(route.app.stop_event.set)  # type: ignore[attr-defined]  # open pages listen to gradio
    route.app = PageDoor(route.app, service, folder, frozenset(blocks.fns))
    return mounted


@contextmanager
def _set(**variables: str) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _blocks(gradio: Any, service: Service, folder: Path) -> Any:
    """The page's parts."""
    network = service.network
    names, chosen = usual_layers(network) if isinstance(network, ClassificationTask) else ([], [])
    with gradio.Blocks(title=f"awconv: {service.name}", analytics_enabled=False, delete_cache=_KEPT) as blocks:
        gradio.Markdown(f"# {_plain(service.name)}\nDrop a photograph: {_promise(service, names)}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                photograph = gradio.Image(
                    label="photograph",
                    image_mode=None,
                    type="filepath",
                    sources=["upload", "clipboard"],
                    buttons=["fullscreen"],
                    height=280,
                    elem_id="photograph",
                )
                inputs = [photograph]
                if names:
                    inputs.append(gradio.Dropdown(names, value=chosen, multiselect=True, label="attention of layers"))
                if service.detects:
                    least = service.limits.threshold
                    inputs.append(gradio.Slider(least, 1, value=least, label="lowest score of an object"))
            with gradio.Column(scale=2, min_width=280):
                result = gradio.HTML(sections.page('<p class="faint">No photograph yet.</p>'), elem_id="result")
        for part in inputs:
            part.async_move_resource_to_block_cache = _uploaded_only(part.async_move_resource_to_block_cache, folder)
        event = dict(
            fn=_Shown(service, folder).show, inputs=inputs, outputs=result, preprocess=False, api_visibility="private"
        )
        for part in inputs:
            part.change(**event, concurrency_limit=None, show_progress="minimal", trigger_mode="always_last")
    blocks.queue(max_size=service.limits.queue_size)
    return blocks


def _plain(text: str) -> str:
    """Text in Markdown, where underscores and so on have no meaning."""
    return "".join(character if character.isalnum() or character.isspace() else f"\\{character}" for character in text)


def _promise(service: Service, names: Sequence[str]) -> str:
    if service.detects:
        return "the page draws the objects that the network finds."
    if not service.explains:
        return "the page shows its class."
    return "the page shows its class, where the network finds it" + (
        ", and what attention makes of the layers' weights." if names else "."
    )


def _uploaded_only(move: Callable[..., Awaitable[Any]], folder: Path) -> Callable[..., Awaitable[Any]]:
    """Lets no browser name a file that was not uploaded.

    gradio copies whatever file of this machine is named, and fetches addresses: it refuses them only in an application
    that it has started itself.
    """

    async def moved(path: Any) -> Any:
        if path is None:
            return None
        file = upload_at(path, folder)
        if file is None:
            raise require("gradio", extra="serve").Error(
                "a photograph must be uploaded, and this one is not there, or not any more; drop it again",
                print_exception=False,
            )
        return await move(str(file))

    return moved


class _Shown:
    """Makes the page's answers.

    Args:
        service: the network.
        folder: where uploaded files are.
    """

    def __init__(self, service: Service, folder: Path) -> None:
        self._service, self._folder = service, folder

    async def show(self, photograph: dict[str, Any] | None, choice: Any = None) -> str:
        """The sections for a photograph.

        Args:
            photograph: gradio's description of an uploaded file; None if there is none.
            choice: names of layers, or a detector's threshold.
        """
        if photograph is None:
            return sections.page('<p class="faint">No photograph yet.</p>')
        try:
            return await self._answer(photograph, choice)
        except FullError:
            return sections.error(_FULL)
        except OutputError as error:
            say(f"awconv serve: {error}")
            return sections.error(str(error))
        except (ValueError, OSError) as error:  # broken and narrow images, among others
            return sections.error(str(error))

    async def _answer(self, photograph: dict[str, Any], choice: Any) -> str:
        service = self._service
        with service.batcher.admitted() as admission:
            content = await service.decoded(lambda: self._content(str(photograph.get("path"))))
            name = str(photograph.get("orig_name") or "the photograph")
            threshold = max(float(choice), service.limits.threshold) if service.detects and choice is not None else None
            asked = Asked(min(_CLASSES, len(service.network.classes)), threshold or service.limits.threshold)
            found = await service.answer(admission, content, name, asked)
            if isinstance(found, Detected):
                return await service.decoded(lambda: self._objects(content, name, found, asked.threshold))
            shown = sections.classes(found)
            if isinstance(service.network, ClassificationTask):
                layers = [str(layer) for layer in choice] if isinstance(choice, list) else []
                shown += await self._insides(service.network, content, found, layers)
            return sections.page(shown)

    def _content(self, path: str) -> bytes:
        """The bytes of an uploaded file, and of no other: its path comes from the browser."""
        file = upload_at(path, self._folder)
        if file is None:
            raise ValueError("the photograph is not there any more; drop it again")
        if file.stat().st_size > self._service.limits.max_bytes:
            raise ValueError(
                f"the image may have {self._service.limits.max_bytes:,} bytes, got {file.stat().st_size:,}; shrink it"
            )
        return file.read_bytes()

    def _objects(self, content: bytes, name: str, found: Detected, threshold: float) -> str:
        with self._service.decoded_image(content, name) as image:
            picture = drawn(colours(image), found.detections, threshold)
            picture.thumbnail((_LONGEST, _LONGEST))
        return sections.page(sections.objects(found, picture))

    async def _insides(
        self, network: ClassificationTask, content: bytes, found: Prediction, layers: Sequence[str]
    ) -> str:
        service, label = self._service, found.top[0][0]

        def read() -> tuple[Any, Image.Image]:
            size = max(_SHOWN, network.input_size[1])
            with service.decoded_image(content, found.image) as image:
                large = to_uint8(image, 3, size, network.crop_pct, network.interpolation)
                return seen(network, image), cast(Image.Image, to_pil_image(large))

        tensor, picture = await service.decoded(read)
        looks = await service.alone(lambda: look(network, tensor, label, layers))

        def write() -> str:
            heated = None if looks.heat is None else overlay(picture, looks.heat)
            parts = [sections.places(label, picture, heated), *map(sections.attention, looks.gains)]
            return "".join(parts)

        return await service.decoded(write)
