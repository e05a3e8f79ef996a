"""Networks that differ in one thing, trained by one recipe over the same seeds (extra ``train``)."""

from awconv.extras import require

require("lightning", extra="train")

from awconv.compare.compare import ablate, compare, demo

__all__ = ["ablate", "compare", "demo"]
