"""Autocast where steps compute on another device than weights lie on: the casts of the model that is there whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mball
from mball.errors import WrapError
from tests.run.harness import assert_same, engine_of, make, run, weight_bytes
from tests.run.test_elsewhere import wrap_there
from tests.run.there import There
from tests.run.zoo import ZOO, noise

pytestmark = pytest.mark.usefixtures("foreign")


@pytest.fixture(autouse=True)
def no_fast_path() -> Iterator[None]:
    """Under autocast attention has none on a GPU; torch does not ask for other devices."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


DTYPES = (torch.bfloat16, torch.float16)


def under(dtype: torch.dtype, call: Callable[[Any], Any], *, inference: bool = False) -> Callable[[Any], Any]:
    def casting(model: Any) -> Any:
        with torch.inference_mode() if inference else torch.no_grad(), torch.autocast("foreign", dtype=dtype):
            return call(model)

    return casting


class Everything(nn.Module):
    """Reads weights in each of the ways that autocast knows, in regions of its own too."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.plain = nn.Linear(64, 64, bias=False)
        self.convolution = nn.Conv1d(4, 4, 3, padding=1)
        self.groups = nn.GroupNorm(2, 4)
        self.layers = nn.LayerNorm(64)
        self.table = nn.Parameter(torch.randn(64, 64))
        self.scales = nn.Parameter(torch.rand(64) + 0.5)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:  # [B, 4, 64]
        narrow = self.linear(x)
        with torch.autocast("foreign", enabled=False):
            wide = self.plain(x.to(self.plain.weight.dtype))
        with torch.autocast("foreign", dtype=torch.float16):
            half = self.plain(x)
        return [
            narrow,
            wide,
            half,
            self.groups(self.convolution(narrow)),
            self.layers(narrow),
            torch.tensordot(wide, self.table, dims=1) if wide.dtype == self.table.dtype else wide,
            narrow @ self.table.T,
            torch.dot(narrow[0, 0], self.scales),
            torch.cat([narrow[0], self.scales[None]]),
            torch.addcmul(narrow, self.scales, self.scales),
            narrow * self.scales,
            nn.functional.softplus(self.scales) + self.scales.rsqrt(),
            nn.functional.embedding(torch.tensor([3, 1], device=x.device), self.table),
        ]


@pytest.mark.parametrize("inference", [False, True], ids=["no-grad", "inference"])
@pytest.mark.parametrize("capture", ["graphs", "operators"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_way_to_read_a_weight(dtype: torch.dtype, capture: str, inference: bool, tmp_path: Path) -> None:
    plain, model = (make(lambda: Everything(dtype)) for _ in range(2))
    wrap_there(model, weight_bytes(model) * 5 // 3, swap_dir=tmp_path, capture=capture)
    there, whole = There(model, engine_of(model).homes), There(plain.to("foreign"))
    # Autocast refuses a third dtype.
    for number, fast in enumerate((*DTYPES, *DTYPES) if dtype is torch.float32 else (dtype, dtype)):
        call = under(fast, lambda m: m(noise(2, 4, 64)), inference=inference)
        assert_same(run(there, call), run(whole, call), f"call {number}")
    # And outside of it as ever.
    if dtype is torch.float32:
        assert_same(run(there, lambda m: m.linear(noise(1, 64))), run(whole, lambda m: m.linear(noise(1, 64))))


KINDS = [("convolutions", "operators"), ("breaks-in-layers", "operators"), ("bert-bf16", "operators")]
KINDS += [("transformer-encoder", "operators"), ("llama-fp32", "graphs"), ("breaks-in-layers", "graphs")]


@pytest.mark.parametrize(("name", "capture"), KINDS)
def test_models_of_every_kind(name: str, capture: str, tmp_path: Path) -> None:
    specimen = ZOO[name]
    plain, model = make(specimen.make), make(specimen.make)
    wrap_there(model, int(weight_bytes(model) * max(specimen.budget, 0.8)), swap_dir=tmp_path, capture=capture)
    there, whole = There(model, engine_of(model).homes), There(plain.to("foreign"))
    for attempt in range(2):
        for number, call in enumerate(specimen.runs):
            casting = under(torch.bfloat16, call)
            assert_same(run(there, casting), run(whole, casting), f"{name}, attempt {attempt}, call {number}")
    report = mball.report(model)
    assert report.in_place_bytes == 0, report
    assert report.peak_bytes <= report.budget_bytes, report


def test_no_cast_of_a_weight_is_kept(tmp_path: Path) -> None:
    """Also where the region begins within the model, and is the caller's again at the end."""
    model = make(lambda: Everything(torch.float32))
    wrap_there(model, weight_bytes(model) * 5 // 3, swap_dir=tmp_path, capture="operators")
    seen = []
    model.linear.register_forward_hook(lambda *_: seen.append(torch.is_autocast_cache_enabled()))
    with torch.autocast("foreign", dtype=torch.bfloat16):
        run(There(model), lambda m: m(noise(2, 4, 64)))
        assert torch.is_autocast_cache_enabled()
    assert seen == [False]


class Regions(nn.Module):
    """Regions that were made before any pass, and ask for casts to be kept."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.region = torch.autocast("cpu", dtype=torch.bfloat16)
        self.asks = torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=True)

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def decorated(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.linear(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.decorated(x)
        with self.region:
            x = self.linear(self.linear(x))
        with self.asks:
            return self.linear(self.linear(x))


class CountCasts(TorchDispatchMode):
    """Counts the casts of weights of [64, 64]."""

    num_casts = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_casts += func is torch.ops.aten._to_copy.default and args[0].shape == (64, 64)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_a_region_made_before_the_pass_keeps_no_cast_either(capture: str, tmp_path: Path, new_dynamo: None) -> None:
    plain, model = make(Regions).requires_grad_(True), make(Regions).requires_grad_(True)
    mball.wrap(model, weight_bytes(model) * 2, swap_dir=tmp_path, capture=capture)

    def casts(model: nn.Module) -> tuple[int, torch.Tensor]:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), CountCasts() as counting:
            result = model(noise(1, 4, 64))
            return counting.num_casts, result

    kept, expected = casts(plain)
    assert kept == 1, "torch keeps none, and there is nothing to turn off"
    for _ in range(2):
        num_casts, result = casts(model)
        assert num_casts == 6
        assert_same(result, expected)
    assert casts(plain)[0] == 1, "outside of passes casts are kept as ever"


class Inside(nn.Module):
    """A region of its own, and what may be the bias of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.adds = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("foreign", dtype=torch.bfloat16):
            y = self.linear(x)
            return y + self.linear.bias if self.adds else y


def test_what_may_be_a_bias_is_refused_where_nobody_knows(tmp_path: Path) -> None:
    plain, model = There(make(Inside).to("foreign")), make(Inside)
    wrap_there(model, 2 * weight_bytes(model), swap_dir=tmp_path, capture="operators")
    there = There(model)
    x = noise(2, 4, 64)
    apart = noise(4, 2, 64).transpose(0, 1)  # what linear layers multiply first, and then add to
    assert_same(run(there, lambda m: m(x)), run(plain, lambda m: m(x)))
    model.adds = plain.model.adds = True
    with pytest.raises(WrapError, match="have autocast begin around the call"):
        run(there, lambda m: m(x))
    for call in (lambda m: m(x), lambda m: m(apart)):
        around = under(torch.bfloat16, call)
        assert_same(run(there, around), run(plain, around))


def test_on_the_cpu_nobody_stands_between(tmp_path: Path) -> None:
    """There autocast finds homes by itself, and knows other functions: one of them is no matrix product."""
    plain, model = (make(lambda: nn.Sequential(nn.Linear(64, 64), nn.PReLU(64), nn.Linear(64, 64))) for _ in range(2))
    mball.wrap(model, 2 * weight_bytes(model), swap_dir=tmp_path, capture="operators")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            assert_same(model(noise(3, 64)), plain(noise(3, 64)))
    modes = []
    model[1].register_forward_hook(lambda *_: modes.append(torch._C._len_torch_function_stack()))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(noise(3, 64))
    assert modes == [0]


def test_autocast_of_the_cpu_is_refused(tmp_path: Path) -> None:
    model = make(lambda: Everything(torch.float32))
    wrap_there(model, weight_bytes(model) * 5 // 3, swap_dir=tmp_path, capture="operators")
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(WrapError, match=r"use torch.autocast\('foreign'\)"),
    ):
        run(There(model), lambda m: m(noise(2, 4, 64)))
    assert_same(
        run(There(model), lambda m: m(noise(2, 4, 64))),
        run(There(make(lambda: Everything(torch.float32)).to("foreign")), lambda m: m(noise(2, 4, 64))),
    )
