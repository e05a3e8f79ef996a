"""Packages of AOTInductor: compiled for this machine's kind of CPU, run by PyTorch without the network's code."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from awconv.export.graph import Inputs
from awconv.export.metadata import KEY, LIMIT, Metadata, parsed
from awconv.ops import use_algorithm

_METADATA = "_metadata.json"  # how the names of its parts end


def write(module: nn.Module, inputs: Inputs, metadata: Metadata, file: Path) -> None:
    """Compiles a module for the CPU and writes the package.

    Raises:
        ValueError: PyTorch cannot export or compile the network, as without a C++ compiler.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError("--format=pt2 needs a C++ compiler: install g++, or name one in the variable CXX") from error
    try:
        with torch.no_grad():
            program = _program(module, inputs)
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(file), inductor_configs={"aot_inductor.metadata": {KEY: metadata.text()}}
            )
    except Exception as error:  # networks fail in ways of their own
        raise ValueError(f"PyTorch cannot compile the network: {str(error).strip().splitlines()[0]}") from error


def _program(module: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    """The exported module, with the fused kernels where they can run every layer: their operator stays one."""
    for algorithm in ("fused", "auto"):
        try:
            with use_algorithm(algorithm):
                program = torch.export.export(module, inputs.examples(), dynamic_shapes=inputs.dynamic_shapes())
        except ValueError:  # of a layer that the kernels cannot run
            if algorithm == "auto":
                raise
        else:
            break
    name = next(iter(program.graph_signature.user_inputs))
    (node,) = [node for node in program.graph.nodes if node.name == name]
    for axis, size in enumerate(node.meta["val"].shape):
        if inputs.is_dynamic(axis) and isinstance(size, int):
            inputs.refuse_constant(axis, size)
    return program


class Pt2File:
    """A package of ``awconv export --format=pt2``. It holds machine code, which runs: load your own only.

    Args:
        file: its path.

    Attributes:
        metadata: what it says of its network, which is read before anything of it runs.
        nodes: None; a compiled network has none.

    Raises:
        ValueError: it is broken, was not written by ``awconv export``, or was compiled for another machine.
    """

    nodes = None

    def __init__(self, file: Path) -> None:
        self.metadata = parsed(_text(file), file)
        try:
            self._package: Any = torch._inductor.aoti_load_package(str(file))
        except Exception as error:  # of PyTorch
            raise ValueError(f"PyTorch cannot load {file}: {error}") from error

    def __call__(self, *inputs: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        """What the network gives for its inputs."""
        outputs: Any = self._package(*map(torch.from_numpy, inputs))
        return [output.numpy() for output in (outputs if isinstance(outputs, tuple | list) else (outputs,))]


def _text(file: Path) -> str | None:
    try:
        with zipfile.ZipFile(file) as package:
            for part in package.infolist():
                if part.filename.endswith(_METADATA):
                    with package.open(part) as opened:
                        content = json.loads(opened.read(2 * LIMIT))
                    text = content.get(KEY) if isinstance(content, dict) else None
                    if isinstance(text, str):
                        return text
    except (zipfile.BadZipFile, OSError, ValueError, RecursionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{file} is broken, or no package of AOTInductor: {error}") from error
    return None
