"""Where homes come from: the checkpoint itself, or a swap file that the model's own weights are written to."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch

from mball.errors import WrapError
from mball.memory.mapping import PrivateMapping
from mball.run.census import Census, OwnedWeight, span_bytes
from mball.run.homes import Home, HomeFile, Homes
from mball.storage import SwapFile, TensorEntry, Write
from mball.units import PAGE_BYTES, format_bytes, round_down, round_up

logger = logging.getLogger(__name__)

# Where vector instructions like their operands to begin.
WEIGHT_ALIGNMENT_BYTES = 64
_ZEROS = bytes(PAGE_BYTES)


def write_homes(weights: Sequence[OwnedWeight], swap: SwapFile) -> tuple[HomeFile, list[Home]]:
    """Writes weights to the swap file, after what is there; returns the part of it that is mapped, and the homes.

    Raises:
        WrapError: a weight is on the meta device, so there are no bytes to write.
        StorageError: the swap file cannot take them; it is then as it was.
    """
    _refuse_meta(weights)
    offsets, end = [], 0
    for weight in weights:
        offsets.append(end)
        end = round_up(end + span_bytes(weight.parameter), WEIGHT_ALIGNMENT_BYTES)
    # Whole pages, and what lies between weights is written too: long runs of whole pages are written fastest.
    end = round_up(end, PAGE_BYTES)
    start = swap.allocate(end)
    try:
        placed, writes = [], []
        for weight, offset, next_offset in zip(weights, offsets, [*offsets[1:], end], strict=True):
            data = weight.parameter.detach()
            flat = data.as_strided((span_bytes(data) // data.element_size(),), (1,))
            content = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type] # numpy says so from Python 3.12 on
            writes.append(Write(offset_bytes=start + offset, source=content))
            if padding := next_offset - offset - len(content):
                source = memoryview(_ZEROS)[:padding]
                writes.append(Write(offset_bytes=start + offset + len(content), source=source))
            placed.append((weight.name, start + offset, data))
        swap.write_all(writes)
        swap.flush()
        return map_homes(swap.name, swap.fd, swap, placed)
    except BaseException:
        if end:
            swap.free(start)
            swap.trim()
        raise


def map_checkpoint(census: Census, entries: Sequence[TensorEntry], swap: SwapFile) -> Homes:
    """Returns homes that are the checkpoint itself, in place.

    Args:
        census: the weights.
        entries: where each of them is in the checkpoint.
        swap: takes the pages that are written.
    """
    by_file: dict[str, list[int]] = {}
    for number, entry in enumerate(entries):
        by_file.setdefault(entry.file, []).append(number)
    home_files, homes = [], dict[int, Home]()
    for path, numbers in by_file.items():
        placed = []
        for number in numbers:
            like = torch.empty(entries[number].shape, dtype=getattr(torch, entries[number].dtype), device="meta")
            placed.append((census.weights[number].name, entries[number].offset_bytes, like))
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            home_file, mapped = map_homes(path, descriptor, swap, placed)
        finally:
            os.close(descriptor)
        home_files.append(home_file)
        homes.update(zip(numbers, mapped, strict=True))
    return Homes([homes[number] for number in range(len(entries))], home_files, swap)


def _refuse_meta(weights: Sequence[OwnedWeight]) -> None:
    on_meta = [weight.name for weight in weights if weight.parameter.is_meta]
    if on_meta:
        raise WrapError(
            f"{len(on_meta)} weights are on the meta device ({on_meta[0]!r} first) and no checkpoint was given: "
            "pass weights=<safetensors file or directory>"
        )


def map_homes(
    file: str,
    descriptor: int,
    swap: SwapFile,
    placed: Sequence[tuple[str, int, torch.Tensor]],
) -> tuple[HomeFile, list[Home]]:
    """Maps the part of a file that holds weights.

    Args:
        file: the file's name in plans.
        descriptor: open for reading; may be closed afterwards.
        swap: takes written pages.
        placed: for each weight its name, its offset in the file in bytes, and a tensor (on any device, meta
            too) with its dtype, shape and strides.
    """
    first = round_down(min(offset for _, offset, _ in placed), PAGE_BYTES)
    end = max(offset + span_bytes(like) for _, offset, like in placed)
    mapping = PrivateMapping(descriptor, first, round_up(end - first, PAGE_BYTES))
    homes = []
    for name, offset, like in placed:
        span = span_bytes(like)
        flat = mapping.tensor(offset - first, like.dtype, (span // like.element_size(),))
        tensor = flat.as_strided(like.shape, like.stride())
        homes.append(Home(name=name, tensor=tensor, file=file, offset_bytes=offset, span_bytes=span))
    logger.debug("mapped %s of %s as homes", format_bytes(end - first), file)
    return HomeFile(file, mapping, first, swap, is_swap=file == swap.name), homes
