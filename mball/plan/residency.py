"""Which bundles stay in device memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from mball.plan.demand import Demand
from mball.schema import Link

# A bundle that saves this much more link time a byte than the typical one is kept before all others.
PREFERRED_VALUE = 1.5


def choose_residents(
    demand: Demand, visits: Sequence[int], link: Link, *, resident_bytes: int, pool_bytes: int
) -> frozenset[int] | None:
    """Returns the bundles to keep within `resident_bytes`, or None when the rest cannot go through `pool_bytes`.

    First what must stay: pooled tiny weights, and the largest bundles of a step that would overflow the pool.
    Then what saves most link time a byte (bundles that come several times a pass). The rest is spread evenly
    by bytes over the pass, so that the link has something to do all the time and few slots suffice.

    Args:
        visits: how often each bundle would come if it were streamed.
    """
    sizes = [bundle.size_bytes for bundle in demand.bundles]
    residents = {bundle for bundle in demand.read_bundles() if sizes[bundle] == 0} | demand.pooled
    for reads in demand.reads:
        streamed = [bundle for bundle in reads if bundle not in residents]
        need = demand.slot_bytes(streamed)
        if need <= pool_bytes:
            continue
        for bundle in sorted(streamed, key=lambda b: (-sizes[b], b)):
            if need <= pool_bytes:
                break
            residents.add(bundle)
            need -= sizes[bundle]
    room = resident_bytes - sum(sizes[bundle] for bundle in residents)
    if room < 0:
        return None

    rest = sorted(
        (bundle for bundle in demand.read_bundles() if bundle not in residents),
        key=lambda bundle: (demand.uses[bundle][0], bundle),
    )
    if not rest:
        return frozenset(residents)
    value = {b: visits[b] * link.transfer_s(demand.moved_bytes[b]) / sizes[b] for b in rest}
    typical = statistics.median(value.values())
    for bundle in sorted(rest, key=lambda b: (-value[b], b)):
        if value[bundle] >= PREFERRED_VALUE * typical and sizes[bundle] <= room:
            residents.add(bundle)
            room -= sizes[bundle]

    spread = [bundle for bundle in rest if bundle not in residents and value[bundle] < PREFERRED_VALUE * typical]
    total = sum(sizes[bundle] for bundle in spread)
    share = min(1.0, room / total) if total else 0.0
    owed = 0.0
    for bundle in spread:
        owed += share * sizes[bundle]
        if owed >= sizes[bundle] / 2 and sizes[bundle] <= room:
            residents.add(bundle)
            room -= sizes[bundle]
            owed -= sizes[bundle]
    for bundle in sorted(rest, key=lambda b: (-sizes[b], b)):
        if bundle not in residents and sizes[bundle] <= room:
            residents.add(bundle)
            room -= sizes[bundle]
    return frozenset(residents)
