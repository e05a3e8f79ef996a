"""The C code's cache: what may be loaded from it, and what is built again."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from awconv.ops import build

SOURCE = """
#include <stdint.h>
int64_t answer(void) { return ANSWER; }
""".replace("ANSWER", "sizeof(REAL)")
NOBODY = 65534


@pytest.fixture(autouse=True)
def _own_libraries() -> Iterator[None]:
    build.library.cache_clear()
    yield
    build.library.cache_clear()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "cache" / "awconv"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "answer.c"
    file.write_text(SOURCE)
    return file


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was built."""
    done: list[str] = []
    compile = build._build

    def counted(compiler: list[str], source: Path, real: str, folder: Path) -> bytes:
        done.append(real)
        return compile(compiler, source, real, folder)

    monkeypatch.setattr(build, "_build", counted)
    return done


def answer(source: Path) -> int:
    build.library.cache_clear()  # as another process would begin
    library = build.library(source, torch.float64)
    assert isinstance(library, ctypes.CDLL), library
    return int(library.answer())


def kept(cache: Path) -> Path:
    (file,) = cache.glob("*.so")
    return file


def test_a_library_is_kept_for_the_user_alone(
    cache: Path, source: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0)
    try:
        assert answer(source) == answer(source) == 8
    finally:
        os.umask(before)
    assert builds == ["double"]
    assert [path.stat().st_mode & 0o077 for path in (cache, kept(cache))] == [0, 0]
    assert not list((cache.parent.parent / "temporary").iterdir())


def exchange(file: Path, content: bytes) -> None:
    """Puts another file in the place of one that this process has loaded, and that must stay as it is for that."""
    file.unlink()
    file.write_bytes(content)
    file.chmod(0o700)


def cut(file: Path) -> None:
    exchange(file, file.read_bytes()[: file.stat().st_size // 2])


def emptied(file: Path) -> None:
    exchange(file, b"")


def zeroed(file: Path) -> None:
    content = file.read_bytes()
    middle = len(content) // 3
    exchange(file, content[:middle] + bytes(middle) + content[2 * middle :])


def for_another_system(file: Path) -> None:
    """A library that is whole, and cannot be loaded."""
    content = b"\x7fELF of another system"
    name = file.name[: file.name.rindex("_")]
    file.unlink()
    file.with_name(f"{name}_{build._checksum(content)}.so").write_bytes(content)


def planted_link(file: Path) -> None:
    other = file.parent.parent / "other.so"
    file.rename(other)
    file.symlink_to(other)


def writable_by_others(file: Path) -> None:
    file.chmod(0o722)


@pytest.mark.parametrize("spoil", [cut, emptied, zeroed, for_another_system, planted_link, writable_by_others])
def test_a_spoilt_library_is_built_again(
    spoil: object, cache: Path, source: Path, builds: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert answer(source) == 8
    whole = kept(cache).read_bytes()
    spoil(kept(cache))  # type: ignore[operator]
    assert answer(source) == 8
    assert "built anew" in caplog.text
    assert len(builds) == 2
    assert answer(source) == 8
    assert len(builds) == 2
    assert not kept(cache).is_symlink()
    assert len(kept(cache).read_bytes()) == len(whole)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_is_not_used(
    mode: int, cache: Path, source: Path, builds: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    cache.mkdir(parents=True)
    cache.chmod(mode)
    assert answer(source) == answer(source) == 8
    assert len(builds) == 2
    assert "others can write" in caplog.text
    assert not list(cache.iterdir())
    assert not list((cache.parent.parent / "temporary").iterdir())  # the private folder is gone


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("planted", ["folder", "file", "link"])
def test_what_another_user_planted_is_not_loaded(planted: str, cache: Path, source: Path, builds: list[str]) -> None:
    assert answer(source) == 8
    if planted == "folder":
        os.chown(cache, NOBODY, NOBODY)
    elif planted == "file":
        os.chown(kept(cache), NOBODY, NOBODY)
    else:
        cache.rename(cache.with_name("elsewhere"))
        cache.symlink_to(cache.with_name("elsewhere"))
        os.chown(cache, NOBODY, NOBODY, follow_symlinks=False)
    assert answer(source) == 8
    assert len(builds) == 2


def test_a_shared_folder_around_the_users_own_is_no_obstacle(cache: Path, source: Path, builds: list[str]) -> None:
    cache.parent.mkdir()
    cache.parent.chmod(0o777)
    assert answer(source) == answer(source) == 8
    assert len(builds) == 1


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("'cc", r"the variable CC, \"'cc\", names none: No closing quotation"), ("no-such", "there is no 'no-such'")],
)
def test_a_wrong_compiler_is_told(
    compiler: str, reason: str, cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(AssertionError, match=reason):
        answer(source)


@pytest.mark.parametrize("compiler", ["", "  "])
def test_an_empty_name_of_a_compiler_is_none(
    compiler: str, cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert answer(source) == 8


def compiler_that_refuses(flags: str, folder: Path) -> Path:
    script = folder / "limited-cc"
    script.write_text(
        "#!/bin/sh\n"
        f'for flag in "$@"; do case "$flag" in {flags}) echo "unknown option $flag" >&2; exit 1;; esac; done\n'
        f'exec {shutil.which("cc")} "$@"\n'
    )
    script.chmod(0o755)
    return script


@pytest.mark.parametrize("flags", ["-fopenmp", "-march=native", "-fopenmp|-march=native", "-f[no]*[!C]|-march=*"])
def test_flags_that_a_compiler_refuses_are_left_out(
    flags: str, cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", str(compiler_that_refuses(flags, cache.parent.parent)))
    assert answer(source) == 8
    assert "was built without" in caplog.text


def test_a_compiler_that_fails_is_quoted(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(compiler_that_refuses("-shared", cache.parent.parent)))
    with pytest.raises(AssertionError, match="unknown option -shared"):
        answer(source)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {key: value for key, value in os.environ.items() if key not in ("HOME", "XDG_CACHE_HOME", "CC")}
    return subprocess.run(
        [sys.executable, "-c", code], env=known | environment, capture_output=True, text=True, check=False
    )


def test_without_a_home_it_builds_for_the_process(source: Path) -> None:
    code = f"""
from pathlib import Path
from unittest import mock
import torch
from awconv.ops import build
with mock.patch("pathlib.Path.home", side_effect=RuntimeError("Could not determine home directory.")):
    print(build.library(Path({str(source)!r}), torch.float32).answer())
"""
    result = run(code)
    assert result.stdout.strip() == "4", result.stderr
    assert "there is no cache" in result.stderr


def test_processes_that_start_at_once_build_once(cache: Path, source: Path) -> None:
    marks = cache.parent.parent / "marks"
    compiler = cache.parent.parent / "slow-cc"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *-shared*) echo >> {marks}; sleep 0.5;; esac\nexec {shutil.which("cc")} "$@"\n'
    )
    compiler.chmod(0o755)
    code = f"""
import os, sys
from pathlib import Path
import torch
from awconv.ops import build
ranks = []
for _ in range(4):
    rank = os.fork()
    if rank == 0:
        os._exit(build.library(Path({str(source)!r}), torch.float32).answer())
    ranks.append(rank)
print([os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks])
"""
    result = run(code, CC=str(compiler), XDG_CACHE_HOME=str(cache.parent))
    assert result.stdout.strip() == "[4, 4, 4, 4]", result.stderr
    assert len(marks.read_text().splitlines()) == 1
    assert [file.suffix for file in cache.iterdir()] == [".so"]


@pytest.mark.parametrize("locks", [True, False])
def test_what_killed_processes_left_is_removed_where_nobody_can_be_writing(
    locks: bool, cache: Path, source: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer(source) == 8
    left, others = cache / f"{kept(cache).name}.123.partial", cache / "notes.partial"
    for file in (left, others):
        file.write_bytes(b"half")
    if not locks:
        monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=OSError("no locks here")))
    assert answer(source) == 8
    assert left.exists() is not locks
    assert others.exists()
    assert len(builds) == 1


def test_a_change_in_any_part_of_the_c_code_rebuilds_it(cache: Path, source: Path, builds: list[str]) -> None:
    from awconv.ops.fused import cpu

    source.write_text('#include "outer.h"\n' + SOURCE.replace("sizeof(REAL)", "NUMBER"))
    source.with_name("outer.h").write_text('#pragma once\n#include "inner.h"\n#include "outer.h"\n')
    for number in (1, 2, 1):
        source.with_name("inner.h").write_text(f"#define NUMBER {number}\n")
        assert answer(source) == number
    assert len(builds) == 2
    folder = cpu._SOURCE.parent
    assert set(build._parts(cpu._SOURCE)) == {cpu._SOURCE, *folder.glob("cpu_*.h"), folder.parent / "real.h"}
    assert len(set(folder.glob("cpu_*.h"))) > 3


def test_every_function_of_the_c_code_has_its_types() -> None:
    from awconv.ops import average_pool
    from awconv.ops.fused import cpu
    from tests.ops.problems import TYPICAL

    TYPICAL["fused"].run("fused")
    average_pool.average_pool(torch.randn(1, 1, 4, 4, dtype=torch.float64), (2, 2))
    for source in (cpu._SOURCE, average_pool._SOURCE):
        library = build.library(source, torch.float64)
        assert isinstance(library, ctypes.CDLL)
        assert library.workspace_elements.restype is ctypes.c_int64
        assert library.workspace_elements.argtypes
        assert library.forward.restype is None
        assert library.forward.argtypes
