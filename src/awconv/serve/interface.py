"""The HTTP interface: a FastAPI application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from awconv.data.images import BrokenImageError, TooLargeImageError
from awconv.models.detection.transform import NarrowImageError
from awconv.serve.batching import FullError
from awconv.serve.body import FIELD, RequestError, read_upload
from awconv.serve.door import Door
from awconv.serve.service import OptionError, OutputError, Service
from awconv.terminal import say
from awconv.version import __version__

PAGE = "/page"
_RETRY = 1  # seconds
_CLOSED = 499  # what servers note of a client that has gone; nobody reads it
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_BODY = {
    "required": True,
    "content": {
        "image/*": _BINARY,
        "application/octet-stream": _BINARY,
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": [FIELD],
                "properties": {FIELD: {"type": "string", "format": "binary"}},
            }
        },
    },
}
_ERROR = {
    "application/json": {
        "schema": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
    }
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": _ERROR}
    for status, description in {
        400: "no image, or a broken one",
        408: "the body took too long",
        413: "too many bytes or pixels",
        415: "a body of another kind",
        422: "an option out of its range, or a form without the file",
        500: "the network failed, or its outputs are not finite",
        503: "too many requests at a time; Retry-After says when to try again",
    }.items()
}
_LABELLED = {"label": {"type": "string"}, "probability": {"type": "number", "minimum": 0, "maximum": 1}}
_OTHERS = {"others": {"type": "array", "items": {"type": "object", "properties": _LABELLED}}}
_FOUND = {
    "label": {"type": "string"},
    "score": {"type": "number", "minimum": 0, "maximum": 1},
    "box": {
        "type": "array",
        "items": {"type": "number"},
        "minItems": 4,
        "maxItems": 4,
        "description": "x1, y1, x2, y2 in pixels of the upright image",
    },
}
_OBJECTS = {"detections": {"type": "array", "items": {"type": "object", "properties": _FOUND}}}


def make_app(service: Service, hosts: Collection[str] | None = None) -> FastAPI:
    """The application that answers ``POST /predict`` and ``GET /health``.

    Args:
        service: the network. The application starts and ends its threads.
        hosts: names by which a request may call the server; None if any.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.close()

    # Their pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="awconv serve", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    app.add_middleware(Door, service=service, hosts=hosts)
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    content = _OBJECTS if service.detects else _LABELLED | _OTHERS
    schema = {"type": "object", "properties": {"image": {"type": "string"}, **content}}
    answer = {"description": "what is in the image", "content": {"application/json": {"schema": schema}}}

    @app.head("/health", include_in_schema=False)
    @app.get("/health", summary="Whether the server answers, and by which network")
    async def health() -> JSONResponse:
        return JSONResponse({**service.health(), "version": __version__}, 200 if service.ready else 503)

    @app.post(
        "/predict",
        summary="The objects in an image" if service.detects else "The most probable classes of an image",
        responses={200: answer, **_ERRORS},
        openapi_extra={"requestBody": _BODY},
    )
    async def predict(
        request: Request,
        top_k: Annotated[int | None, Query(ge=1, description="number of classes, of a classifier")] = None,
        threshold: Annotated[
            float | None, Query(ge=0, le=1, description="lowest score of an object, of a detector")
        ] = None,
    ) -> JSONResponse:
        asked = service.asked(top_k, threshold)
        with service.batcher.admitted() as admission:
            upload = await read_upload(request, service.limits.max_bytes)
            found = await service.answer(admission, upload.content, upload.name, asked)
            return JSONResponse(found.content())

    return app


async def _refused(request: Request, error: Exception) -> Response:
    """The answer to a request that went wrong."""
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(error, ClientDisconnect):
        return Response(status_code=_CLOSED)
    if isinstance(error, RequestError):
        status, message = error.status, error.message
    elif isinstance(error, HTTPException):
        status, message = error.status_code, _unknown(request, error)
    elif isinstance(error, RequestValidationError):
        status, message = 422, "; ".join(map(_invalid, error.errors()))
    elif isinstance(error, FullError):
        service: Service = request.app.state.service
        status, headers = 503, {"Retry-After": str(_RETRY)}
        message = (
            "the server is ending; ask another one"
            if service.stopping
            else f"at most {service.limits.queue_size} requests are answered at a time, and as many are; try again in "
            f"{_RETRY} s, or start the server with a larger --queue_size"
        )
    else:
        status, message = _STATUS.get(type(error), 500), str(error) or type(error).__name__
        if status == 500:
            say(f"awconv serve: {message}")
    if request.method == "POST":
        headers["Connection"] = "close"  # the rest of the body may be on its way
    return JSONResponse({"error": message}, status, headers)


_STATUS: dict[type[Exception], int] = {
    BrokenImageError: 400,
    TooLargeImageError: 413,
    NarrowImageError: 400,
    OptionError: 422,
    OutputError: 500,
}
_HANDLERS = dict.fromkeys(
    [*_STATUS, FullError, RequestError, ClientDisconnect, Exception, HTTPException, RequestValidationError], _refused
)


def _unknown(request: Request, error: HTTPException) -> str:
    there = "there are POST /predict, GET /health, GET /openapi.json" + (
        f" and the page {PAGE}/" if any(getattr(route, "path", "") == PAGE for route in request.app.routes) else ""
    )
    if error.status_code in (404, 405):
        return f"there is no {request.method} {request.url.path:.200}; {there}"
    return f"{error.detail}; {there}"


def _invalid(error: dict[str, Any]) -> str:
    name = str(error["loc"][-1])
    example = {"top_k": "/predict?top_k=5", "threshold": "/predict?threshold=0.7"}.get(name, "")
    wanted = str(error["msg"]).removeprefix("Input should be ")
    return f"{name} must be {wanted}, got {error.get('input')!r:.80}" + (f"; as in {example}" if example else "")


def add_page(app: FastAPI, service: Service, folder: Path) -> FastAPI:
    """Adds the page, and a way to it from ``/``.

    Args:
        app: the application.
        service: the network.
        folder: where the page keeps what is uploaded.
    """
    from awconv.serve.page import mount

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def start() -> RedirectResponse:
        return RedirectResponse(f".{PAGE}/")

    @app.get("/favicon.ico", include_in_schema=False)  # which browsers ask for
    async def icon() -> Response:
        return Response(status_code=204)

    @app.get("/manifest.json", include_in_schema=False)  # which gradio's page asks for
    async def manifest() -> JSONResponse:
        return JSONResponse({"name": f"awconv: {service.name}"})

    return mount(app, service, PAGE, folder)
