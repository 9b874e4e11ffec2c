"""A process that loads a checkpoint one way, as it is told. Run by `bench.speed.contender`."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.load.loaders import THERE, Way, prepare
from bench.speed.preadv import huge_pages
from bench.speed.protocol import serve

_PAGE_BYTES = 4096


class LoadChild:
    """What the process holds between two lines; each method answers one kind of line."""

    def hello(self, peers: str) -> dict[str, Any]:
        """Makes packages in the folder `peers` importable, behind all that is installed."""
        if peers:
            sys.path.append(peers)
        return {}

    def load(self, way: str, path: str) -> dict[str, Any]:
        """Loads until each page of each tensor is in memory; returns the seconds, those of the processor, and sums.

        Before the clock runs, so much memory is taken and given back: a virtual machine whose host took free memory
        from it gets that back at a fraction of the speed of the disk, and no loader is to blame.
        """
        huge_pages(Path(path).stat().st_size).release()
        action = prepare(Way(way), Path(path))
        began_cpu_s, began_s = _cpu_s(), time.perf_counter()
        tensors, held = action()
        if Way(way) not in THERE:
            for tensor in tensors.values():
                _bytes_of(tensor)[::_PAGE_BYTES].sum()
        load_s, cpu_s = time.perf_counter() - began_s, _cpu_s() - began_cpu_s
        sums = {name: _sum(tensor) for name, tensor in sorted(tensors.items())}
        del tensors, held
        return {"load_s": load_s, "cpu_s": cpu_s, "sums": sums}


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _sum(tensor: torch.Tensor) -> int:
    found = _bytes_of(tensor)
    return int((found if len(found) % 8 else found.view(torch.int64)).sum())


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    serve(LoadChild())
