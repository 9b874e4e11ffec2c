"""mball runs PyTorch models in less device memory than they need.

``model = mball.wrap(model, budget="6GiB")``. The names below are loaded when first used, so that
`mball.plan` and `mball.schema` work where torch is not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mball.api import balloon as balloon
    from mball.api import report as report
    from mball.api import save_trace as save_trace
    from mball.api import set_budget as set_budget
    from mball.api import timeline as timeline
    from mball.api import unwrap as unwrap
    from mball.api import wrap as wrap
    from mball.config import Config as Config
    from mball.decisions import guarded as guarded
    from mball.errors import BudgetError as BudgetError
    from mball.errors import MballError as MballError
    from mball.load import load_file as load_file
    from mball.load import open as open
    from mball.observe.report import Report as Report
    from mball.saving import save_file as save_file
    from mball.torch_private.capture import capturing as capturing

__version__ = "0.1.0"

_HOMES = {
    "wrap": "mball.api",
    "unwrap": "mball.api",
    "balloon": "mball.api",
    "report": "mball.api",
    "save_file": "mball.saving",
    "save_trace": "mball.api",
    "set_budget": "mball.api",
    "timeline": "mball.api",
    "Config": "mball.config",
    "BudgetError": "mball.errors",
    "MballError": "mball.errors",
    "Report": "mball.observe.report",
    "load_file": "mball.load",
    "open": "mball.load",
    "capturing": "mball.torch_private.capture",
    "guarded": "mball.decisions",
}

__all__ = [
    "BudgetError",
    "Config",
    "MballError",
    "Report",
    "balloon",
    "capturing",
    "guarded",
    "load_file",
    "open",
    "report",
    "save_file",
    "save_trace",
    "set_budget",
    "timeline",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mball' has no attribute {name!r}")
