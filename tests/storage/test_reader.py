"""The threaded reader brings the right bytes, whatever is asked for."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mball.storage import CheckpointIndex, DirectIO, FileTable, Reader, SwapFile
from tests.preads import SetPreadv
from tests.storage.conftest import HeldReads
from tests.storage.reads import FILE_BYTES, MakeReader, aligned, memory, opened, read, with_one
from tests.storage.test_checkpoint import tensors_of_all_dtypes


def test_a_whole_file_past_its_end(files: FileTable, reader: Reader, path: str, content: bytes) -> None:
    destination = memory(aligned(FILE_BYTES))
    handle = reader.submit([read(path, 0, aligned(FILE_BYTES), destination)])
    handle.wait()
    assert handle.done()
    assert handle.size_bytes == FILE_BYTES
    assert bytes(destination[:FILE_BYTES]) == content
    statistics = reader.statistics
    assert statistics.size_bytes == FILE_BYTES
    assert statistics.num_requests == -(-FILE_BYTES // 8192)
    assert statistics.busy_s > 0
    if files.mode is DirectIO.OFF:
        assert reader.path == "buffered (asked for)"
        assert statistics.direct_bytes == 0
    else:
        assert reader.path == "O_DIRECT"
        assert statistics.direct_bytes == FILE_BYTES


def test_a_handle_knows_when_it_began_and_ended(reader: Reader, path: str, held_reads: HeldReads) -> None:
    asked_s = time.perf_counter()
    handle = reader.submit([read(path, 0, FILE_BYTES, memory(FILE_BYTES))])
    assert held_reads.begun.wait(60)
    held_s = time.perf_counter()
    assert handle.began_s is not None
    assert asked_s <= handle.began_s <= held_s
    assert handle.ended_s is None
    freed_s = time.perf_counter()
    held_reads.let_go.set()
    handle.wait()
    assert handle.began_s <= held_s, "each chunk begins it anew"
    assert handle.ended_s is not None
    assert freed_s <= handle.ended_s <= time.perf_counter()
    nothing = reader.submit([])
    assert nothing.done()
    assert nothing.began_s is nothing.ended_s is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    extents=st.lists(
        st.tuples(
            st.integers(0, FILE_BYTES - 1) | st.integers(0, FILE_BYTES // 4096).map(lambda page: page * 4096),
            st.integers(0, 40_000) | st.integers(0, 20).map(lambda pages: pages * 4096),
            st.integers(0, 4096) | st.just(0),
        ),
        max_size=6,
    )
)
def test_any_extents(reader: Reader, path: str, content: bytes, extents: list[tuple[int, int, int]]) -> None:
    reads, buffers = [], []
    for offset, size, lead in extents:
        buffer = memory(lead + size + 64)
        reads.append(read(path, offset, size, buffer[lead : lead + size]))
        buffers.append(buffer)
    reader.submit(reads).wait()
    for (offset, size, lead), buffer in zip(extents, buffers, strict=True):
        expected = content[offset : offset + size]
        assert bytes(buffer[lead : lead + len(expected)]) == expected
        assert set(buffer[:lead]) <= {0xEE}, "bytes before the destination were overwritten"
        assert set(buffer[lead + size :]) == {0xEE}, "bytes after the destination were overwritten"


def test_tensors_of_a_checkpoint(tmp_path: Path, make_reader: MakeReader) -> None:
    many = {f"small.{i}": torch.full((i % 7 + 1,), float(i)) for i in range(500)}
    save_file(tensors_of_all_dtypes() | many, tmp_path / "model.safetensors")
    expected = load_file(tmp_path / "model.safetensors")
    index = CheckpointIndex.open(tmp_path)
    for mode in DirectIO:
        files = FileTable(direct=mode)
        for file in index.files:
            files.add_path(file.path)
        reader = make_reader(files)
        out = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
        reads = [
            read(entry.file, entry.offset_bytes, entry.size_bytes, flat.data)
            for name, entry in index.entries.items()
            if len(flat := out[name].reshape(-1).view(torch.uint8).numpy())
        ]
        reader.submit(reads).wait()
        for name, tensor in expected.items():
            assert (
                torch.equal(out[name].view(torch.uint8), tensor.view(torch.uint8))
                if tensor.dim()
                else (torch.equal(out[name], tensor))
            )
        reader.close()
        files.close()


def test_a_swap_file_that_grows(tmp_path: Path, make_reader: MakeReader) -> None:
    files = opened()
    with SwapFile.create(tmp_path) as swap:
        files.add_swap(swap)
        reader = make_reader(files)
        for round_ in range(3):
            offset = swap.allocate(10_000)
            swap.write(offset, bytes([round_]) * 10_000)
            destination = memory(12_288)
            reader.submit([read(swap.name, offset, 12_288, destination)]).wait()
            assert bytes(destination[:10_000]) == bytes([round_]) * 10_000
        assert reader.path == "O_DIRECT"
    # The table has its own descriptor.
    reader.submit([read(swap.name, 0, 12_288, memory(12_288))]).wait()
    reader.close()
    files.close()


def test_many_submits_in_flight(reader: Reader, path: str, content: bytes) -> None:
    destination = memory(aligned(FILE_BYTES))
    handles = [
        reader.submit([read(path, page * 4096, 4096, destination[page * 4096 : (page + 1) * 4096])])
        for page in range(aligned(FILE_BYTES) // 4096)
    ]
    for handle in reversed(handles):
        handle.wait()
    assert bytes(destination[:FILE_BYTES]) == content
    reader.submit([]).wait()


def test_requests_begin_in_order(path: str, set_preadv: SetPreadv, make_reader: MakeReader) -> None:
    begun = []
    real = os.preadv

    def note(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        begun.append(offset)
        return real(descriptor, buffers, offset)

    set_preadv(note)
    with_one(
        path,
        make_reader,
        lambda reader: [reader.submit([read(path, o, 4096, memory(4096))]) for o in range(0, 65536, 4096)],
    )
    assert begun == list(range(0, 65536, 4096))
