"""Builds the C library of the allocator where there is a compiler; all else is in pyproject.toml."""

from __future__ import annotations

import hashlib
from pathlib import Path

from setuptools import Extension, setup

SOURCE = "mball/memory/allocator/segments.c"
digest = hashlib.sha256((Path(__file__).parent / SOURCE).read_bytes()).hexdigest()[:16]

setup(
    ext_modules=[
        Extension(
            # No module of Python's: it is loaded through ctypes. As an extension it makes wheels say for which machine.
            "mball.memory.allocator._segments",
            [SOURCE],
            define_macros=[("SOURCE_DIGEST", f'"{digest}"')],
            extra_compile_args=["-std=c11", "-fvisibility=hidden"],
            libraries=["dl", "pthread"],
            optional=True,  # without a compiler mball installs all the same, and says so when somebody asks for it
        )
    ]
)
