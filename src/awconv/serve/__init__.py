"""A trained network behind HTTP, with a page to try it (extra ``serve``)."""

from awconv.extras import require

for _module, _extra in (("lightning", "train"), ("fastapi", "serve"), ("python_multipart", "serve")):
    require(_module, extra=_extra)

from awconv.serve.command import app, serve

__all__ = ["app", "serve"]
