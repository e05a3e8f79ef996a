"""Builds what is published, and tries it: ``python tools/package.py`` leaves a wheel and an archive in build/dist.

The wheel is installed alone into a fresh environment, which sees the dependencies of this one but not its awconv, and
must run the README's first example, with the C code that it brings.
"""

from __future__ import annotations

import re
import shutil
import site
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIST = ROOT / "build" / "dist"

# What is appended to the README's first example, which makes a model.
_CHECK = """
import logging, os, pathlib, sys, torch

assert pathlib.Path(awconv.__file__).is_relative_to(sys.prefix), awconv.__file__
chosen = []
handler = logging.Handler()
handler.emit = lambda record: chosen.append(record.getMessage())
logger = logging.getLogger("awconv.ops.choose")
logger.addHandler(handler)
logger.setLevel(logging.DEBUG)
with torch.no_grad():
    assert model.eval()(torch.randn(1, 3, 64, 64)).isfinite().all()
fused = [line for line in chosen if ": fused, least cost" in line]
assert fused and next(pathlib.Path(os.environ["XDG_CACHE_HOME"]).rglob("*.so")), chosen
print(f"awconv {awconv.__version__} from its wheel: {len(fused)} of {len(chosen)} shapes by the C code")
"""


def main() -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    _run("-m", "build", "--outdir", str(DIST), str(ROOT))
    (wheel,) = DIST.glob("*.whl")
    (archive,) = DIST.glob("*.tar.gz")
    _run("-m", "twine", "check", "--strict", str(wheel), str(archive))
    with tempfile.TemporaryDirectory() as folder:
        python = _environment(Path(folder) / "environment", wheel)
        cache = {"XDG_CACHE_HOME": str(Path(folder) / "cache"), "PATH": "/usr/local/bin:/usr/bin:/bin"}
        subprocess.run([python, "-I", "-c", _first_example() + _CHECK], cwd=folder, env=cache, check=True)


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=tempfile.gettempdir(), check=True)


def _environment(folder: Path, wheel: Path) -> Path:
    """The Python of a fresh environment with the wheel, and with the dependencies of this one: its site-packages, but
    not what their .pth files add, such as an editable awconv."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))
    return python


def _first_example() -> str:
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert example is not None
    return example[1]


if __name__ == "__main__":
    main()
