"""Writes files whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from mball.errors import StorageError


def replace_file(target: Path, content: bytes, what: str) -> None:
    """Writes beside `target` and renames, so that nobody ever finds half a file there.

    Raises StorageError, which names `what` was to be written; nothing is left behind.
    """
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    try:
        try:
            unfinished.write_bytes(content)
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"the {what} cannot be written to {str(target)!r} ({len(content)} B): {error.strerror or error}. Give a "
            "file in a folder that exists and can be written"
        ) from error
