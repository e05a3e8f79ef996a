"""OpenVINO's files: an ``.xml`` and a ``.bin`` of the same name."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from awconv.export.metadata import KEY, Metadata, parsed
from awconv.extras import require

PRECISE = {"INFERENCE_PRECISION_HINT": "f32"}  # otherwise some CPUs compute in bfloat16


@functools.cache
def core() -> Any:
    """OpenVINO's ``Core``, one for the whole process.

    On Linux, the first network that a Core compiles gives signal handlers a stack of its own. Where several Cores go in
    the order in which they came, the last one restores a stack that is freed, and the next signal ends the process.

    Raises:
        ModuleNotFoundError: the extra ``openvino`` is not installed.
    """
    return require("openvino", extra="openvino").Core()


def write(proto: Any, metadata: Metadata, file: Path) -> None:
    """Writes an ONNX model in OpenVINO's format. With ``fp16``, weights are stored in half precision.

    Args:
        proto: the model.
        metadata: of its network.
        file: ends in ``.xml``; the weights lie beside it.

    Raises:
        ModuleNotFoundError: the extra ``openvino`` is not installed.
        ValueError: OpenVINO cannot read the model.
    """
    openvino = require("openvino", extra="openvino")
    source = file.with_suffix(".onnx")
    source.write_bytes(proto.SerializeToString())
    try:
        model = openvino.convert_model(source)
        model.set_rt_info(metadata.text(), [KEY])
        openvino.save_model(model, file, compress_to_fp16=metadata.precision == "fp16")
    except Exception as error:  # of OpenVINO
        raise ValueError(f"OpenVINO cannot convert the network: {error}") from error
    finally:
        source.unlink()


class OpenVinoFile:
    """A file of ``awconv export --format=openvino``, run on the CPU in the precision that it was exported for.

    Args:
        file: the ``.xml``.

    Attributes:
        metadata: what it says of its network.
        nodes: the number of operations in it.

    Raises:
        ModuleNotFoundError: the extra ``openvino`` is not installed.
        ValueError: it is broken, or was not written by ``awconv export``.
    """

    def __init__(self, file: Path) -> None:
        runtime = core()
        if not file.with_suffix(".bin").is_file():
            raise ValueError(f"{file} has no {file.with_suffix('.bin').name} beside it, which holds its weights")
        try:
            model = runtime.read_model(file)
        except Exception as error:  # of OpenVINO
            raise ValueError(f"{file} is broken, or no file of OpenVINO: {error}") from error
        self.metadata = parsed(str(model.get_rt_info([KEY]).value) if model.has_rt_info([KEY]) else None, file)
        self.nodes = len(model.get_ops())
        try:
            self._compiled = runtime.compile_model(model, "CPU", PRECISE)
        except Exception as error:  # of OpenVINO
            raise ValueError(f"OpenVINO cannot run {file}: {error}") from error

    def __call__(self, *inputs: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        """What the network gives for its inputs."""
        return [np.asarray(output) for output in self._compiled(inputs).values()]
