"""A network behind a thread that batches what it is asked."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image

from awconv.data.classification import check_batch
from awconv.data.images import MAX_PIXELS, BrokenImageError, read_header, read_image
from awconv.export.exported import ExportedClassifier, ExportedDetector
from awconv.models.detection.transform import NarrowImageError
from awconv.predict import Network
from awconv.predictions import Detected, Prediction, admit, colours, most_probable, objects_in, seen
from awconv.serve.batching import Admission, Batcher
from awconv.tasks import ClassificationTask, DetectionTask

Returned = TypeVar("Returned")
_DECODERS = 4  # threads: Pillow decodes without Python's lock
_LARGE = 2**24  # pixels: images that have more are decoded one after the other, for each takes up to 8 bytes a pixel
_END = 10.0  # seconds that the last batch may take once the server has ended


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        max_bytes: of an uploaded file.
        max_pixels: of an image.
        batch_size: images that a classifier takes at once. A detector takes one at a time.
        max_wait_ms: how long an image waits for others that are on their way, in milliseconds.
        queue_size: requests that are read, decoded or waiting at a time.
        threshold: the lowest score of an object that can be asked for.

    Raises:
        ValueError: one is out of its range.

    Examples:
        >>> from awconv.serve.service import Limits
        >>> Limits(batch_size=16, max_bytes=2**20).queue_size
        64
    """

    max_bytes: int = 2**24
    max_pixels: int = MAX_PIXELS
    batch_size: int = 8
    max_wait_ms: float = 5.0
    queue_size: int = 64
    threshold: float = 0.5

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "batch_size", "queue_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.max_wait_ms <= 60_000:
            raise ValueError(f"max_wait_ms must be from 0 to 60000 milliseconds, got {self.max_wait_ms}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be from 0 to 1, got {self.threshold}")


@dataclass(frozen=True)
class Asked:
    """What a request wants to know.

    Attributes:
        top_k: number of classes.
        threshold: the lowest score of an object.
    """

    top_k: int
    threshold: float


class OptionError(ValueError):
    """A request asks for what there is not."""


class OutputError(RuntimeError):
    """The network cannot answer. The fault is not the request's."""


class Service:
    """Answers for images, as ``awconv predict`` does.

    Args:
        network: a task in evaluation mode, or an exported file.
        limits: what it takes.

    Attributes:
        stopping: whether the server is ending.
        answered: the number of images that were answered for.
        at_end: called when everything is answered: what ends streams to pages that are open.

    Raises:
        ValueError: the network does not take such batches, or finds no object of such a score.
    """

    def __init__(self, network: Network, limits: Limits) -> None:
        self.network, self.limits = network, limits
        self.stopping = False
        self.answered = 0
        self.at_end: list[Callable[[], object]] = []
        batch_size = limits.batch_size
        if isinstance(network, DetectionTask | ExportedDetector):
            admit(network, limits.threshold)
            batch_size = 1  # in a batch, an image would be padded to the largest, which changes what is found
        else:
            channels, size, _ = network.input_size
            check_batch(batch_size, channels, size)
        self.batcher: Batcher[Any, Any] = Batcher(self._run, batch_size, limits.max_wait_ms / 1000, limits.queue_size)
        self._decoders: ThreadPoolExecutor | None = None
        self._large = threading.Lock()

    @property
    def detects(self) -> bool:
        """Whether the network is a detector."""
        return isinstance(self.network, DetectionTask | ExportedDetector)

    @property
    def explains(self) -> bool:
        """Whether one can look into the network: it is a classifier, and no exported file."""
        return isinstance(self.network, ClassificationTask)

    @property
    def name(self) -> str:
        """The network's name in timm."""
        if isinstance(self.network, ExportedClassifier | ExportedDetector):
            return self.network.metadata.network
        return str(self.network.network_name)

    @property
    def ready(self) -> bool:
        """Whether it answers requests."""
        return self.batcher.ready and not self.stopping

    def health(self) -> dict[str, Any]:
        """What ``GET /health`` says, without the version."""
        kind = "detector" if self.detects else "classifier"
        size = (
            {}
            if isinstance(self.network, DetectionTask | ExportedDetector)
            else dict(input_size=list(self.network.input_size))
        )
        return dict(ready=self.ready, network=self.name, kind=kind, classes=len(self.network.classes), **size)

    def start(self) -> None:
        """Starts its threads."""
        self.stopping = False
        self._decoders = ThreadPoolExecutor(min(_DECODERS, os.cpu_count() or 1), "awconv-decode")
        self.batcher.start()

    def close(self) -> None:
        """Ends its threads, when they have done what they were given."""
        self.stopping = True
        self.batcher.close(_END)
        if self._decoders is not None:
            self._decoders.shutdown(wait=False, cancel_futures=True)

    def asked(self, top_k: int | None, threshold: float | None) -> Asked:
        """What a request's options ask for.

        Raises:
            OptionError: an option is out of its range, or the other kind of network's.
        """
        if self.detects:
            if top_k is not None:
                raise OptionError("top_k is a classifier's, and this network is a detector; leave it out")
            least = self.limits.threshold
            if threshold is not None and not least <= threshold <= 1:
                raise OptionError(
                    f"threshold must be from {least:g} to 1, got {threshold}; a server started with a lower "
                    "--threshold gives objects of lower scores, too"
                )
            return Asked(1, least if threshold is None else threshold)
        if threshold is not None:
            raise OptionError("threshold is a detector's, and this network is a classifier; leave it out")
        if top_k is not None and top_k < 1:
            raise OptionError(f"top_k must be at least 1, got {top_k}; it is the number of classes of the answer")
        return Asked(min(top_k or 1, len(self.network.classes)), 0.0)

    async def answer(
        self, admission: Admission[Any, Any], content: bytes, name: str, asked: Asked
    ) -> Prediction | Detected:
        """Reads an image and asks the network.

        Args:
            admission: of the request.
            content: the file's.
            name: of the image, for the answer and for errors.
            asked: what to answer.

        Raises:
            BrokenImageError: it cannot be decoded, or is too large.
            FullError: the server is ending.
            NarrowImageError: nothing of it would be left for a detector.
            OutputError: the network failed, or its outputs are not finite.
        """
        image = await self.decoded(lambda: self._read(content, name))
        future = admission.submit((image, name, asked.threshold))
        try:
            found = await asyncio.wrap_future(future)
            prediction: Prediction | Detected
            if self.detects:
                prediction = Detected(name, found)
            else:
                (prediction,) = most_probable(found[None], self.network.classes, [name], asked.top_k)
        except NarrowImageError as error:
            raise NarrowImageError(f"{name}: {error}") from error
        except BrokenImageError:  # a detector's, decoded just before it runs
            raise
        except Exception as error:  # networks fail in ways of their own
            raise self._failed(error) from error
        self.answered += 1
        return prediction

    async def alone(self, function: Callable[[], Returned]) -> Returned:
        """Runs what calls the network in its thread.

        Raises:
            FullError: the server is ending.
            OutputError: the network failed.
        """
        future = self.batcher.call(function)
        try:
            return await asyncio.wrap_future(future)
        except Exception as error:  # networks fail in ways of their own
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> OutputError:
        return OutputError(str(error) if isinstance(error, ValueError) else f"the network {self.name} failed: {error}")

    async def decoded(self, function: Callable[[], Returned]) -> Returned:
        """Runs what takes time and memory, but no network, in one of a few threads."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, function)

    @contextlib.contextmanager
    def decoded_image(self, content: bytes, name: str) -> Iterator[Image.Image]:
        """A decoded image. There is one large image at a time, however many are asked about.

        Args:
            content: the file's.
            name: of the image in errors.

        Raises:
            BrokenImageError: it cannot be decoded, or is too large.
        """
        width, height = self._size(content, name)
        with self._large if width * height > _LARGE else contextlib.nullcontext():
            yield read_image(content, name, max_pixels=self.limits.max_pixels)

    def _size(self, content: bytes, name: str) -> tuple[int, int]:
        return read_header(io.BytesIO(content), name, max_pixels=self.limits.max_pixels)[1]

    def _read(self, content: bytes, name: str) -> Any:
        """What waits for the network: a classifier's image, which is small, or a detector's encoded one."""
        if isinstance(self.network, DetectionTask | ExportedDetector):
            self._size(content, name)
            return content
        with self.decoded_image(content, name) as image:
            return seen(self.network, image)

    def _objects(self, network: DetectionTask | ExportedDetector, content: bytes, name: str, threshold: float) -> Any:
        with self.decoded_image(content, name) as image:
            return objects_in(network, colours(image), name, threshold)

    def _run(self, items: Sequence[tuple[Any, str, float]]) -> Sequence[Any]:
        """What the network makes of a batch: logits of shape (classes,), or objects, of each."""
        if isinstance(self.network, DetectionTask | ExportedDetector):
            return [self._objects(self.network, content, name, threshold) for content, name, threshold in items]
        with torch.inference_mode():
            batch = torch.stack([image for image, _, _ in items])
            return list(self.network(batch.to(self.network.device)).cpu())
