"""safetensors files and shards through `mball.load_file` and `mball.open`: the library's own answers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mball
from mball.errors import CheckpointError, ConfigError, DeviceError, StorageError
from mball.load import safetensors_source
from mball.memory.facts import process_memory
from mball.storage import ReaderChoice, ThreadedReader
from mball.units import MIB
from tests.load.checkpoints import assert_same, save_misaligned, save_shards, tensors_of_many_kinds

COPIES = (None, True, False)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("load") / "model.safetensors"
    save_file(tensors_of_many_kinds(), path, metadata={"format": "pt", "made": "here"})
    return path


def forget(path: Path) -> None:
    """Drops a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def anonymous_bytes() -> int:
    return process_memory(shares=False).anonymous_bytes


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("cold", [True, False])
def test_one_file(file: Path, copy: bool | None, cold: bool) -> None:
    if cold:
        forget(file)
    found = mball.load_file(file, copy=copy)
    assert_same(found, tensors_of_many_kinds())
    assert all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in found.values())
    assert list(found) == list(load_file(file))


@pytest.mark.parametrize("copy", COPIES)
def test_shards(tmp_path: Path, copy: bool | None) -> None:
    tensors = tensors_of_many_kinds()
    directory = save_shards(tmp_path / "model", tensors)
    for path in (directory, directory / "model.safetensors.index.json"):
        assert_same(mball.load_file(path, copy=copy), tensors)


@pytest.mark.parametrize("copy", COPIES)
def test_small_pieces(tmp_path: Path, copy: bool | None, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """Tensors that go over the ends of pieces, and more pieces than are in flight."""
    for function in (safetensors_source.OwnMemory.reads, safetensors_source.MappedMemory.fill):
        monkeypatch.setattr(function, "__defaults__", (65536,))
    assert_same(mball.load_file(file, copy=copy, in_flight_bytes=1), tensors_of_many_kinds())


@pytest.mark.parametrize("copy", COPIES)
def test_tensors_at_odd_places_are_aligned(tmp_path: Path, copy: bool | None) -> None:
    path = tmp_path / "odd.safetensors"
    expected = save_misaligned(path)
    found = mball.load_file(path, copy=copy)
    assert_same(found, expected)
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in found.values())


def test_a_file_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "none.safetensors")
    assert mball.load_file(tmp_path / "none.safetensors") == {}
    save_file({"a": torch.empty(3, 0)}, tmp_path / "empty.safetensors")
    assert mball.load_file(tmp_path / "empty.safetensors")["a"].shape == (3, 0)


def test_the_librarys_call_shapes(file: Path) -> None:
    with (
        safe_open(file, framework="pt", device="cpu") as theirs,
        mball.open(file, framework="pt", device="cpu") as ours,
    ):
        assert ours.keys() == theirs.keys()
        assert ours.offset_keys() == theirs.offset_keys()
        assert ours.metadata() == theirs.metadata() == {"format": "pt", "made": "here"}
        for name in theirs.keys():  # noqa: SIM118 - safe_open is no mapping
            assert_same({name: ours.get_tensor(name)}, {name: theirs.get_tensor(name)})
            part, like = ours.get_slice(name), theirs.get_slice(name)
            assert part.get_shape() == like.get_shape()
            assert part.get_dtype() == like.get_dtype()
        for index in ((slice(2, 5),), (slice(None), slice(3, 9, 2)), (4,), (..., 7), (slice(30, None), 64)):
            assert torch.equal(ours.get_slice("matrix")[index], theirs.get_slice("matrix")[index])
        assert ours.get_slice("empty")[:, 1:].shape == (0, 3)
        names = ["scalar", "t.2"]
        assert_same(ours.get_tensors(names), {name: theirs.get_tensor(name) for name in names})


def test_a_slice_holds_no_more_than_itself(file: Path) -> None:
    with mball.open(file) as checkpoint:
        part = checkpoint.get_slice("large")[100:200]
    assert part.untyped_storage().nbytes() == 100
    assert torch.equal(part, tensors_of_many_kinds()["large"][100:200])


@pytest.mark.parametrize("copy", COPIES)
def test_each_tensor_has_a_storage_of_its_own(tmp_path: Path, file: Path, copy: bool | None) -> None:
    """So that saving one does not save the file, and safetensors does not take them for tied."""
    found = mball.load_file(file, copy=copy)
    assert found["matrix"].untyped_storage().nbytes() == found["matrix"].nbytes
    save_file(found, tmp_path / "again.safetensors")
    assert_same(mball.load_file(tmp_path / "again.safetensors", copy=copy), tensors_of_many_kinds())


@pytest.mark.parametrize("copy", COPIES)
def test_writing_to_a_tensor_changes_no_file(tmp_path: Path, copy: bool | None) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(5000)}, path)
    before = path.read_bytes()
    mball.load_file(path, copy=copy)["a"].zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("cached", [True, False])
def test_what_is_cached_is_mapped_and_the_rest_copied(
    tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(16 * MIB, dtype=torch.uint8)}, path)
    monkeypatch.setattr(safetensors_source, "is_cached", lambda *_: cached)
    taken = {}
    for copy in COPIES:
        before = anonymous_bytes()
        kept = mball.load_file(path, copy=copy)
        taken[copy] = round((anonymous_bytes() - before) / (16 * MIB))
        del kept
    assert taken == {None: int(not cached), True: 1, False: 0}


def test_a_dropped_tensor_gives_its_pages_back(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.full((8 * MIB,), 7, dtype=torch.uint8) for name in "abcd"}, path)
    before = anonymous_bytes()
    found = mball.load_file(path, copy=True)
    kept = found["b"][5:]
    del found
    assert 7 * MIB < anonymous_bytes() - before < 12 * MIB
    assert int(kept.min()) == int(kept.max()) == 7
    del kept
    assert anonymous_bytes() - before < 4 * MIB


def test_tensors_outlive_the_checkpoint(file: Path) -> None:
    with mball.open(file, copy=True) as checkpoint:
        tensor = checkpoint.get_tensor("matrix")
    assert torch.equal(tensor, tensors_of_many_kinds()["matrix"])
    with pytest.raises(CheckpointError, match=r"model\.safetensors was closed; open it again"):
        checkpoint.keys()
    checkpoint.close()


def test_under_inference_mode(file: Path) -> None:
    with torch.inference_mode():
        found = {copy: mball.load_file(file, copy=copy)["matrix"] for copy in COPIES}
    for tensor in found.values():
        assert not tensor.is_inference()
        tensor.add_(1)


def test_unknown_names_and_settings(file: Path) -> None:
    with mball.open(file) as checkpoint:
        for ask in (checkpoint.get_tensor, checkpoint.get_slice):
            with pytest.raises(CheckpointError, match=r"has no tensor 'nothing'; it has 11: .* \+ 8 more"):
                ask("nothing")
        with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
            checkpoint.get_tensors(["matrix", "nothing"])
    with pytest.raises(ConfigError, match="framework is 'tf'"):
        mball.open(file, framework="tf")
    with pytest.raises(ConfigError, match="device is 'nowhere'"):
        mball.open(file, device="nowhere")
    with pytest.raises(ConfigError, match="in_flight_bytes 'much' cannot be read"):
        mball.load_file(file, in_flight_bytes="much")


@pytest.mark.parametrize("copy", COPIES)
def test_progress_to_a_function(file: Path, copy: bool | None) -> None:
    told: list[tuple[int, int]] = []
    mball.load_file(file, copy=copy, progress=lambda done, total: told.append((done, total)))
    total_bytes = sum(tensor.nbytes for tensor in tensors_of_many_kinds().values())
    assert told[-1] == (total_bytes, total_bytes)
    assert told == sorted(told)


def test_progress_as_a_bar(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mball.load_file(file, progress=True)
    assert "model.safetensors" in capfd.readouterr().err


def test_no_descriptor_and_no_thread_is_left(file: Path) -> None:
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    kept = [mball.load_file(file, copy=copy) for copy in COPIES]
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    del kept


class Strike:
    """Interrupts at the nth call, as Ctrl-C in the main thread does."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.ones(8 * MIB, dtype=torch.uint8) for name in "abcd"}, path)
    monkeypatch.setattr(safetensors_source.OwnMemory.reads, "__defaults__", (MIB,))
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    memory = anonymous_bytes()
    for at in (1, 2, 20):
        with pytest.raises(KeyboardInterrupt):
            mball.load_file(path, copy=True, in_flight_bytes=4 * MIB, progress=Strike(at))
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
        assert anonymous_bytes() - memory < 4 * MIB


def test_no_more_is_in_flight_than_allowed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next piece is submitted only when those before it leave room."""
    monkeypatch.setattr(safetensors_source.OwnMemory.reads, "__defaults__", (65536,))
    monkeypatch.setattr(safetensors_source, "choose_reader", lambda **_: ReaderChoice())  # threads of Python
    real = ThreadedReader.submit
    open_handles: list[Any] = []
    most = 0

    def submit(reader: Any, reads: Any) -> Any:
        nonlocal most
        open_handles.append(real(reader, reads))
        most = max(most, sum(handle.size_bytes for handle in open_handles if not handle.done()))
        return open_handles[-1]

    monkeypatch.setattr(ThreadedReader, "submit", submit)
    assert_same(mball.load_file(file, copy=True, in_flight_bytes=200_000), tensors_of_many_kinds())
    assert len(open_handles) > 40
    assert most <= 200_000


def test_too_little_memory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is mapped, unless a copy was asked for; nothing is read then."""
    monkeypatch.setattr(safetensors_source, "headroom_bytes", lambda: MIB)
    monkeypatch.setattr(safetensors_source, "is_cached", lambda *_: False)
    monkeypatch.setattr(safetensors_source, "OwnMemory", None)
    assert_same(mball.load_file(file), tensors_of_many_kinds())
    with pytest.raises(DeviceError, match=r"take 3\.01 MiB .* 1\.00 MiB .* are free .* copy=False"):
        mball.load_file(file, copy=True)


def test_what_lies_between_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {name: torch.full((3 * MIB,), at, dtype=torch.uint8) for at, name in enumerate("abcd")}
    save_file(tensors, path)
    read_bytes = 0
    monkeypatch.setattr(safetensors_source, "choose_reader", lambda **_: ReaderChoice())  # threads of Python
    real = ThreadedReader.submit

    def submit(reader: Any, reads: Any) -> Any:
        nonlocal read_bytes
        read_bytes += sum(read.size_bytes for read in reads)
        return real(reader, reads)

    monkeypatch.setattr(ThreadedReader, "submit", submit)
    with mball.open(path, copy=True) as checkpoint:
        assert_same(checkpoint.get_tensors(["d", "a"]), {name: tensors[name] for name in "ad"})
    assert 6 * MIB <= read_bytes < 6 * MIB + 65536


# -- files that change -----------------------------------------------------------------------------------------


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, 12345))


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("change", [_truncate, _rewrite])
def test_a_file_that_changes_while_open(tmp_path: Path, copy: bool | None, change: Callable[[Path], None]) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(MIB)}, path)
    with mball.open(path, copy=copy) as checkpoint:
        change(path)
        for ask in (lambda: checkpoint.get_tensor("a"), lambda: checkpoint.get_slice("a")[:5]):
            with pytest.raises((CheckpointError, StorageError), match=r"model\.safetensors.*(changed|truncated|ends)"):
                ask()


@pytest.mark.parametrize("copy", COPIES)
def test_a_file_that_is_replaced_while_open_is_read_as_it_was(tmp_path: Path, copy: bool | None) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(MIB)}, path)
    with mball.open(path, copy=copy) as checkpoint:
        save_file({"a": torch.zeros(MIB)}, tmp_path / "other")
        os.replace(tmp_path / "other", path)
        assert int(checkpoint.get_tensor("a").sum()) == MIB
        assert int(checkpoint.get_slice("a")[:7].sum()) == 7


@pytest.mark.parametrize("cached", [True, False])
def test_a_file_that_is_cut_short_while_it_is_read(
    tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped or copied, what is missing is an error and no signal."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4 * MIB, dtype=torch.uint8)}, path)
    monkeypatch.setattr(safetensors_source, "is_cached", lambda *_: cached)
    for function in (safetensors_source.OwnMemory.reads, safetensors_source.MappedMemory.fill):
        monkeypatch.setattr(function, "__defaults__", (MIB,))
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was open: size"):
        mball.load_file(path, in_flight_bytes=1, progress=lambda done, total: os.truncate(path, 2 * MIB))


def test_a_file_that_is_written_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4 * MIB, dtype=torch.uint8)}, path)
    monkeypatch.setattr(safetensors_source.OwnMemory.reads, "__defaults__", (MIB,))
    with pytest.raises(CheckpointError, match="modification time"):
        mball.load_file(path, copy=True, in_flight_bytes=1, progress=lambda done, total: _rewrite(path))


# -- other devices ---------------------------------------------------------------------------------------------


def test_another_device(file: Path, foreign: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mball.load.device_copy._BUFFER_BYTES", 65536)
    found = mball.load_file(file, "foreign", in_flight_bytes=200_000)
    assert all(tensor.device.type == "foreign" for tensor in found.values())
    assert_same(found, tensors_of_many_kinds())
    with mball.open(file, device="foreign") as checkpoint:
        large = checkpoint.get_tensors(["large", "t.2", "large"])
        assert_same(large, {name: tensors_of_many_kinds()[name] for name in ("large", "t.2")})
        assert_same({"matrix": checkpoint.get_tensor("matrix")}, {"matrix": tensors_of_many_kinds()["matrix"]})
        assert checkpoint.get_slice("matrix")[3:5].device.type == "foreign"


@pytest.mark.parametrize("cold", [True, False])
def test_what_goes_to_another_device_is_never_whole_in_host_memory(
    tmp_path: Path, foreign: ModuleType, cold: bool
) -> None:
    """It passes through a few buffers; what the device has of it is host memory here, too, and is counted apart."""
    path = tmp_path / "model.safetensors"
    save_file({f"w{number}": torch.full((12 * MIB,), number, dtype=torch.uint8) for number in range(12)}, path)
    if cold:
        forget(path)
    taken: list[int] = []
    before = anonymous_bytes() - foreign.memory_allocated()
    found = mball.load_file(
        path,
        "foreign",
        in_flight_bytes="32MiB",
        progress=lambda done, total: taken.append(anonymous_bytes() - foreign.memory_allocated()),
    )
    assert foreign.memory_allocated() >= 144 * MIB
    assert len(taken) > 4
    # Pages of the device's memory are there once they were written, so at first there are fewer than are counted.
    assert max(taken) - before <= 32 * MIB + 16 * MIB
    assert all(int(tensor[-1]) == int(name[1:]) for name, tensor in found.items())


@pytest.mark.gpu
@pytest.mark.parametrize("cold", [True, False])
def test_a_gpu(tmp_path: Path, cold: bool) -> None:
    """More than the ring of buffers, so that each is used again while copies out of it are under way."""
    generator = torch.Generator().manual_seed(1)
    tensors = {f"w{n}": torch.randn(3_000_017, generator=generator) for n in range(16)} | tensors_of_many_kinds()
    directory = save_shards(tmp_path / "model", tensors)
    for shard in directory.glob("*.safetensors"):
        if cold:
            forget(shard)
    found = mball.load_file(directory, "cuda", in_flight_bytes="32MiB")
    assert all(tensor.is_cuda for tensor in found.values())
    assert_same(found, tensors)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(file: Path) -> None:
    with pytest.raises((ConfigError, DeviceError), match=r"device is 'cuda', and .*torch"):
        mball.load_file(file, device="cuda")
