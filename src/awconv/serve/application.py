"""What ``awconv serve`` runs, for servers of one's own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from awconv.extras import require

if TYPE_CHECKING:
    from fastapi import FastAPI

    from awconv.serve.service import Limits


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
        >>> application = app("aw_resnet8_cifar.digits")  # uvicorn FILE:application
        >>> application.state.service.health()["network"], application.url_path_for("predict")
        ('aw_resnet8_cifar.digits', '/predict')
    """
    for module in ("fastapi", "python_multipart"):
        require(module, extra="serve")
    from awconv.export.exported import FORMATS
    from awconv.predict import open_network
    from awconv.serve.interface import add_page, make_app
    from awconv.serve.service import Limits, Service

    exported = Path(source).suffix in FORMATS
    base = None if pretrained is None else Path(pretrained)
    service = Service(open_network(os.fspath(source), exported, base, image_size), limits or Limits())
    application = make_app(service)
    if page:
        folder = tempfile.TemporaryDirectory(prefix="awconv-serve-")
        application.state.folder = folder  # which goes with it
        add_page(application, service, Path(folder.name))
    return application
