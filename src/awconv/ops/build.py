"""Builds the package's C code with the machine's own compiler, at first use, and keeps it in a cache.

What is loaded runs with the user's rights. A library is therefore taken from the cache only if its folder and file
belong to the user and nobody else can write them, and if its bytes are those that its name tells. Otherwise it is built
anew. Without a cache that can be trusted, it is built in a private folder, for this process alone.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, combinations
from pathlib import Path

import torch

_REALS = {torch.float32: "float", torch.float64: "double"}
_FLAGS = ("-O3", "-fPIC", "-shared", "-std=gnu11")
# What a compiler may not know. (A call of memcpy would take longer than most of the loops that look like one.)
_OPTIONAL_FLAGS = ("-march=native", "-fopenmp", "-fno-tree-loop-distribute-patterns")
_PARTIAL = ".partial"
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_log = logging.getLogger(__name__)


@functools.cache
def library(source: Path, dtype: torch.dtype) -> ctypes.CDLL | str:
    """A file of C code built for numbers of a type (its macro REAL), from the cache if it was built before.

    Args:
        source: the file.
        dtype: float32 or float64.

    Returns:
        The library, or why it cannot be had.
    """
    try:
        compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError as error:
        return f"its C code needs a C compiler, and the variable CC, {os.environ['CC']!r}, names none: {error}"
    if shutil.which(compiler[0]) is None:
        return f"its C code needs a C compiler, and there is no {compiler[0]!r} (name one in the variable CC)"
    try:
        name = f"{source.stem}_{_REALS[dtype]}_{_fingerprint(compiler, source)}"
        with ExitStack() as stack:
            cache = stack.enter_context(_cache())
            kept = None if cache is None else _kept(cache, name)
            if kept is not None:
                return kept
            private = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="awconv-", ignore_cleanup_errors=True))
            )
            content = _build(compiler, source, _REALS[dtype], private)
            file = f"{name}_{_checksum(content)}.so"
            if cache is not None:
                try:
                    _keep(cache, file, content)
                    return _load(cache, file)
                except OSError as error:  # full, read-only, or nothing in it may be executed
                    _log.warning(
                        "the C code is built again for each process, since the cache cannot be used: %s", error
                    )
            (private / file).write_bytes(content)
            return ctypes.CDLL(str(private / file))  # which stays in memory when the folder is removed
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("slower algorithms are used, since the C code could not be built: %s", error)
        return f"its C code could not be built or loaded: {error}"


def kept_file(library: ctypes.CDLL) -> Path | None:
    """Where the cache keeps a library, for those who load it by its path; None if it is not kept."""
    name = Path(library._name).name
    with _cache() as cache:
        if cache is None:
            return None
        try:
            if _checksum(_own_content(cache, name)) != name.rpartition("_")[2].removesuffix(".so"):
                return None
        except OSError:
            return None
        return _folder_path() / name


@contextmanager
def _cache() -> Iterator[int | None]:
    """The open folder of kept libraries, locked, so that of many processes that start at once one builds; None where
    there is none that can be trusted."""
    folder = None
    try:
        folder = _open_folder()
    except (OSError, RuntimeError) as error:  # the latter where a user has neither HOME nor a name
        _log.warning("the C code is built again for each process, since there is no cache for it: %s", error)
    try:
        if folder is not None:
            with suppress(ImportError, OSError):  # other systems, and file systems without locks
                from fcntl import LOCK_EX, flock

                flock(folder, LOCK_EX)
                _clear(folder)
        yield folder
    finally:
        if folder is not None:
            os.close(folder)  # and unlocks it


def _open_folder() -> int:
    if os.name != "posix":
        raise OSError("who may write a folder is only known on POSIX systems")
    path = _folder_path()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.lstat().st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user; name a folder of your own in XDG_CACHE_HOME")
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    if not _is_own(os.fstat(folder)):  # asked of what is open, which nobody can exchange any more
        os.close(folder)
        raise PermissionError(
            f"others can write {path}, or it is another user's; remove it and what it holds, or name a folder of your "
            "own in XDG_CACHE_HOME"
        )
    return folder


def _folder_path() -> Path:
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (chosen if chosen.is_absolute() else Path.home() / ".cache") / "awconv"


def _is_own(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & _OTHERS_MAY_WRITE


def _kept(folder: int, name: str) -> ctypes.CDLL | None:
    """A library that was built before; None if there is none. What is damaged, or not the user's own, is removed."""
    for file in sorted(os.listdir(folder)):
        if not file.startswith(f"{name}_") or not file.endswith(".so"):
            continue
        try:
            if file == f"{name}_{_checksum(_own_content(folder, file))}.so":
                return _load(folder, file)
            _log.warning("a library in the cache is damaged, and built anew: %s", file)
        except OSError as error:  # another's file, or a library for another C library
            _log.warning("a library in the cache cannot be used, and is built anew: %s", error)
        with suppress(OSError):
            os.unlink(file, dir_fd=folder)
    return None


def _own_content(folder: int, file: str) -> bytes:
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    with open(descriptor, "rb") as opened:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not _is_own(status):
            raise PermissionError(f"{file} is no file of the user's own, or others can write it")
        return opened.read()


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _keep(folder: int, file: str, content: bytes) -> None:
    """Writes a library beside its place and renames it, so that nobody sees half of it."""
    unfinished = f"{file}.{os.getpid()}{_PARTIAL}"
    with suppress(FileNotFoundError):  # of a process of this number that was killed
        os.unlink(unfinished, dir_fd=folder)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o700, dir_fd=folder)
    try:
        with open(descriptor, "wb") as opened:
            opened.write(content)
        os.rename(unfinished, file, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        os.unlink(unfinished, dir_fd=folder)
        raise


def _clear(folder: int) -> None:
    """Removes what killed processes left half written. The folder is locked, so that nobody is writing."""
    for file in os.listdir(folder):
        if re.fullmatch(rf".+_[0-9a-f]{{32}}\.so\.[0-9]+{re.escape(_PARTIAL)}", file):
            os.unlink(file, dir_fd=folder)


def _load(folder: int, file: str) -> ctypes.CDLL:
    """Loads a library of the open folder, whatever its path leads to by now."""
    descriptors = Path("/proc/self/fd")
    if descriptors.is_dir():
        return ctypes.CDLL(str(descriptors / str(folder) / file))
    here = os.open(".", os.O_RDONLY)  # without them, it is found from the working folder
    try:
        os.fchdir(folder)
        return ctypes.CDLL(f"./{file}")
    finally:
        os.fchdir(here)
        os.close(here)


def _fingerprint(compiler: list[str], source: Path) -> str:
    """What a build depends on: the code and what it includes, the compiler, the C library, and the processor that
    -march=native means."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    digest = hashlib.sha256()
    for part in _parts(source):
        digest.update(part.read_bytes() + b"\0")
    machine = (platform.machine(), platform.processor(), _processor_features(), *platform.libc_ver())
    for text in (*compiler, *_FLAGS, *_OPTIONAL_FLAGS, *machine):
        digest.update(text.encode() + b"\0")
    digest.update(version)
    return digest.hexdigest()[:16]


def _parts(source: Path) -> list[Path]:
    """A file of C code, and all that it and these include of the package's own, each once."""
    parts = [source]
    for part in parts:
        for name in re.findall(r'^#include "(.+)"$', part.read_text(), re.MULTILINE):
            if (included := Path(os.path.normpath(part.parent / name))) not in parts:
                parts.append(included)
    return parts


def _processor_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _build(compiler: list[str], source: Path, real: str, folder: Path) -> bytes:
    """The library, built in a folder of this process, without optional flags where the compiler fails with them."""
    target = folder / "built.so"
    _log.info("building %s for %s with %s", source.name, real, shlex.join(compiler))
    failure = None
    for left_out in chain.from_iterable(combinations(_OPTIONAL_FLAGS, count) for count in range(4)):
        flags = (*_FLAGS, *(flag for flag in _OPTIONAL_FLAGS if flag not in left_out))
        command = [*compiler, *flags, f"-DREAL={real}", "-o", str(target), str(source)]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=600)
        if result.returncode == 0 and target.is_file():
            if left_out:
                _log.warning("%s was built without %s, which %s refuses", source.name, " ".join(left_out), compiler[0])
            return target.read_bytes()
        if failure is None:
            reason = result.stderr.strip()[-2000:] if result.returncode else "nothing was written"
            failure = f"{shlex.join(command)} failed:\n{reason}"
    raise OSError(failure)
