"""Homes: every write is seen, no write is lost, nothing else is taken for a write."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mball.errors import DeviceError
from mball.memory import PrivateMapping, pagemap, scan_written
from mball.units import GIB, MIB
from tests.memory.residency import is_mapped, resident_bytes

PAGE = 4096
NUM_PAGES = 96
SIZE = NUM_PAGES * PAGE


def data(size: int, seed: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("homes") / "weights"
    path.write_bytes(data(SIZE, 1))
    return path


@pytest.fixture(scope="module")
def swap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("homes") / "swap"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture(params=["scan", "read"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to read the page map; a number that is no ioctl makes the kernel say ENOTTY, as before Linux 6.7."""
    if request.param == "read":
        monkeypatch.setattr(pagemap, "_SCAN", 0x5401F0)
    return str(request.param)


def map_file(path: Path, offset: int = 0, size: int | None = None) -> PrivateMapping:
    fd = os.open(path, os.O_RDONLY)
    try:
        return PrivateMapping(fd, offset, os.path.getsize(path) - offset if size is None else size)
    finally:
        os.close(fd)


def pages(ranges: list[tuple[int, int]]) -> set[int]:
    assert ranges == sorted(ranges)
    assert all(one[1] < two[0] for one, two in itertools.pairwise(ranges)), "ranges must be apart"
    return {page for first, end in ranges for page in range(first // PAGE, end // PAGE)}


def contents(mapping: PrivateMapping, size: int = SIZE) -> bytes:
    return mapping.tensor(0, torch.uint8, (size,)).numpy().tobytes()


def fused(optimizer: type[torch.optim.AdamW] | type[torch.optim.SGD]) -> Callable[[torch.nn.Parameter], None]:
    def step(parameter: torch.nn.Parameter) -> None:
        parameter.grad = torch.ones_like(parameter)
        optimizer([parameter], lr=0.1, fused=True).step()

    return step


def numpy_write(parameter: torch.nn.Parameter) -> None:
    parameter.detach().numpy()[...] = 3


def copy_(parameter: torch.nn.Parameter) -> None:
    with torch.no_grad():
        parameter.copy_(torch.zeros_like(parameter))


def load_state_dict(parameter: torch.nn.Parameter) -> None:
    module = torch.nn.Module()
    module.weight = parameter
    module.load_state_dict({"weight": torch.full_like(parameter, 2.0)})


def data_add_(parameter: torch.nn.Parameter) -> None:
    parameter.data.add_(1)


def data_copy_(parameter: torch.nn.Parameter) -> None:
    parameter.data.copy_(torch.ones_like(parameter))


WRITERS: dict[str, Callable[[torch.nn.Parameter], None]] = {
    "copy_": copy_,
    "data.add_": data_add_,
    "data.copy_": data_copy_,
    "numpy": numpy_write,
    "load_state_dict": load_state_dict,
    "fused AdamW": fused(torch.optim.AdamW),
    "fused SGD": fused(torch.optim.SGD),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS.keys())
def test_every_writer_is_seen_exactly_where_it_writes(
    writer: Callable[[torch.nn.Parameter], None], way: str, file: Path
) -> None:
    mapping = map_file(file)
    contents(mapping)
    parameter = torch.nn.Parameter(mapping.tensor(5 * PAGE + 16, torch.float32, (2 * PAGE // 4,)))
    parameter.detach().sum()
    assert mapping.written() == []
    writer(parameter)
    assert mapping.written() == [(5 * PAGE, 8 * PAGE)]
    assert file.read_bytes() == data(SIZE, 1), "the file was changed"


def test_reading_writes_nothing_and_can_be_given_back(way: str, file: Path) -> None:
    mapping = map_file(file)
    assert (mapping.written(), mapping.touched_bytes()) == ([], 0)
    assert contents(mapping) == data(SIZE, 1)
    assert (mapping.written(), mapping.touched_bytes()) == ([], SIZE)
    assert resident_bytes(mapping.address, SIZE) == SIZE
    assert mapping.drop_clean() == SIZE
    assert (mapping.touched_bytes(), resident_bytes(mapping.address, SIZE)) == (0, 0)
    assert contents(mapping) == data(SIZE, 1)


def test_holes_read_as_zero_and_are_not_written(way: str, tmp_path: Path) -> None:
    path = tmp_path / "hole"
    path.touch()
    os.truncate(path, SIZE)
    mapping = map_file(path)
    assert contents(mapping) == bytes(SIZE)
    assert mapping.written() == []
    mapping.tensor(PAGE, torch.uint8, (1,)).zero_()  # the same value is a write too
    assert mapping.written() == [(PAGE, 2 * PAGE)]


writes = st.lists(
    st.tuples(st.integers(0, SIZE - 1), st.integers(1, 3 * PAGE), st.sampled_from(["torch", "data", "numpy"])),
    max_size=6,
)
page_ranges = st.tuples(st.integers(0, NUM_PAGES), st.integers(0, NUM_PAGES)).map(lambda pair: (min(pair), max(pair)))
actions = st.lists(
    st.one_of(
        st.tuples(st.just("write"), writes),
        st.tuples(st.just("read"), page_ranges),
        st.tuples(st.just("drop_clean"), st.none()),
        st.tuples(st.just("drop_written"), page_ranges),
        st.tuples(st.just("settle"), st.none()),
    ),
    min_size=1,
    max_size=12,
)


@given(actions, st.booleans())
@settings(max_examples=120, deadline=None)
def test_written_is_exactly_what_was_written_and_no_write_is_lost(
    file: Path, swap: Path, todo: list[tuple[str, object]], use_scan: bool
) -> None:
    """A model in plain bytes: what the file (or swap) behind each page holds, and what the mapping shows."""
    with pytest.MonkeyPatch.context() as patch:
        if not use_scan:
            patch.setattr(pagemap, "_SCAN", 0x5401F0)
        mapping = map_file(file)
        tensor = mapping.tensor(0, torch.uint8, (SIZE,))
        behind, shown, dirty = bytearray(data(SIZE, 1)), bytearray(data(SIZE, 1)), set[int]()
        swap_fd = os.open(swap, os.O_RDWR)
        value = 0
        for action, argument in todo:
            if action == "write":
                for offset, size, writer in argument:  # type: ignore[attr-defined]
                    value = (value + 1) % 256
                    end = min(offset + size, SIZE)
                    if writer == "torch":
                        tensor[offset:end] = value
                    elif writer == "data":
                        tensor[offset:end].data.fill_(value)
                    else:
                        tensor.numpy()[offset:end] = value
                    shown[offset:end] = bytes([value]) * (end - offset)
                    dirty |= set(range(offset // PAGE, (end - 1) // PAGE + 1))
            elif action == "read":
                first, end = argument  # type: ignore[misc]
                assert tensor[first * PAGE : end * PAGE].numpy().tobytes() == shown[first * PAGE : end * PAGE]
                assert mapping.touched_bytes() >= (end - first - len(dirty & set(range(first, end)))) * PAGE
            elif action == "drop_clean":
                mapping.drop_clean()
                assert mapping.touched_bytes() == 0
            elif action == "drop_written":
                first, end = argument  # type: ignore[misc]
                mapping.drop_written(first * PAGE, end * PAGE)
                dirty -= set(range(first, end))
                shown[first * PAGE : end * PAGE] = behind[first * PAGE : end * PAGE]
            else:
                for first, end in mapping.written():
                    assert os.pwrite(swap_fd, shown[first:end], first) == end - first
                    # Twice the same bytes: the file it replaces must be the one that counts afterwards.
                    mapping.replace(first, end, swap_fd, first)
                    behind[first:end] = shown[first:end]
                dirty.clear()
                assert resident_bytes(mapping.address, SIZE, "Anonymous") == 0
            assert pages(mapping.written()) == dirty, action
        assert tensor.numpy().tobytes() == shown
        os.close(swap_fd)


def test_replaced_pages_are_the_other_files(file: Path, swap: Path) -> None:
    mapping = map_file(file)
    tensor = mapping.tensor(0, torch.uint8, (SIZE,))
    tensor[3 * PAGE : 5 * PAGE] = 9
    other = data(2 * PAGE, 2)
    fd = os.open(swap, os.O_RDWR)
    os.pwrite(fd, other, 7 * PAGE)
    mapping.replace(3 * PAGE, 5 * PAGE, fd, 7 * PAGE)
    os.close(fd)
    assert mapping.written() == []
    assert resident_bytes(mapping.address, SIZE, "Anonymous") == 0
    original = data(SIZE, 1)
    assert tensor.numpy().tobytes() == original[: 3 * PAGE] + other + original[5 * PAGE :]
    tensor[4 * PAGE] = 1
    assert mapping.written() == [(4 * PAGE, 5 * PAGE)]
    assert swap.read_bytes()[7 * PAGE : 9 * PAGE] == other


def test_pages_saved_in_place_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "swap"
    path.write_bytes(data(SIZE, 3))
    mapping = map_file(path)
    tensor = mapping.tensor(0, torch.uint8, (SIZE,))
    tensor[:PAGE] = 4
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, bytes([4]) * PAGE, 0)
    os.close(fd)
    mapping.drop_written(0, PAGE)
    assert mapping.written() == []
    assert tensor[:PAGE].eq(4).all()


def test_more_ranges_than_one_scan_returns(way: str, tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.touch()
    size = 48 * MIB
    os.truncate(path, size)
    mapping = map_file(path)
    tensor = mapping.tensor(0, torch.uint8, (size,))
    tensor[::PAGE].sum()
    tensor[:: 2 * PAGE] = 1  # 6144 ranges
    found = mapping.written()
    assert found == [(first, first + PAGE) for first in range(0, size, 2 * PAGE)]
    assert mapping.drop_clean() <= size // 2
    assert mapping.written() == found


def test_ranges_do_not_end_where_a_piece_of_the_page_map_ends(
    way: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagemap, "_READ_PAGES", 8)
    monkeypatch.setattr(pagemap, "_NUM_REGIONS", 1)
    mapping = map_file(file)
    tensor = mapping.tensor(0, torch.uint8, (SIZE,))
    for first, end in ((3, 40), (48, 56), (57, 58), (90, 96)):
        tensor[first * PAGE : end * PAGE] = 1
    expected = [(3, 40), (48, 56), (57, 58), (90, 96)]
    assert mapping.written() == [(first * PAGE, end * PAGE) for first, end in expected]


def test_a_mapping_may_be_larger_than_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, 512 * GIB)
    mapping = map_file(path)
    mapping.tensor(300 * GIB, torch.uint8, (1,)).fill_(1)
    assert mapping.written() == [(300 * GIB, 300 * GIB + PAGE)]


def test_scanning_many_mappings_at_once(way: str, file: Path) -> None:
    mappings = [map_file(file, page * PAGE, PAGE * 3) for page in range(20)]
    for number, mapping in enumerate(mappings):
        if number % 3 == 0:
            mapping.tensor(PAGE, torch.uint8, (1,)).fill_(1)
    expected = [[(PAGE, 2 * PAGE)] if number % 3 == 0 else [] for number in range(20)]
    assert scan_written(mappings) == expected
    assert scan_written([]) == []


def test_a_part_of_a_file_with_a_ragged_end(tmp_path: Path) -> None:
    path = tmp_path / "ragged"
    path.write_bytes(data(2 * PAGE + 100, 5))
    mapping = map_file(path, PAGE, PAGE + 100)
    assert contents(mapping, PAGE + 100) == data(2 * PAGE + 100, 5)[PAGE:]
    mapping.tensor(PAGE + 99, torch.uint8, (1,)).fill_(1)
    assert mapping.written() == [(PAGE, 2 * PAGE)]
    whole = map_file(path, 0, 3 * PAGE)
    assert whole.tensor(2 * PAGE + 100, torch.uint8, (PAGE - 100,)).eq(0).all()


def test_bad_ranges_are_refused_with_numbers(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    for offset, size in ((1, PAGE), (0, 0), (-PAGE, PAGE), (0, SIZE + 1), (SIZE, PAGE)):
        with pytest.raises(DeviceError, match=rf"{offset + size}\)|{size} bytes at offset {offset}"):
            PrivateMapping(fd, offset, size)
    mapping = PrivateMapping(fd, 0, SIZE)
    tensor = mapping.tensor(0, torch.uint8, (SIZE,))
    tensor[0] = 1
    shown = contents(mapping)
    with pytest.raises(DeviceError, match="truncated"):
        mapping.replace(0, 2 * PAGE, fd, SIZE - PAGE)
    for first, end in ((1, PAGE), (0, PAGE + 1), (-PAGE, 0), (0, SIZE + PAGE), (2 * PAGE, PAGE)):
        with pytest.raises(DeviceError, match="whole pages"):
            mapping.replace(first, end, fd, 0)
        with pytest.raises(DeviceError, match="whole pages"):
            mapping.drop_written(first, end)
    with pytest.raises(DeviceError, match="outside"):
        mapping.tensor(SIZE - 4, torch.float32, (2,))
    os.close(fd)
    with pytest.raises(DeviceError, match="errno 9"):
        PrivateMapping(fd, 0, PAGE)
    assert contents(mapping) == shown


def test_tensors_keep_the_mapping_and_nothing_else_does(file: Path) -> None:
    mapping = map_file(file)
    address = mapping.address
    view = mapping.tensor(PAGE, torch.uint8, (PAGE,)).numpy()[7:]
    mapping.close()
    mapping.close()
    with pytest.raises(DeviceError, match="closed"):
        mapping.written()
    with pytest.raises(DeviceError, match="closed"):
        mapping.tensor(0, torch.uint8, (1,))
    del mapping
    gc.collect()
    assert view.tobytes() == data(SIZE, 1)[PAGE + 7 : 2 * PAGE]
    del view
    assert not is_mapped(address)


def test_a_file_replaced_by_rename_stays_readable(tmp_path: Path) -> None:
    path, new = tmp_path / "weights", tmp_path / "new"
    path.write_bytes(data(SIZE, 1))
    mapping = map_file(path)
    new.write_bytes(bytes(SIZE))
    new.rename(path)
    assert contents(mapping) == data(SIZE, 1)


def test_a_forked_child_sees_its_own_writes(file: Path) -> None:
    mapping = map_file(file)
    tensor = mapping.tensor(0, torch.uint8, (SIZE,)).numpy()
    tensor[0] = 1
    child = os.fork()
    if child == 0:
        tensor[9 * PAGE] = 1
        os._exit(0 if mapping.written() == [(0, PAGE), (9 * PAGE, 10 * PAGE)] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert mapping.written() == [(0, PAGE)]


def test_a_page_map_that_cannot_be_read_is_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagemap, "_PATH", "/proc/self/no-such-file")
    with pytest.raises(DeviceError, match=r"mball\.touch"):
        map_file(file).written()


def read_from_disk_bytes() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


@pytest.mark.parametrize("is_prefetched", [False, True])
def test_pages_that_are_asked_for_come_and_their_neighbours_do_not(is_prefetched: bool, tmp_path: Path) -> None:
    size = 64 * MIB
    path = tmp_path / "weights"
    path.write_bytes(content := data(size, 2))
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    mapping = map_file(path)
    values = mapping.tensor(0, torch.uint8, (size,))
    pages = range(0, size // PAGE, 100)
    mapping.read_sparsely(0, size)
    before = read_from_disk_bytes()
    if is_prefetched:
        mapping.prefetch([(page * PAGE, (page + 1) * PAGE) for page in pages])
    for page in pages:
        assert bytes(values[page * PAGE : page * PAGE + 9].tolist()) == content[page * PAGE : page * PAGE + 9]
    # Readahead would bring 32 pages for each.
    assert read_from_disk_bytes() - before <= 2 * len(pages) * PAGE
    mapping.read_as_usual(0, size)
    assert values[::PAGE].tolist() == list(content[::PAGE])


def test_pages_of_a_range_alone_are_given_back(file: Path) -> None:
    mapping = map_file(file)
    values = mapping.tensor(0, torch.uint8, (SIZE,))
    values.sum()
    values[9 * PAGE] += 1
    expected = values.clone()
    assert mapping.drop_clean(8 * PAGE, 16 * PAGE) == 7 * PAGE
    assert mapping.touched_bytes() == SIZE - 8 * PAGE
    assert mapping.written() == [(9 * PAGE, 10 * PAGE)]
    assert torch.equal(values, expected)
    with pytest.raises(DeviceError, match="whole pages"):
        mapping.drop_clean(8 * PAGE, SIZE + PAGE)


def test_populated_pages_are_there(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(data(SIZE, 5))
    descriptor = os.open(path, os.O_RDONLY)
    mapping = PrivateMapping(descriptor, 0, SIZE)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    mapping.populate(0, 8 * PAGE)
    assert mapping.touched_bytes() >= 8 * PAGE
    assert not mapping.written()
    os.truncate(path, PAGE)
    os.close(descriptor)
    with pytest.raises(DeviceError, match=rf"bytes \[{2 * PAGE}, {3 * PAGE}\) .* cannot be read: Bad address"):
        mapping.populate(2 * PAGE, 3 * PAGE)
    with pytest.raises(DeviceError, match="no whole pages"):
        mapping.populate(1, PAGE)
