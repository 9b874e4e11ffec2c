"""The doctor's findings about host memory and about torch's private parts."""

from __future__ import annotations

from mball.cli.findings import Finding, Need, check, limit
from mball.memory import facts
from mball.torch_private.probes import CAPTURE_NEEDS, DECISIONS_NEED, probe
from mball.units import GIB, format_bytes

# Less room than this and the libraries alone are a tight fit.
SMALL_HEADROOM_BYTES = GIB


def host_memory() -> list[Finding]:
    """Returns memory, huge pages and the limits that a control group sets."""
    section = "host memory"
    machine = facts.machine_memory()
    group = facts.cgroup_memory()
    pages = facts.transparent_huge_pages()
    headroom = facts.headroom_bytes()
    process = facts.process_memory()
    if group is None:
        limit_text = "no control group seen"
    elif group.limit_bytes is None:
        limit_text = f"no limit; {format_bytes(group.usage_bytes)} used"
    else:
        limit_text = (
            f"{format_bytes(group.limit_bytes)}; {format_bytes(group.usage_bytes)} used, "
            f"of which {format_bytes(group.cache_bytes)} is page cache"
        )
    return [
        limit(
            section, "memory", headroom >= SMALL_HEADROOM_BYTES,
            f"{format_bytes(machine.total_bytes)}, {format_bytes(headroom)} to be had now",
            "choose budgets below what is to be had, and leave about 1 GiB for Python and torch", Need.MANDATORY,
        ),
        check(
            section, "transparent huge pages", pages in ("always", "madvise"), pages or "not in this kernel",
            "reads from disk are slower, into small pages: "
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (as root)",
        ),
        limit(
            section, "cgroup memory limit", group is None or group.limit_bytes is None, limit_text,
            "budgets must fit under it, with Python, torch and graph capture beside them",
        ),
        check(
            section, "memory of a process (PSS)", process.pss_bytes is not None,
            "the kernel tells" if process.pss_bytes is not None else "hidden",
            "RSS is shown instead, which counts shared pages more than once",
        ),
    ]  # fmt: skip


def private_torch() -> list[Finding]:
    """Returns which private APIs of torch are there; empty where torch cannot be imported."""
    try:
        import torch  # noqa: F401  # where it is not, nothing of it is looked for
    except ImportError:
        return []
    section = "private APIs of torch"
    lost = dict.fromkeys(
        CAPTURE_NEEDS,
        "mball runs without capturing graphs: the same results and budget, less is known ahead",
    ) | dict.fromkeys(
        DECISIONS_NEED,
        "graphs break where transformers looks at a mask: the same results and budget, captures take longer",
    )
    other = "this torch is newer or older than mball knows; use a version from constraints.txt"
    return [
        check(
            section, api.name, api.found, api.purpose, lost.get(api.name, other),
            Need.OPTIONAL if api.name in lost else Need.MANDATORY,
        )
        for api in probe()
    ]  # fmt: skip
