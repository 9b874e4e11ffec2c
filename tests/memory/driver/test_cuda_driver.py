"""One GPU's driver: which errors it makes of which answers, its context, forks, and pages of other processes."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cuda.bindings import driver as calls

from mball.errors import DeviceError
from mball.memory import cuda_driver, cuda_errors
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_errors import DriverError
from tests.memory.driver.standin import CODES, GRANULE_BYTES, StandIn


@pytest.fixture
def driver(standin: StandIn) -> Iterator[CudaDriver]:
    driver = CudaDriver()
    yield driver
    standin.forget()
    driver.close()
    assert standin.num_retained == 0


def script(code: str, **environment: str) -> str:
    """Runs Python code in a process of its own; returns what it printed."""
    finished = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


# The module by itself: the package around it imports torch, which takes seconds.
ALONE = f"""
import sys, types
package = types.ModuleType("mball.memory")
package.__path__ = {[str(Path(cuda_driver.__file__).parent)]!r}
sys.modules["mball.memory"] = package
"""
LOAD = "import ctypes, os; ctypes.CDLL(os.environ['MBALL_STANDIN_FOR_CUDA'], ctypes.RTLD_GLOBAL)\n"
OPEN = (
    ALONE
    + "from mball.memory.cuda_driver import CudaDriver\ntry: CudaDriver()\nexcept Exception as e: print(type(e), e)\n"
)


@pytest.mark.parametrize("granule_bytes", [GRANULE_BYTES, 2 << 20])
def test_the_granularity_is_the_drivers(standin: StandIn, granule_bytes: int) -> None:
    standin.configure(granule_bytes=granule_bytes)
    driver = CudaDriver()
    assert driver.granularity_bytes == granule_bytes
    assert driver.has_virtual_memory
    driver.close()


@pytest.mark.parametrize(
    ("code", "way_out"),
    [
        ("OUT_OF_MEMORY", "lower the budget, or free memory of that GPU"),
        ("INVALID_VALUE", "report this message"),
        ("NOT_SUPPORTED", "use another GPU"),
        ("ILLEGAL_ADDRESS", "save what is in host memory, and start anew"),
        ("INVALID_CONTEXT", "report this message"),
    ],
)
def test_an_error_names_call_bytes_code_free_memory_and_way_out(
    driver: CudaDriver, standin: StandIn, code: str, way_out: str
) -> None:
    standin.fail(2, code=CODES[code])
    with driver.current(), pytest.raises(DriverError) as caught:
        driver.create(4 * GRANULE_BYTES)
    text = calls.cuGetErrorString(calls.CUresult(CODES[code]))[1].decode()
    assert caught.value.code_name == f"CUDA_ERROR_{code}"
    assert str(caught.value).startswith(
        f"cuMemCreate for 256.00 KiB (262144 bytes) failed on GPU 0: CUDA_ERROR_{code} ({CODES[code]}), {text}; "
        "64.00 MiB (67108864 bytes) of its 64.00 MiB are free; "
    )
    assert way_out in str(caught.value)


def test_an_error_comes_through_when_nothing_else_works_either(driver: CudaDriver, standin: StandIn) -> None:
    with driver.current():
        standin.fail(1, 1000, code=CODES["ILLEGAL_ADDRESS"])
        with pytest.raises(DriverError, match=r"CUDA_ERROR_ILLEGAL_ADDRESS.*how much.*not known.*save what is in host"):
            driver.create(GRANULE_BYTES)
        standin.forget()


def test_a_code_that_the_bindings_do_not_know_is_an_error_too(driver: CudaDriver, standin: StandIn) -> None:
    with driver.current():
        standin.fail(1, code=4711)
        with pytest.raises(DriverError, match=r"cuMemCreate failed on GPU 0: 4711.*update cuda-bindings"):
            driver.create(GRANULE_BYTES)


def test_bindings_that_say_so_in_another_way(driver: CudaDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of CUDA 13.0 look a code up and do not find it."""

    def unknown(*arguments: object) -> None:
        raise KeyError(4711)

    with driver.current():
        monkeypatch.setattr(driver._cuda, "cuMemCreate", unknown)
        with pytest.raises(DriverError, match=r"cuMemCreate failed on GPU 0: 4711.*update cuda-bindings"):
            driver.create(GRANULE_BYTES)


@pytest.mark.parametrize("ordinal", [-1, 1, 7])
def test_a_gpu_that_is_not_there(standin: StandIn, ordinal: int) -> None:
    with pytest.raises(DeviceError, match=rf"GPU {ordinal}: CUDA_ERROR_INVALID_DEVICE.*CUDA_VISIBLE_DEVICES"):
        CudaDriver(ordinal)
    assert standin.num_retained == 0


def test_another_gpu(standin: StandIn) -> None:
    standin.configure(num_devices=3)
    driver = CudaDriver(2)
    with driver.current():
        driver.destroy(driver.create(GRANULE_BYTES))
    assert driver.ordinal == 2
    driver.close()


def test_a_machine_without_gpus(standin: StandIn) -> None:
    standin.configure(num_devices=0)
    with pytest.raises(DeviceError, match=r"cuInit failed.*CUDA_ERROR_NO_DEVICE.*nvidia-smi"):
        CudaDriver()


def test_a_machine_without_a_driver() -> None:
    assert re.search(
        r"DeviceError'> the CUDA driver has no cuInit: .*install or update NVIDIA's driver, or use the CPU",
        script(OPEN),
    )


def test_a_driver_that_is_too_old_for_virtual_memory() -> None:
    said = script(LOAD + OPEN, MBALL_STANDIN_WITHOUT="cuMemGetAllocationGranularity")
    assert re.search(r"DeviceError'> the CUDA driver has no cuMemGetAllocationGranularity.*update", said)


def test_no_bindings() -> None:
    hide = "import sys; sys.modules['cuda.bindings'] = None\n"
    assert re.search(
        r"DeviceError'> the package cuda-bindings is needed.*pip install 'mball\[cuda\]'", script(hide + OPEN)
    )


def test_the_context_is_current_inside_and_what_was_before_again_outside(driver: CudaDriver, standin: StandIn) -> None:
    assert standin.num_contexts == 0
    with driver.current():
        with driver.current():
            assert standin.num_contexts == 2
        assert standin.num_contexts == 1
    assert standin.num_contexts == 0
    with pytest.raises(KeyError), driver.current():
        raise KeyError
    assert standin.num_contexts == 0


def test_every_thread_has_a_context_of_its_own(driver: CudaDriver, standin: StandIn) -> None:
    seen: list[int] = []

    def work() -> None:
        with driver.current():
            driver.destroy(driver.create(GRANULE_BYTES))
            seen.append(standin.num_contexts)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 4


def test_a_context_that_somebody_took_away_undoes_nothing(
    driver: CudaDriver, standin: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), driver.current():
        calls.cuCtxPopCurrent()
    assert re.search("could not be made current again.*CUDA_ERROR_INVALID_CONTEXT", caplog.text)


def test_closing_gives_the_context_up_once(standin: StandIn) -> None:
    driver = CudaDriver()
    assert standin.num_retained == 1
    driver.close()
    driver.close()
    assert standin.num_retained == 0


def test_a_forked_child_is_refused(driver: CudaDriver, tmp_path: os.PathLike[str]) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing"
        try:
            with driver.current():
                driver.create(GRANULE_BYTES)
        except DeviceError as error:
            said = str(error)
        finally:
            driver.close()
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    said = os.read(reader, 4096).decode()
    os.close(reader)
    assert os.waitpid(child, 0)[1] == 0
    assert re.fullmatch(rf"process {child} was forked from {os.getpid()}, where CUDA runs, .*'spawn'.*", said)


def test_pages_are_shared_by_file_descriptor(standin: StandIn) -> None:
    driver = CudaDriver(shareable=True)
    with driver.current():
        handle = driver.create(GRANULE_BYTES)
        descriptor = driver.export_handle(handle)
        imported = driver.import_handle(descriptor)
        os.close(descriptor)
        one, two = (driver.reserve(GRANULE_BYTES, 0) for _ in range(2))
        for address, pages in ((one, handle), (two, imported)):
            driver.map(address, GRANULE_BYTES, pages)
            driver.allow(address, GRANULE_BYTES)
        ctypes.memmove(one, b"seen by both", 12)
        assert ctypes.string_at(two, 12) == b"seen by both"
        for address, pages in ((one, handle), (two, imported)):
            driver.unmap(address, GRANULE_BYTES)
            driver.unreserve(address, GRANULE_BYTES)
            driver.destroy(pages)
    driver.close()


def test_pages_that_were_not_made_for_it_are_not_shared(driver: CudaDriver) -> None:
    with driver.current():
        handle = driver.create(GRANULE_BYTES)
        with pytest.raises(DriverError, match=r"cuMemExportToShareableHandle.*CUDA_ERROR_NOT_SUPPORTED"):
            driver.export_handle(handle)
        driver.destroy(handle)


def test_a_device_that_cannot_share_says_so(standin: StandIn) -> None:
    standin.configure(descriptors=False)
    CudaDriver().close()
    with pytest.raises(DeviceError, match="GPU 0 cannot be shared"):
        CudaDriver(shareable=True)
    assert standin.num_retained == 0


def test_every_way_out_belongs_to_an_error_that_exists() -> None:
    assert all(hasattr(calls.CUresult, name) for name in cuda_errors._WAYS_OUT)
