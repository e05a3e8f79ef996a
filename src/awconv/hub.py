"""Trained networks from Hugging Face's hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from awconv.models.published import ADAPTER, CONFIG, FILE, PICKLED

_PREFIXES = ("hf-hub:", "hf_hub:")  # timm's
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", re.ASCII)


def is_on_hub(source: str | os.PathLike[str]) -> bool:
    """Whether a source is called as timm calls a network on the hub, ``hf-hub:OWNER/NAME``.

    Examples:
        >>> from awconv.hub import is_on_hub
        >>> is_on_hub("hf-hub:timm/resnet18.a1_in1k"), is_on_hub("resnet18")
        (True, False)
    """
    return os.fspath(source).startswith(_PREFIXES)


def downloaded(source: str | os.PathLike[str]) -> Path:
    """Downloads a network's configuration and its weights, or its adapter, into the hub's cache.

    Args:
        source: ``hf-hub:OWNER/NAME``, or ``hf-hub:OWNER/NAME@REVISION``.

    Returns:
        The folder, in the layout of ``awconv publish``.

    Raises:
        ValueError: it is no such name, there is no such repository, it holds no network of timm's, or the hub cannot be
            reached.
    """
    name = os.fspath(source).partition(":")[2]
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"a network on the hub is called hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION, got {name!r}"
        )
    repository, _, revision = name.partition("@")
    given: dict[str, Any] = dict(repo_id=repository, revision=revision or None, library_name="awconv")
    try:
        folder = Path(hf_hub_download(filename=CONFIG, **given)).parent
        for file in (FILE, ADAPTER, PICKLED):
            try:
                hf_hub_download(filename=file, **given)
                return folder
            except EntryNotFoundError:
                continue
    except Exception as error:  # of the hub's library, and of the network
        raise ValueError(f"{source} cannot be loaded from the hub: {error}") from error
    raise ValueError(f"{source} has no weights: its repository has none of {FILE}, {ADAPTER} and {PICKLED}")
