"""Builds the C libraries where there is a compiler; all else is in pyproject.toml."""

from __future__ import annotations

import hashlib
from pathlib import Path

from setuptools import Extension, setup


def library(source: str) -> Extension:
    """Returns what is loaded through ctypes, beside its source: no module of Python's.

    As an extension it makes wheels say for which machine.
    """
    path = Path(source)
    digest = hashlib.sha256((Path(__file__).parent / path).read_bytes()).hexdigest()[:16]
    return Extension(
        ".".join([*path.parent.parts, f"_{path.stem}"]),
        [source],
        define_macros=[("SOURCE_DIGEST", f'"{digest}"')],
        extra_compile_args=["-std=c11", "-fvisibility=hidden"],
        libraries=["dl", "pthread"],
        optional=True,  # without a compiler mball installs all the same, and says so when somebody asks for it
    )


setup(ext_modules=[library("mball/memory/allocator/segments.c"), library("mball/storage/read_pool.c")])
