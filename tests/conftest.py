from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.poison import poisoned

# Real images that a clone does not have.
SHARED_DATA = Path(os.environ.get("AWCONV_SHARED_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # before Triton is imported, whose kernels are tested on the CPU then

torch.set_num_threads(1)  # the tensors of tests are small, and several workers share the cores
# Tolerances are those of whole float32 products. With the newer conv.fp32_precision alone, torch.export fails.
torch.backends.cudnn.allow_tf32 = False
settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic mode needs on CUDA
# Before Ultralytics is imported: it would write below the home folder, download, and install.
os.environ.setdefault("YOLO_CONFIG_DIR", str(Path(__file__).parent.parent / "build" / "ultralytics"))
os.environ.setdefault("YOLO_OFFLINE", "1")
os.environ.setdefault("YOLO_AUTOINSTALL", "0")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parent.parent / "build" / "inductor"))


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    for item in items:
        place = _shared_fixture(item)
        if place is not None:
            item.add_marker(pytest.mark.xdist_group(place))


def _shared_fixture(item: pytest.Item) -> str | None:
    """The file or folder of a fixture that a test shares with others. With ``--dist loadgroup`` they run in one worker,
    so that a server is started, and a network exported, once and not in each of them."""
    found = getattr(item, "_fixtureinfo", None)
    if found is None:
        return None
    last = [definitions[-1] for definitions in found.name2fixturedefs.values()]
    places = [fixture.baseid for fixture in last if fixture.scope in ("module", "session")]
    return min((place for place in places if place not in ("", "tests")), key=len, default=None)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True, scope="session")
def _unwritten_memory_is_poisoned() -> Iterator[None]:
    with poisoned():
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _of_the_process() -> dict[str, object]:
    return {
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "precision of products": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "Ctrl-C": signal.getsignal(signal.SIGINT),
        "SIGTERM": signal.getsignal(signal.SIGTERM),
        "folder": os.getcwd(),
        **{f"log level of {name}": logging.getLogger(name).level for name in _LOGGERS if name in sys.modules},
    }


_LOGGERS = ("lightning.pytorch", "lightning.fabric", "awconv")  # a first import sets some levels


@pytest.fixture(autouse=True)
def _leaves_the_process_as_it_was() -> Iterator[None]:
    """What a test leaves behind decides the next one, and which that is, the number of workers decides."""
    before = _of_the_process()
    yield
    after = _of_the_process()
    assert {name: after[name] for name in before} == before


@pytest.fixture
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the real images of {SHARED_DATA}; AWCONV_SHARED_DATA names another folder of them")
    return SHARED_DATA
