"""Contenders without processes of their own, which take seconds to start: other tests are of those."""

from __future__ import annotations

import json
from typing import Any, Self

from bench.load.child import LoadChild
from bench.speed.child import Child
from bench.speed.disk_child import DiskChild

_CHILDREN = {"bench.load.child": LoadChild, "bench.speed.child": Child, "bench.speed.disk_child": DiskChild}


class Here:
    """A `Contender` in this process."""

    def __init__(self, name: str, *, module: str = "bench.speed.child") -> None:
        self._child: object = _CHILDREN[module]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def tell(self, do: str, **order: Any) -> dict[str, Any]:
        reply: dict[str, Any] = json.loads(json.dumps(getattr(self._child, do)(**order)))
        return reply
