"""Plans memory: pure functions from a `Trace`, a `Machine` and a budget to a `Plan`. No torch, no clock."""

from mball.plan.bundles import lay_out_bundle
from mball.plan.chain import simulate
from mball.plan.curve import UtilityPoint, host_utility_curve, utility_curve
from mball.plan.explain import BelowDevice, Explanation, MemoryUse, Stall, explain
from mball.plan.planner import make_plan
from mball.plan.simulate import HostSimulation, Simulation, StepTiming, TransferTiming, written_bytes
from mball.plan.smallest import SmallestBudget, smallest_budget
from mball.plan.smallest_host import SmallestHostBudget, smallest_host_budget
from mball.plan.validate import validate

__all__ = [
    "BelowDevice",
    "Explanation",
    "HostSimulation",
    "MemoryUse",
    "Simulation",
    "SmallestBudget",
    "SmallestHostBudget",
    "Stall",
    "StepTiming",
    "TransferTiming",
    "UtilityPoint",
    "explain",
    "host_utility_curve",
    "lay_out_bundle",
    "make_plan",
    "simulate",
    "smallest_budget",
    "smallest_host_budget",
    "utility_curve",
    "validate",
    "written_bytes",
]
