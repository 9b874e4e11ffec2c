"""Headers made at random, and then damaged: the library of the format says what is one and which bits it holds."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from mball.errors import CheckpointError
from mball.storage import CheckpointIndex
from mball.storage.header import SAFETENSORS_NAMES

ITEM_BYTES = {"BOOL": 1, "U8": 1, "I16": 2, "BF16": 2, "F32": 4, "I64": 8, "C64": 8, "F8_E4M3": 1}
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
# What a number, a size or an offset must not be, and what it may be.
ODD = st.sampled_from(
    [
        "-1",
        "-0",
        "0",
        "1",
        "2",
        "7",
        "1.0",
        "1e2",
        "0.5",
        "true",
        "null",
        '"4"',
        "[]",
        "[[1]]",
        "{}",
        "NaN",
        "Infinity",
        "1E400",
        str((1 << 63) - 1),
        str(1 << 63),
        str((1 << 64) - 1),
        str(1 << 64),
        str(1 << 70),
        "9" * 5000,
        '"F32"',
        '"F4"',
        '"F6_E2M3"',
        '"f32"',
        '"\\ud800"',
        '"\\u0000"',
        "[4294967296, 4294967296, 0]",
        "[0, 18446744073709551616]",
        "[2, true]",
        "[-2]",
        "[0, 0]",
        "[0, 8]",
        "[8, 0]",
        "[0, 4, 8]",
        "[" * 200 + "]" * 200,
        '{"a": 1}',
        '{"format": "pt"}',
        '{"format": null}',
        "01",
    ]
)
JSON_PIECES = st.sampled_from(
    [
        b'"',
        b",",
        b":",
        b"{",
        b"}",
        b"[",
        b"]",
        b" ",
        b"\t",
        b"\n",
        b"\0",
        b"\\",
        b"\\ud800",
        b"\\u0000",
        b"\xff",
        b"\xef\xbb\xbf",
        b"-",
        b".",
        b"e",
        b"0",
        b"null",
        b"NaN",
        b'"shape"',
        b'"dtype"',
        b'"data_offsets"',
        b'"__metadata__"',
        b"/*",
        b"\xc2\xa0",
    ]
)


@st.composite
def whole_files(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A header and its data, as the format asks for."""
    names = draw(st.lists(NAMES.filter(lambda name: name != "__metadata__"), max_size=4, unique=True))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        begin = end
        size_bytes = ITEM_BYTES[dtype]
        for size in shape:
            size_bytes *= size
        end += size_bytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    header = {name: header[name] for name in draw(st.permutations(list(header)))}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(NAMES, NAMES, max_size=2))
    return header, draw(st.binary(min_size=end, max_size=end))


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A file with one to three things wrong, or unusual and right."""
    header, data = draw(whole_files())
    text = json.dumps(header, ensure_ascii=draw(st.booleans()))
    spots: list[str] = []
    for facts in header.values():
        spots += [json.dumps(value) for value in facts.values()] + [json.dumps(facts)]
    for _ in range(draw(st.integers(0, 2))):
        if spots:
            text = text.replace(draw(st.sampled_from(spots)), draw(ODD), 1)
    if draw(st.booleans()) and len(header) > 0:
        # A key twice, or one that nobody knows.
        name = draw(st.sampled_from([*header, "other"]))
        twice = json.dumps({name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}})
        text = twice[:-1] + "," + text[1:]
    raw = text.encode(errors="surrogatepass")
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(JSON_PIECES) + raw[at + draw(st.integers(0, 2)) :]
    length = draw(st.sampled_from([len(raw)] * 6 + [len(raw) - 1, len(raw) + 1, 0, 1, 100_000_001, (1 << 64) - 1]))
    data = data[: draw(st.sampled_from([len(data)] * 6 + [len(data) // 2]))] + draw(st.sampled_from([b""] * 6 + [b"x"]))
    return max(length, 0).to_bytes(8, "little") + raw + data


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def found_by_the_library(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    try:
        tensors = deserialize(raw)
    except SafetensorError:
        return None
    return {name: (facts["dtype"], tuple(facts["shape"]), bytes(facts["data"])) for name, facts in tensors}


def found_by_us(path: Path, raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    path.write_bytes(raw)
    try:
        index = CheckpointIndex.open(path)
    except CheckpointError as error:
        said = str(error)
        index = None
    if index is None:
        assert str(path) in said
        assert len(said) < 3000
        return None
    return {
        name: (
            SAFETENSORS_NAMES[entry.dtype],
            entry.shape,
            raw[entry.offset_bytes : entry.offset_bytes + entry.size_bytes],
        )
        for name, entry in index.entries.items()
    }


def check_damaged(path: Path, raw: bytes) -> None:
    """What we take the library takes, and reads the same: what it refuses we refuse."""
    ours = found_by_us(path, raw)
    if ours is not None:
        assert ours == found_by_the_library(raw)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=whole_files())
def test_what_the_format_allows_is_read_as_the_library_does(folder: Path, made: tuple[dict[str, Any], bytes]) -> None:
    text = json.dumps(made[0]).encode()
    raw = len(text).to_bytes(8, "little") + text + made[1]
    ours = found_by_us(folder / "whole.safetensors", raw)
    assert ours is not None
    assert ours == found_by_the_library(raw)


@settings(max_examples=600)
@given(raw=damaged_files())
def test_damaged_headers(folder: Path, raw: bytes) -> None:
    check_damaged(folder / "damaged.safetensors", raw)


@pytest.mark.slow
@settings(max_examples=20_000)
@given(raw=damaged_files())
def test_damaged_headers_at_length(folder: Path, raw: bytes) -> None:
    check_damaged(folder / "damaged.safetensors", raw)


@pytest.mark.slow
@settings(max_examples=20_000)
@given(raw=st.binary(max_size=64), header=st.binary(max_size=64))
def test_random_bytes(folder: Path, raw: bytes, header: bytes) -> None:
    check_damaged(folder / "random.safetensors", len(header).to_bytes(8, "little") + header + raw)
