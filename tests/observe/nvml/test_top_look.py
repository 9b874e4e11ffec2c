"""Looks of `mball top`: rates need two, and a driver that goes away and comes back is shown as that."""

from __future__ import annotations

import io
import json

from rich.console import Console

from mball.cli.top_look import Looker, as_document
from mball.cli.top_tables import draw
from mball.observe.told import NotTold
from mball.units import GIB, MIB
from tests.observe.nvml.standin import StandIn, slice_of


def shown(looker: Looker) -> str:
    text = io.StringIO()
    Console(file=text, width=160).print(draw(looker.look()))
    return text.getvalue()


def test_one_look_is_two_where_rates_need_it(driver: StandIn) -> None:
    slept: list[float] = []

    def sleep(time_s: float) -> None:
        slept.append(time_s)
        driver.set(nvlink_sent=1 << 30)

    with Looker(sleep=sleep) as looker:
        assert not isinstance(looker.look_well().gpus, NotTold)
        assert slept == [], "there is no NVLink"
        driver.set(nvlink_sent=0)
        gpus = looker.look_well().gpus
    assert len(slept) == 1
    assert not isinstance(gpus, NotTold)
    rate = gpus.gpus[0].nvlink_sent_bytes_per_s
    assert isinstance(rate, int)
    assert rate > 0


def test_a_driver_that_goes_away_and_comes_back(driver: StandIn) -> None:
    with Looker() as looker:
        assert "stand-in" in shown(looker)
        driver.fail("nvmlDeviceGetCount_v2", "GPU_IS_LOST", first=1, last=1)
        assert "no GPU can be seen: NVIDIA's driver does not answer (GPU is lost); see whether" in shown(looker)
        assert "stand-in" in shown(looker)


def test_slices_are_rows_and_their_gpu_blames_nobody(driver: StandIn) -> None:
    driver.set(used=2 * GIB, slices=1)
    driver.set(slice_of(0, 0), total=20 * GIB, used=2 * GIB)
    driver.list(4242, GIB, name=b"worker", unit=slice_of(0, 0))
    with Looker() as looker:
        lines = shown(looker).splitlines()
    assert [line.split()[1] for line in lines if "stand-in" in line] == ["0", "0:0"]
    (worker,) = [line for line in lines if "worker" in line]
    assert worker.split()[-7:] == ["│", "0:0", "│", "1.00", "GiB", "│", "│"]
    (held,) = [line for line in lines if "held by no process" in line]
    assert " 0:0 │" in held
    assert "? GPU 0:0: busy, PCIe, NVLink not told by this driver (Not Supported)" in lines


def test_all_of_a_look_is_json(driver: StandIn) -> None:
    driver.set(slices=1)
    driver.list(1, MIB, unit=slice_of(0, 0))
    with Looker() as looker:
        document = json.loads(json.dumps(as_document(looker.look())))
    (part,) = document["gpus"]["gpus"][0]["slices"]
    assert part["label"] == "0:0"
    assert part["processes"][0]["not_told"] == {"name": "Not Found"}
    assert part["busy_percent"] is None
    assert part["not_told"]["busy_percent"] == "Not Supported"
