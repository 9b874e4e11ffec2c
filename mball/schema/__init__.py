"""The contracts between trace, plan and run: plain data, versioned JSON, no torch."""

from mball.schema.calibration import CalibratedLink, Calibration, LinkSample
from mball.schema.machine import Link, Machine, Tier
from mball.schema.plan import (
    Bundle,
    Extent,
    HostPlan,
    HostTransfer,
    Made,
    Offload,
    Placement,
    Plan,
    PlanStep,
    Prediction,
    Transfer,
)
from mball.schema.trace import Gather, Home, Kind, Lane, LiveRange, Step, Tensor, Trace, Treatment

__all__ = [
    "Bundle",
    "CalibratedLink",
    "Calibration",
    "Extent",
    "Gather",
    "Home",
    "HostPlan",
    "HostTransfer",
    "Kind",
    "Lane",
    "Link",
    "LinkSample",
    "LiveRange",
    "Machine",
    "Made",
    "Offload",
    "Placement",
    "Plan",
    "PlanStep",
    "Prediction",
    "Step",
    "Tensor",
    "Tier",
    "Trace",
    "Transfer",
    "Treatment",
]
