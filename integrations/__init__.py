"""Adapters to other frameworks, one package each; none imports another."""

from __future__ import annotations

# The same folder under two names would be two packages with two sets of classes.
if __name__ != "mball.integrations":
    raise ImportError(f"{__name__!r} is a folder of mball's repository; import mball.integrations")
