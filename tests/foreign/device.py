"""The foreign device: loads it into this process, and is what torch knows as `torch.foreign`.

`load` makes `device="foreign"` known to torch for the rest of the process, which cannot be undone. All that torch
asks of the module of a device is here, and so is all private API of torch that it takes.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.foreign.build import build

_NAME = "foreign"
_library: ctypes.CDLL | None = None
_kept: dict[int, object] = {}
_numbers = itertools.count(1)

Stream = torch.Stream
Event = torch.Event


def load(library: Path | None = None) -> None:
    """Makes the device known to torch, once a process; builds it first unless told where it is."""
    global _library
    if _library is not None:
        return
    path = str(library or build())
    torch.utils.rename_privateuse1_backend(_NAME)
    torch.ops.load_library(path)
    loaded = ctypes.CDLL(path)
    for name in ("allocated_bytes", "peak_bytes", "held_bytes", "reserved_bytes"):
        getattr(loaded, f"foreign_{name}").restype = ctypes.c_int64
    for name in ("cap", "round"):
        getattr(loaded, f"foreign_{name}").argtypes = [ctypes.c_int64]
    loaded.foreign_begin()
    loaded.foreign_tell(_let_go)
    # Tensors may outlive the interpreter; nobody is there to be told then.
    atexit.register(loaded.foreign_tell, None)
    torch._register_device_module(_NAME, sys.modules[__name__])
    torch.utils.generate_methods_for_privateuse1_backend()
    _library = loaded
    _tell_dynamo()


def foreign_tensor(address: int, size_bytes: int, keep: object) -> torch.Tensor:
    """Returns a foreign tensor of the `size_bytes` bytes of host memory from `address`, uint8, one dimension.

    Its storage holds `keep` for as long as it lives, and does not count as allocated: the memory is another's.
    """
    assert _library is not None, "load the foreign device first"
    number = next(_numbers)
    _kept[number] = keep
    return torch.ops.foreign.on_memory(address, size_bytes, number)


@ctypes.CFUNCTYPE(None, ctypes.c_int64)
def _let_go(number: int) -> None:
    _kept.pop(number, None)


# -- what torch asks the module of a device ---------------------------------------------------------------------------


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def init() -> None:
    pass


def _lazy_init() -> None:
    pass


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def set_device(device: Any) -> None:
    torch.accelerator.set_device_index(device)


class device(contextlib.nullcontext):  # noqa: N801  # as torch.cuda.device is called
    """The device is always the current one."""


def synchronize(device: Any = None) -> None:
    pass


def current_stream(device: Any = None) -> torch.Stream:
    return torch.accelerator.current_stream(device)


def set_stream(stream: torch.Stream) -> None:
    torch.accelerator.set_stream(stream)


@contextlib.contextmanager
def stream(stream: torch.Stream | None) -> Iterator[None]:
    before = current_stream()
    if stream is not None:
        set_stream(stream)
    try:
        yield
    finally:
        set_stream(before)


def manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # its random numbers are the CPU's


def manual_seed_all(seed: int) -> None:
    manual_seed(seed)


def get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.default_generator.get_state()


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    torch.default_generator.set_state(state)


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


def is_bf16_supported(including_emulation: bool = True) -> bool:
    return True


def memory_allocated(device: Any = None) -> int:
    """Bytes of all foreign tensors, but for memory that others own."""
    assert _library is not None
    return int(_library.foreign_allocated_bytes())


def max_memory_allocated(device: Any = None) -> int:
    """The most that `memory_allocated` was since `reset_peak_memory_stats`."""
    assert _library is not None
    return int(_library.foreign_peak_bytes())


def reset_peak_memory_stats(device: Any = None) -> None:
    assert _library is not None
    _library.foreign_reset_peak()


reset_max_memory_allocated = reset_peak_memory_stats


def memory_held(device: Any = None) -> int:
    """Bytes of all foreign tensors, each rounded up as `round_sizes_to` says."""
    assert _library is not None
    return int(_library.foreign_held_bytes())


def memory_reserved(device: Any = None) -> int:
    """The most that `memory_held` was since `empty_cache`: what is freed is kept back."""
    assert _library is not None
    return int(_library.foreign_reserved_bytes())


def empty_cache() -> None:
    """Keeps nothing back that no tensor is in."""
    assert _library is not None
    _library.foreign_empty_cache()


def cap_memory(num_bytes: int | None) -> None:
    """Has allocations that would make `memory_held` more than that raise torch.OutOfMemoryError; None: none does."""
    assert _library is not None
    _library.foreign_cap(-1 if num_bytes is None else num_bytes)


def route_memory(give: Any = None, take: Any = None) -> None:
    """Has two functions of a C library, as torch.cuda.MemPool calls them, give memory and take it back; None: none."""
    assert _library is not None
    _library.foreign_route(*(ctypes.cast(function, ctypes.c_void_p) for function in (give, take)))


def round_sizes_to(num_bytes: int) -> None:
    """Has tensors take a multiple of that from now on; 1: what they need."""
    assert _library is not None
    _library.foreign_round(num_bytes)


# -- Dynamo -----------------------------------------------------------------------------------------------------------


def _tell_dynamo() -> None:
    from torch._dynamo import device_interface

    class Interface(device_interface.DeviceInterface):
        device = device
        Event = Event
        Stream = Stream

        class Worker:
            @staticmethod
            def set_device(device: int) -> None:
                set_device(device)

            @staticmethod
            def current_device() -> int:
                return 0

            @staticmethod
            def get_device_properties(device: Any = None) -> None:
                return None

        current_device = staticmethod(current_device)
        set_device = staticmethod(set_device)
        device_count = staticmethod(device_count)
        is_available = staticmethod(is_available)
        stream = staticmethod(stream)
        current_stream = staticmethod(current_stream)
        set_stream = staticmethod(set_stream)
        synchronize = staticmethod(synchronize)
        is_bf16_supported = staticmethod(is_bf16_supported)
        memory_allocated = staticmethod(memory_allocated)

        @staticmethod
        def exchange_device(device: int) -> int:
            return 0

        @staticmethod
        def maybe_exchange_device(device: int) -> int:
            return 0

        @staticmethod
        def get_raw_stream(device: int) -> int:
            return 0

        @staticmethod
        def get_compute_capability(device: Any = None) -> int:
            return 0

    for name in (_NAME, f"{_NAME}:0"):
        device_interface.register_interface_for_device(name, Interface)
