"""Adapters to other frameworks, one package each; none imports another."""

from __future__ import annotations

import sys

# The same folder under two names would be two packages with two sets of classes.
if __name__ != "mball.integrations":
    raise ImportError(f"{__name__!r} is a folder of mball's repository; import mball.integrations")


def make_faithful() -> None:
    """Has the frameworks that are loaded compute the same whether or not mball captures them."""
    if "transformers" in sys.modules:
        from mball.integrations.transformers.faithful import install

        install()
