"""The contracts between trace, plan and run: plain data, versioned JSON, no torch."""

from mball.schema.machine import Link, Machine
from mball.schema.plan import Bundle, Extent, Placement, Plan, PlanStep, Prediction, Transfer
from mball.schema.trace import Activation, LiveRange, Step, Trace, Weight

__all__ = [
    "Activation",
    "Bundle",
    "Extent",
    "Link",
    "LiveRange",
    "Machine",
    "Placement",
    "Plan",
    "PlanStep",
    "Prediction",
    "Step",
    "Trace",
    "Transfer",
    "Weight",
]
