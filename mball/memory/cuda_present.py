"""Whether there is the GPU that a setting names."""

from __future__ import annotations

import torch

from mball.errors import ConfigError, DeviceError


def present_gpu(ordinal: int | None) -> int:
    """Returns the ordinal of a GPU that torch can use: this one, or the current one.

    Raises:
        ConfigError: this torch is built without CUDA.
        DeviceError: there is no GPU, or not so many.
    """
    if not torch.backends.cuda.is_built():
        raise ConfigError(f"device is 'cuda', and this torch ({torch.__version__}) is built without CUDA: install one")
    if not torch.cuda.is_available():
        raise DeviceError(
            "device is 'cuda', and torch sees no GPU: mball doctor says what there is (look at nvidia-smi, "
            "CUDA_VISIBLE_DEVICES, and whether the driver is new enough for this torch)"
        )
    if ordinal is None:
        ordinal = torch.cuda.current_device()
    if ordinal >= torch.cuda.device_count():
        raise DeviceError(f"device is 'cuda:{ordinal}', and torch sees {torch.cuda.device_count()} GPUs; count from 0")
    return ordinal
