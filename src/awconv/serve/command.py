"""``awconv serve``. It imports little before it has said where matplotlib may write."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from awconv.extras import require
from awconv.serve.ports import address_of, is_local, listen, names_of
from awconv.terminal import say


def serve(
    ckpt: str | None = None,
    model: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    page: bool = True,
    batch_size: int = 8,
    max_wait_ms: float = 5.0,
    queue_size: int = 64,
    max_bytes: int = 2**24,
    max_pixels: int = 2**26,
    threshold: float = 0.5,
    image_size: int | None = None,
    pretrained: Path | None = None,
) -> int:
    """Answers for images over HTTP by a trained network, and shows a page to try it.

    ``POST /predict`` takes an image and answers as ``awconv predict --format=json`` does; ``GET /health`` says whether
    the server answers. Ctrl-C or SIGTERM end it once it has answered what it was asked.

    Args:
        ckpt: a checkpoint of ``awconv fit``, ``compare`` or ``demo``, or a training's folder; what ``publish`` wrote;
            a name with weights in timm, such as resnet50; or a network on the hub, hf-hub:OWNER/NAME.
        model: a file of ``awconv export``, in the place of ckpt. A .pt2 is machine code, which runs.
        host: where it listens. The default is this machine alone. The server asks nobody for a password.
        port: where it listens; 0 takes a free one.
        page: show the page, at /page/.
        batch_size: images of requests at the same time that a classifier takes at once. A detector takes one at a time.
        max_wait_ms: how long an image waits for others that are on their way, in milliseconds.
        queue_size: the most requests that are read or wait at a time; others get status 503.
        max_bytes: the most bytes of an image file.
        max_pixels: the largest number of pixels of an image.
        threshold: the lowest score of an object that is reported, or that a request may ask for.
        image_size: height and width to which a classifier's images are cropped, if not those that it was trained on.
        pretrained: a file of weights: those that the adapter was trained on, or a name's, in the place of timm's.

    Returns:
        The exit status, 0. After Ctrl-C, ``awconv`` exits with 130, after SIGTERM with 143; at once after a second one.

    Raises:
        FileNotFoundError: the checkpoint or the base is missing.
        ModuleNotFoundError: an extra is not installed.
        UsageError: neither ``ckpt`` nor ``model`` is given, or both.
        ValueError: the port cannot be had, ``ckpt`` or ``model`` is none of these, or a number is out of its range.
    """
    for module in ("fastapi", "python_multipart", "uvicorn"):
        require(module, extra="serve")
    with (
        listen(host, port) as bound,
        tempfile.TemporaryDirectory(prefix="awconv-serve-") as folder,
        _writing_in(folder),
    ):
        if page:
            require("gradio", extra="serve")
        uploads = Path(folder, "uploads")
        uploads.mkdir()
        from awconv.predict import open_network, source_of
        from awconv.serve.interface import add_page, make_app
        from awconv.serve.service import Limits, Service
        from awconv.serve.stopping import Server

        source = source_of(ckpt, model, "ckpt")
        limits = Limits(max_bytes, max_pixels, batch_size, max_wait_ms, queue_size, threshold)
        service = Service(open_network(source, model is not None, pretrained, image_size), limits)
        application = make_app(service, names_of(bound, host))
        if page:
            add_page(application, service, uploads)
        address = address_of(bound)
        if not is_local(bound):
            say(f"awconv serve: whoever reaches {address} may use this server: it asks for no password")
        say(f"awconv serve: {service.name}, {len(service.network.classes)} classes, at {address} (Ctrl-C ends it)")
        try:
            Server(application, service, folder).run(sockets=[bound])
        finally:
            say(f"awconv serve: answered for {service.answered} images")
    return 0


@contextmanager
def _writing_in(folder: str) -> Iterator[None]:
    """Lets others keep what they write in a folder: they read where when they are imported."""
    variables = {"MPLCONFIGDIR": os.path.join(folder, "fonts")} if "MPLCONFIGDIR" not in os.environ else {}
    with mock.patch.dict(os.environ, variables, GRADIO_TEMP_DIR=os.path.join(folder, "uploads")):
        yield
