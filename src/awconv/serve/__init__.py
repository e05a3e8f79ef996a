"""A trained network behind HTTP, with a page to try it (extra ``serve``)."""

from awconv.serve.application import app
from awconv.serve.command import serve

__all__ = ["app", "serve"]
