"""NVIDIA's cuFile (GPUDirect Storage): reads from a file straight into a GPU's memory, or not at all.

[Note: no fallback] cuFile reads through host memory by itself where it cannot go straight, says nothing of it, and is
then no faster than mball's own way there. So it is told not to (`allow_compat_mode`) before its driver is opened, and
what it cannot read straight fails. That holds for all of the process: others that use cuFile beside mball get errors,
too, where they would have got the slow way. What was set before is set again when the last of mball's lets go.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import threading
from dataclasses import dataclass, field
from typing import Any

from mball.errors import DeviceError

# Of `CUfileDriverControlFlags_t`: allow_compat_mode, posix_io_mode and gds_fallback_io, not all of which the bindings
# of every version know.
_ALLOW_COMPAT_MODE = 1 << 1
_WAYS_THROUGH_THE_HOST = _ALLOW_COMPAT_MODE | 1 << 2 | 1 << 4


class CuFileError(DeviceError):
    """A call of cuFile failed."""


class _Properties(ctypes.Structure):
    """`CUfileDrvProps_t`, as far as it is asked for; with room for what later versions add."""

    _fields_ = (
        ("major_version", ctypes.c_uint),
        ("minor_version", ctypes.c_uint),
        ("poll_threshold_bytes", ctypes.c_size_t),
        ("most_direct_bytes", ctypes.c_size_t),
        ("status_flags", ctypes.c_uint),
        ("control_flags", ctypes.c_uint),
        ("rest", ctypes.c_uint * 64),
    )


@dataclass(slots=True, kw_only=True)
class _Session:
    """What this process has of cuFile's driver, under `lock`: it is opened by the first user and closed by the last."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    num_users: int = 0
    fell_back: bool = False  # what was set before
    refusal: str = ""  # why it does not open; asking a second time may hang


_session = _Session()


class CuFile:
    """cuFile's calls. Thread-safe; `read` blocks, and lets Python run meanwhile.

    Files and memory that are registered are deregistered before `close`. Each call raises CuFileError.
    """

    def __init__(self) -> None:
        """Opens cuFile's driver. Raises CuFileError where it is not there, or would not go straight."""
        self._cufile = _bindings()
        self._is_open = False
        with _session.lock:
            if _session.refusal:
                raise CuFileError(_session.refusal)
            if not _session.num_users:
                self._open()
            _session.num_users += 1
            self._is_open = True

    def register_file(self, descriptor: int) -> int:
        """Returns the handle of an open file, whose descriptor stays the caller's and open."""
        description = self._cufile.Descr()
        description.type = int(self._cufile.FileHandleType.OPAQUE_FD)
        description.handle.fd = descriptor
        return int(self._call("handle_register", description.ptr))

    def deregister_file(self, handle: int) -> None:
        """Gives a handle up, which nothing reads any more."""
        self._call("handle_deregister", handle)

    def register_memory(self, address: int, size_bytes: int) -> None:
        """Opens memory of the GPU to disks."""
        no_flags = 0
        self._call("buf_register", address, size_bytes, no_flags)

    def deregister_memory(self, address: int) -> None:
        """Closes it again; nothing is read into it any more."""
        self._call("buf_deregister", address)

    def read(self, handle: int, offset_bytes: int, size_bytes: int, address: int, shift_bytes: int) -> int:
        """Reads up to `size_bytes` of a file from `offset_bytes` on, and returns how many there were.

        They go to `shift_bytes` behind `address`, where registered memory begins; they are there when this returns.
        Called with the GPU's context current. Fast where offset and size are multiples of 4096.
        """
        size = int(self._call("read", handle, address, size_bytes, offset_bytes, shift_bytes))
        if size < 0:  # the bindings look at -1 only
            raise CuFileError(f"cuFile's read failed: {self._name_of(-size)}")
        return size

    def close(self) -> None:
        """Lets go of the driver. Idempotent; call it again when it fails."""
        with _session.lock:
            if not self._is_open:
                return
            # Out of the books first: an interrupt may leave it open, but it is not closed twice.
            self._is_open = False
            _session.num_users -= 1
            if _session.num_users:
                return
            try:
                self._call("driver_close")
            except CuFileError:
                self._is_open = True
                _session.num_users += 1
                raise
            if _session.fell_back:
                self._let_fall_back(True)

    def _open(self) -> None:
        _session.fell_back = bool(self._control_flags() & _ALLOW_COMPAT_MODE)
        if _session.fell_back:
            self._let_fall_back(False)
        try:
            self._open_driver()
            try:
                self._refuse_ways_through_the_host()
            except CuFileError:
                self._call("driver_close")
                raise
        except CuFileError as error:
            _session.refusal = str(error)
            if _session.fell_back:
                self._let_fall_back(True)
            raise

    def _open_driver(self) -> None:
        try:
            self._call("driver_open")
        except CuFileError as error:  # it advises to allow what is not wanted here
            raise CuFileError(
                f"{error}. mball does without that mode, which is no faster than pinned memory: load nvidia-fs, of the "
                "version that this cuFile wants (modprobe nvidia-fs)"
            ) from error

    def _refuse_ways_through_the_host(self) -> None:
        """What cufile.json says is known once the driver is open."""
        if flags := self._control_flags() & _WAYS_THROUGH_THE_HOST:
            raise CuFileError(
                f"cuFile's settings have it read through host memory (control flags 0x{flags:x}): look for "
                "allow_compat_mode, posix_io_mode and gds_fallback_io in cufile.json"
            )

    def _let_fall_back(self, allowed: bool) -> None:
        parameter = int(self._cufile.BoolConfigParameter.PROPERTIES_ALLOW_COMPAT_MODE)
        try:
            self._call("set_parameter_bool", parameter, allowed)
        except CuFileError as error:
            if allowed:
                return  # nobody reads through mball any more, and others open it by their own settings
            raise CuFileError(
                f"cuFile would read through host memory where it cannot go straight, and cannot be told not to: "
                f"{error}. Set allow_compat_mode to false in cufile.json, or open mball before others open cuFile"
            ) from error

    def _control_flags(self) -> int:
        properties = _Properties()
        self._call("driver_get_properties", ctypes.addressof(properties))
        return int(properties.control_flags)

    def _call(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._cufile, function)(*arguments)
        except self._cufile.cuFileError as error:
            raise CuFileError(f"cuFile's {function} failed: {error}") from error
        except RuntimeError as error:  # of the bindings: no library, or one without this call
            why = str(error).partition("\n")[0]
            raise CuFileError(f"cuFile's {function} is not there: {why}; pip install nvidia-cufile") from error
        except ValueError as error:  # "5 is not a valid OpError": an errno, which the bindings take for cuFile's own
            code = str(error).partition(" ")[0]
            why = os.strerror(int(code)) if code.isdigit() else str(error)
            raise CuFileError(f"cuFile's {function} failed: {why}") from error

    def _name_of(self, code: int) -> str:
        try:
            return f"{self._cufile.OpError(code).name} ({code})"
        except ValueError:
            return f"code {code}"


def _bindings() -> Any:
    try:
        return importlib.import_module("cuda.bindings.cufile")
    except ImportError as error:
        raise CuFileError(f"no package cuda-bindings with cufile: {error}; pip install 'mball[cuda]'") from error
