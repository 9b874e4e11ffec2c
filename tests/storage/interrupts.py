"""Ctrl-C wherever it can strike in `mball/storage`, one place after the other.

Python looks for signals where a function begins and where a call is over. A profiler is asked at the same places, so it
strikes there in a signal's stead; between two statements without a call no signal ever does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import mball.storage

_STORAGE = str(Path(mball.storage.__file__).parent)


def interrupted_at_each_call(scene: Callable[[], object], afresh: Callable[[], object]) -> Iterator[int]:
    """Runs `afresh` and then `scene` again and again, each time interrupted one place later; yields after each.

    Only this thread is interrupted. Ends when the scene ran through.
    """
    number = 0
    while True:
        afresh()
        if not _interrupted(scene, number):
            assert number > 10, "hardly anything was run"
            return
        yield number
        number += 1


def _interrupted(scene: Callable[[], object], number: int) -> bool:
    left = number

    def strike(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        if event in ("call", "return", "c_return") and frame.f_code.co_filename.startswith(_STORAGE):
            left -= 1
            if left == -1:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(strike)
    try:
        scene()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    return left < 0  # also where it was swallowed
