"""``awconv serve``, and the same for servers of one's own."""

from __future__ import annotations

import ipaddress
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from awconv.data.images import MAX_PIXELS
from awconv.export.exported import FORMATS
from awconv.extras import require
from awconv.predict import open_network, source_of
from awconv.serve.interface import add_page, make_app
from awconv.serve.service import Limits, Service
from awconv.terminal import say

if TYPE_CHECKING:
    from fastapi import FastAPI


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
    max_pixels: int = MAX_PIXELS,
    threshold: float = 0.5,
    image_size: int | None = None,
    pretrained: Path | None = None,
) -> int:
    """Answers for images over HTTP by a trained network, and shows a page to try it.

    ``POST /predict`` takes an image and answers as ``awconv predict --format=json`` does; ``GET /health`` says whether
    the server answers. Ctrl-C or SIGTERM end it once it has answered what it was asked.

    Args:
        ckpt: a checkpoint of ``awconv fit``, ``compare`` or ``demo``, or a training's folder; what ``publish`` wrote;
            or a name with weights in timm, such as resnet50.
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
        The exit status, 0. After Ctrl-C, ``awconv`` exits with 130, after SIGTERM with 143.

    Raises:
        FileNotFoundError: the checkpoint or the base is missing.
        ModuleNotFoundError: an extra is not installed.
        UsageError: neither ``ckpt`` nor ``model`` is given, or both.
        ValueError: the port cannot be had, ``ckpt`` or ``model`` is none of these, or a number is out of its range.
    """
    require("uvicorn", extra="serve")
    from awconv.serve.stopping import Server, address_of, listen

    source = source_of(ckpt, model, "ckpt")
    limits = Limits(max_bytes, max_pixels, batch_size, max_wait_ms, queue_size, threshold)
    with listen(host, port) as bound, tempfile.TemporaryDirectory(prefix="awconv-serve-") as folder:
        service = Service(open_network(source, model is not None, pretrained, image_size), limits)
        application = make_app(service)
        if page:
            os.environ.setdefault("MPLCONFIGDIR", folder)  # where matplotlib keeps its list of fonts
            add_page(application, service, Path(folder))
        address = address_of(bound)
        if not _is_local(bound.getsockname()[0]):
            say(f"awconv serve: whoever reaches {address} may use this server: it asks for no password")
        say(f"awconv serve: {service.name}, {len(service.network.classes)} classes, at {address} (Ctrl-C ends it)")
        try:
            Server(application, service).run(sockets=[bound])
        finally:
            say(f"awconv serve: answered for {service.answered} images")
    return 0


def app(
    source: str | os.PathLike[str],
    *,
    limits: Limits | None = None,
    page: bool = False,
    pretrained: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
) -> FastAPI:
    """The application of ``awconv serve``, for a server of one's own such as uvicorn or gunicorn with its workers.

    Args:
        source: as for :func:`awconv.load`, or a file of ``awconv export`` (.onnx, .xml or .pt2, which is machine code).
        limits: of files, images, batches and the queue.
        page: with the page, at ``/page/``.
        pretrained: a file of weights: the base of an adapter, or those of a name, in the place of timm's.
        image_size: height and width of a classifier's images, if not those that it was trained on.

    Returns:
        A FastAPI application. Its lifespan starts and ends the threads. The page's temporary folder goes with it.

    Raises:
        FileNotFoundError: there is no such file, folder or name.
        ModuleNotFoundError: the extra is not installed.
        ValueError: the file is broken or something else, or a number is out of its range.

    Examples:
        >>> from awconv.serve import app
        >>> from fastapi.testclient import TestClient
        >>> with TestClient(app("aw_resnet8_cifar.digits")) as client:
        ...     client.get("/health").json()["network"]
        'aw_resnet8_cifar.digits'
    """
    exported = Path(source).suffix in FORMATS
    base = None if pretrained is None else Path(pretrained)
    service = Service(open_network(os.fspath(source), exported, base, image_size), limits or Limits())
    application = make_app(service)
    if page:
        folder = tempfile.TemporaryDirectory(prefix="awconv-serve-")
        application.state.folder = folder  # which goes with it
        add_page(application, service, Path(folder.name))
    return application


def _is_local(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
