"""The bench of a GPU as far as machines without one run it: its files, its model, and all of its rounds on a CPU."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from bench.gpu import disk, link, streaming
from bench.gpu.child import Child
from bench.gpu.group_offload import GroupOffload
from bench.gpu.keep import DISK, LINK, PEERS, SPEED, Book, keep
from bench.gpu.limit import Limit
from bench.gpu.streaming import Scale, against_copies, balanced_tokens, take_turns
from bench.gpu.ways import Loading, Way, device_map
from bench.results import Measurement, Topic, read_result
from bench.speed.model import SMALL, _noisy_weights, make_checkpoint, weight_bytes, weight_file
from bench.speed.ratios import Target
from bench.speed.workload import Kind
from mball.errors import SchemaError
from mball.units import KIB, MIB
from tests.bench.samples import result

FACTS = result(gpu="NVIDIA H200").machine
BOOK = Book(name="toy", topic=Topic.LINK, phrases=("one is {one}", "two are {two} and {three}"))


def figures(*names: str, value: float = 2.0) -> list[Measurement]:
    return [Measurement.of(name, [value], unit="s", description=f"how long {name} takes") for name in names]


def quiet(text: str) -> None:
    """Shows nothing."""


@pytest.mark.parametrize("path", sorted(Path("bench").glob("test_*.py")), ids=lambda path: path.stem)
def test_every_bench_can_be_loaded(path: Path) -> None:
    """One that cannot would stop all others, on a machine that is there for minutes."""
    importlib.import_module(f"bench.{path.stem}")


# -- results that grow ---------------------------------------------------------------------------------------------


def test_parts_come_together(tmp_path: Path) -> None:
    path = keep(BOOK, figures("two"), directory=tmp_path, facts=FACTS, note="a note")
    assert path.name == "2026-01-31-nvidia-h200-toy.json"
    assert read_result(path).summary() == "2 s"
    keep(BOOK, figures("one", "three"), directory=tmp_path, facts=FACTS)
    found = read_result(path)
    assert found.summary() == "one is 2 s; two are 2 s and 2 s"
    assert found.note == "a note"
    keep(BOOK, figures("two", value=5.0), directory=tmp_path, facts=FACTS)
    assert read_result(path).summary() == "one is 2 s; two are 5 s and 2 s"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("change", [{"commit": "abc"}, {"gpu_driver": "590"}, {"torch": "9.9"}])
def test_what_another_commit_measured_is_not_kept(change: dict[str, str], tmp_path: Path) -> None:
    path = keep(BOOK, figures("one"), directory=tmp_path, facts=FACTS)
    keep(BOOK, figures("two"), directory=tmp_path, facts=replace(FACTS, **change))
    assert [measurement.name for measurement in read_result(path).measurements] == ["two"]


def test_a_file_that_cannot_be_read_is_replaced(tmp_path: Path) -> None:
    path = keep(BOOK, figures("one"), directory=tmp_path, facts=FACTS)
    path.write_text("{")
    keep(BOOK, figures("two"), directory=tmp_path, facts=FACTS)
    assert read_result(path).summary() == "2 s"


def test_without_a_gpu_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="needs a machine with a GPU"):
        keep(BOOK, figures("one"), directory=tmp_path, facts=result().machine)
    assert not list(tmp_path.iterdir())


def test_headlines_name_what_is_measured() -> None:
    calls = [f"{call}_{link.size_name(size)}" for size in link.CALL_SIZES for call in ("create", "map")]
    copied = [f"{kind}_in_{link.size_name(size)}" for size in link.COPY_SIZES for kind in ("pinned", "pageable")]
    assert LINK.headline([*calls, *copied]).count("{") == 4
    assert SPEED.headline(["decode_50", "prefill_50", "fits_eager"]).count("{") == 3
    assert PEERS.headline(["peers_accelerate"]) != "{peers_accelerate}"
    assert DISK.headline([f"disk_{name}" for name in disk.TITLES]).count("{") == len(disk.TITLES)


# -- the model -----------------------------------------------------------------------------------------------------


def test_the_quick_model_is_as_large_as_the_other_and_its_weights_differ(tmp_path: Path) -> None:
    slow, quick = (make_checkpoint(SMALL, tmp_path / name, quick=name == "quick") for name in ("slow", "quick"))
    assert weight_bytes(slow) == weight_bytes(quick)
    with safe_open(quick / "model.safetensors", framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert weights["model.norm.weight"].eq(1).all()
    first, second = (weights[f"model.layers.{number}.mlp.up_proj.weight"] for number in (0, 1))
    assert first.shape == second.shape
    assert (first != second).float().mean() > 0.9
    assert 0.019 < float(first.float().std()) < 0.021


def test_weights_that_are_longer_than_the_noise_go_round() -> None:
    lengths = [len(part) for part in _noisy_weights(SMALL, num_noise=1 << 16)]
    assert max(lengths) == 1 << 16
    assert 2 * sum(lengths) == sum(2 * math.prod(size) for size in _sizes())


def _sizes() -> list[tuple[int, ...]]:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return [tuple(parameter.shape) for parameter in LlamaForCausalLM(SMALL.config()).parameters()]


# -- rounds and ratios ---------------------------------------------------------------------------------------------


class Time:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def taking(self, seconds: float) -> float:
        self.now_s += seconds
        return seconds


def test_rounds_end_when_there_is_no_time_for_another() -> None:
    time = Time()
    sources = {"one": lambda: time.taking(2.0), "two": lambda: time.taking(1.0)}
    samples = take_turns(sources, 100, Limit(10.0, time), quiet, "toy")
    assert samples == {"one": [2.0] * 3, "two": [1.0] * 3}
    assert time.now_s == 9.0
    samples = take_turns(sources, 100, Limit(0.0, time), quiet, "one round there always is")
    assert samples == {"one": [2.0], "two": [1.0]}


@pytest.mark.parametrize(
    ("tokens", "compute_s", "link_s", "wanted"),
    [(1024, 0.05, 0.2, 4096), (1024, 0.2, 0.2, 1024), (1024, 1.0, 0.01, 256), (1024, 0.0, 1.0, 16384)],
)
def test_a_prompt_that_takes_as_long_as_the_copies(tokens: int, compute_s: float, link_s: float, wanted: int) -> None:
    assert balanced_tokens(tokens, compute_s, link_s) == wanted


def test_a_step_is_held_against_the_larger_of_its_copies_and_its_compute() -> None:
    reports: list[dict[str, Any]] = [{"bytes_read_last_pass": 100, "stall_s": 0.1}] * 2
    samples = {"step": [2.2, 3.0], "bare": [50.0, 50.0]}
    found = {m.name: m for m in against_copies("toy", "a step", samples, reports, Target(limit=1.2))}
    assert found["toy"].median == pytest.approx(1.3)
    assert "the copies alone; target ≤ 1.2×, missed by 0.1×" in (found["toy"].compared_with or "")
    samples["compute"] = [4.0, 1.0]
    found = {m.name: m for m in against_copies("toy", "a step", samples, reports, Target(limit=1.2))}
    assert [found["toy"].minimum, found["toy"].maximum] == pytest.approx([0.55, 1.5])
    nothing = [{"bytes_read_last_pass": 0, "stall_s": 0.0}] * 2
    samples.pop("compute")
    assert "toy" not in {m.name for m in against_copies("toy", "a step", samples, nothing, Target(limit=1.2))}


def test_accelerate_keeps_what_is_used_first(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(SMALL, tmp_path, quick=True)
    places = device_map(checkpoint, weight_bytes(checkpoint) // 2, "cuda:0")
    assert places["model.embed_tokens"] == "cuda:0"
    assert places["lm_head"] == "cpu"
    assert set(device_map(checkpoint, 0, "cuda:0").values()) == {"cuda:0", "cpu"}
    assert set(device_map(checkpoint, weight_bytes(checkpoint), "cuda:0").values()) == {"cuda:0"}


def test_an_order_says_what_to_load(tmp_path: Path) -> None:
    loading = Loading(way=Way.ACCELERATE, checkpoint=tmp_path, budget_bytes=3, resident_bytes=7, steps=Way.GRAPHS)
    assert Loading.of(json.loads(json.dumps(loading.order()))) == loading


# -- all of it, on a CPU -------------------------------------------------------------------------------------------


class InThisProcess:
    """A contender that is no process, and whose link copies a GB a second."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._child = Child()

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *error: object) -> None:
        if self._child._model is not None and (found := streaming_state(self._child._model)):
            found()

    def bring(self, loading: Loading) -> float:
        return float(self.tell("load", **loading.order())["load_s"])

    def tell(self, do: str, **order: Any) -> dict[str, Any]:
        if do == "bare":
            return {"bytes_per_s": 1e9}
        reply: dict[str, Any] = json.loads(json.dumps(getattr(self._child, do)(**json.loads(json.dumps(order)))))
        return reply


def streaming_state(model: Any) -> Any:
    import mball
    from mball.api import _states

    return (lambda: mball.unwrap(model)) if model in _states else None


@pytest.fixture
def scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_dynamo: None) -> Scale:
    monkeypatch.setattr(streaming, "GpuContender", InThisProcess)
    monkeypatch.setattr(streaming, "PREFILL_TOKENS", (16, 64))
    monkeypatch.setenv("MBALL_SWAP_DIR", str(tmp_path))
    return Scale(
        checkpoint=make_checkpoint(SMALL, tmp_path, quick=True),
        device="cpu",
        settling=4,
        burst=2,
        rounds=2,
        copies=1,
        prefill_tokens=16,
        spare_bytes=2 * MIB,
    )


def names_of(found: list[Measurement]) -> set[str]:
    for measurement in found:
        measurement.check()
    names = [measurement.name for measurement in found]
    assert len(names) == len(set(names))
    return set(names)


def test_decode(scale: Scale) -> None:
    names = names_of(streaming.decode(scale, 50, Limit(60), quiet))
    assert {"decode_50", "decode_50_low", "decode_50_s", "decode_50_pin", "decode_50_host_peak"} <= names


def test_prefill(scale: Scale) -> None:
    names = names_of(streaming.prefill(scale, 50, Limit(60), quiet))
    assert {"prefill_50", "prefill_50_tokens", "prefill_50_compute_s", "prefill_50_bytes"} <= names


def test_fits(scale: Scale) -> None:
    # On a CPU the budget holds also what capture takes, which is some MiB the first time in a process.
    roomy = replace(scale, spare_bytes=256 * MIB)
    found = streaming.fits(roomy, Way.PLAIN, Limit(60), quiet)
    assert {"fits_eager", "fits_eager_s", "fits_eager_plain_s", "fits_eager_read"} <= names_of(found)
    assert next(m for m in found if m.name == "fits_eager_read").median == 0


@pytest.mark.slow
def test_compiled_steps(scale: Scale) -> None:
    """On a CPU, which has no graphs: torch.compile takes the mode there too."""
    found = names_of(streaming.fits(scale, Way.GRAPHS, Limit(60), quiet))
    assert {"fits_graphs", "fits_graphs_plain_s", "fits_graphs_recorded"} <= found
    found = names_of(streaming.decode(scale, 50, Limit(60), quiet, steps=Way.GRAPHS))
    assert {"decode_50_graphs", "decode_50_graphs_recorded"} <= found


def test_peers(scale: Scale) -> None:
    names = names_of(streaming.peers(scale, 50, Limit(60), quiet))
    assert {"peers_accelerate", "peers_mball_s", "peers_accelerate_s", "peers_mball_pinned"} <= names


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.value)
def test_group_offload(kind: Kind, scale: Scale) -> None:
    """Which has to say the same tokens, at equal bytes."""
    found = streaming.group_offload(scale, kind, Limit(60), quiet)
    name = f"peers_blocks_{kind.value}"
    assert {name, f"{name}_s", f"{name}_mball_s", f"{name}_mball_pinned"} <= names_of(found)
    sizes = {measurement.name: measurement.median for measurement in found}
    assert sizes[f"{name}_streamed"] <= sizes[f"{name}_copied"] < weight_bytes(scale.checkpoint)


def test_blocks_take_turns_in_two_places(tmp_path: Path) -> None:
    """As many blocks as are an odd number, so that the places change hands at the end of a pass."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    model = nn.Sequential(*blocks)
    inputs = torch.randn(2, 8)
    wanted = model(inputs)
    offloaded = GroupOffload(model, blocks, torch.device("cpu"))
    assert all(torch.equal(model(inputs), wanted) for _ in range(4))
    places = {place.data_ptr() for places in offloaded._places for place in places}
    assert {parameter.data_ptr() for parameter in model.parameters()} <= places


def test_from_disk(tmp_path: Path) -> None:
    path = weight_file(make_checkpoint(SMALL, tmp_path, quick=True))
    found = disk.cold_loads(path, "cpu", Limit(60), quiet, open_device=None, num_rounds=2)
    assert names_of(found) >= {"disk_mball", "disk_safetensors", "disk_over_safetensors"}


def test_other_bytes_give_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = weight_file(make_checkpoint(SMALL, tmp_path, quick=True))
    found = disk.load_file(path)
    found["model.norm.weight"][3] += 1
    monkeypatch.setattr(disk.mball, "load_file", lambda *_: found)
    with pytest.raises(streaming.WrongError, match=r"different bytes of model\.norm\.weight"):
        disk.cold_loads(path, "cpu", Limit(60), quiet, open_device=None)


def test_a_model_that_computes_something_else_gives_no_figure(scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Child, "logits", lambda self, kind: {"tokens": [1], "finite": False})
    with pytest.raises(streaming.WrongError, match="not finite"):
        streaming.decode(scale, 50, Limit(60), quiet)


def test_sizes_have_names() -> None:
    assert [link.size_name(size) for size in (64 * KIB, 2 * MIB, 256 * MIB)] == ["64_kib", "2_mib", "256_mib"]
