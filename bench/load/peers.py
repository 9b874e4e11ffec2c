"""Other loaders, from PyPI into a folder of their own: their dependencies are not wanted, and nobody else sees them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mball.config import cache_directory

PACKAGES = ("fastsafetensors==0.5.0", "runai-model-streamer==0.17.0", "humanize==4.17.0")


def install_peers() -> Path:
    """Returns the folder that the peers are in, installed now unless they are there. Raises CalledProcessError."""
    tag = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache_directory() / "bench" / "-".join(["peers", tag, *PACKAGES])
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.part")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target"]
        subprocess.run([*command, str(unfinished), *PACKAGES], check=True)
        unfinished.rename(folder)
    return folder
