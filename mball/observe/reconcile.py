"""What a process holds of a device, as told from outside, against what is known inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mball.observe.told import NotTold, Told
from mball.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Memory with a name. `of_it` says what is known of it, and is not added again."""

    name: str
    size_bytes: int
    of_it: tuple[Part, ...] = ()

    def __str__(self) -> str:
        of_it = [str(part) for part in self.of_it if part.size_bytes]
        inner = f" (of it {', '.join(of_it)})" if of_it else ""
        return f"{self.name} {format_bytes(self.size_bytes)}{inner}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciliation:
    """One number from outside, and the parts from inside that make it up.

    Attributes:
        device: as torch names it.
        told_by: who tells `held_bytes`.
        held_bytes: what the process holds of the device.
        parts: what is known of that.
        rest: what else there is, in words.
        free_bytes: what the device has left, by who tells it.
    """

    device: str
    told_by: str
    held_bytes: Told[int]
    parts: tuple[Part, ...]
    rest: str
    free_bytes: Mapping[str, Told[int]] = field(default_factory=dict)

    @property
    def known_bytes(self) -> int:
        """All parts together."""
        return sum(part.size_bytes for part in self.parts)

    @property
    def rest_bytes(self) -> Told[int]:
        """What is held and is no part. Where parts are more than is held there is no such number, but a reason."""
        if isinstance(self.held_bytes, NotTold):
            return self.held_bytes
        missing_bytes = self.known_bytes - self.held_bytes
        if missing_bytes > 0:
            return NotTold(
                why=f"parts are {format_bytes(missing_bytes)} more than that: room that is kept, and not filled now"
            )
        return -missing_bytes

    def __str__(self) -> str:
        held, rest = self.held_bytes, self.rest_bytes
        summands = [str(part) for part in self.parts if part.size_bytes]
        if isinstance(held, NotTold):
            text = f"{self.told_by} does not tell ({held.why}); known: {' + '.join(summands) or 'nothing'}"
        else:
            amount = f"? ({rest.why})" if isinstance(rest, NotTold) else format_bytes(rest)
            text = f"{format_bytes(held)} by {self.told_by} = {' + '.join([*summands, f'{self.rest} {amount}'])}"
        for teller, num_bytes in self.free_bytes.items():
            free = f"? ({num_bytes.why})" if isinstance(num_bytes, NotTold) else format_bytes(num_bytes)
            text += f"; {free} free by {teller}"
        return f"{self.device}: {text}"


def reconcile_host(*, anonymous_bytes: Told[int], ledger: Mapping[str, int]) -> Reconciliation:
    """Explains this process's anonymous memory by mball's ledger. `ledger` is bytes by kind, in words."""
    return Reconciliation(
        device="cpu",
        told_by="the kernel",
        held_bytes=anonymous_bytes,
        parts=tuple(Part(name=f"mball's {kind}", size_bytes=num_bytes) for kind, num_bytes in ledger.items()),
        rest="Python, torch and all else",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaFacts:
    """What CUDA and PyTorch say inside a process of one GPU.

    Attributes:
        uuid: as NVML writes it after "GPU-" or "MIG-".
        reserved_bytes: what PyTorch's allocator holds of the driver's memory, used or kept for later.
        free_bytes: of the device, by `torch.cuda.mem_get_info`.
    """

    ordinal: int
    uuid: str
    reserved_bytes: int
    free_bytes: int


def reconcile_gpu(
    *,
    facts: CudaFacts,
    driver_free_bytes: Told[int],
    held_bytes: Told[int],
    ledger: Mapping[str, int],
    in_allocator: frozenset[str],
    spare_bytes: int,
) -> Reconciliation:
    """Explains what NVML says that this process holds of a GPU.

    Args:
        facts: what CUDA and PyTorch say.
        driver_free_bytes: what NVML says is free.
        held_bytes: what NVML says that this process holds.
        ledger: mball's bytes by kind, in words.
        in_allocator: the kinds whose memory is PyTorch's to give: they are shown within it, and not added again.
        spare_bytes: pages that mball's pool keeps for later.
    """
    own = [Part(name=f"mball's {kind}", size_bytes=size) for kind, size in ledger.items() if kind not in in_allocator]
    within = [Part(name=f"mball's {kind}", size_bytes=size) for kind, size in ledger.items() if kind in in_allocator]
    parts = [
        *own,
        Part(name="mball's spare pages", size_bytes=spare_bytes),
        Part(name="PyTorch's allocator", size_bytes=facts.reserved_bytes, of_it=tuple(within)),
    ]
    return Reconciliation(
        device=f"cuda:{facts.ordinal}",
        told_by="NVML",
        held_bytes=held_bytes,
        parts=tuple(parts),
        rest="CUDA context and all else",
        free_bytes={"NVML": driver_free_bytes, "CUDA": facts.free_bytes},
    )
