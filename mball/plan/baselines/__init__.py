"""Policies of the field as planners: the same traces, machines and budgets, and plans that the engine can execute.

Each is a function with the arguments, the result and the errors of `make_plan`; its module says where the policy comes
from and what is idealised. They are about weights: what is born in the pass stays, and traces with steps on the host
lane are refused.
"""

from collections.abc import Callable

from mball.plan.baselines.belady import plan_belady
from mball.plan.baselines.flexgen import plan_flexgen
from mball.plan.baselines.lru import plan_lru
from mball.plan.baselines.lru_pages import plan_lru_pages
from mball.plan.baselines.prefetch import plan_prefetch
from mball.plan.baselines.prefix import plan_prefix
from mball.plan.baselines.swapadvisor import plan_swapadvisor
from mball.schema import Plan

# By the names that users give.
BASELINES: dict[str, Callable[..., Plan]] = {
    "belady": plan_belady,
    "flexgen": plan_flexgen,
    "lru": plan_lru,
    "lru-pages": plan_lru_pages,
    "prefetch": plan_prefetch,
    "prefix": plan_prefix,
    "swapadvisor": plan_swapadvisor,
}

__all__ = [
    "BASELINES",
    "plan_belady",
    "plan_flexgen",
    "plan_lru",
    "plan_lru_pages",
    "plan_prefetch",
    "plan_prefix",
    "plan_swapadvisor",
]
