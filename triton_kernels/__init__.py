"""Triton kernels of mball, one folder an operator: `reference.py`, `kernel.py`, `op.py`."""

from __future__ import annotations

# A public package is called triton_kernels too, and other libraries probe for it by that name. From the
# repository root this folder would answer in its place, so it answers to its full name alone.
if __name__ != "mball.triton_kernels":
    raise ImportError(f"{__name__!r} is a folder of mball's repository; import mball.triton_kernels")
