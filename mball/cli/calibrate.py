"""`mball doctor --calibrate`: measures a disk once and well, shows what came of it, and keeps it."""

from __future__ import annotations

import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mball.config import calibration_directory, own_cache
from mball.errors import StorageError
from mball.schema import CalibratedLink, Calibration
from mball.storage import calibrate, choose_reader, save_calibration
from mball.units import KIB, MIB, format_bytes

# From here on a person should know that plans were made for a disk that others use as well.
UNSTEADY = 0.5


def run_calibrate(*, where: str, as_json: bool) -> int:
    """Measures the disk under `where`, prints a table or JSON, keeps the calibration, and returns 0.

    Raises:
        StorageError: the disk cannot be measured, or the calibration cannot be kept.
    """
    directory = calibration_directory()
    if directory is None:
        raise StorageError(
            "you have no home directory to keep a calibration in; set XDG_CACHE_HOME to a writable place"
        )
    choice = choose_reader(cache=own_cache())
    if as_json:
        calibration = calibrate(where, choice=choice)
    else:
        console = Console()
        with console.status("calibrating") as status:
            calibration = calibrate(where, choice=choice, progress=lambda doing: status.update(escape(doing)))
        for calibrated in calibration.links:
            console.print(_table(calibration, calibrated))
            for line in _lines(calibrated):
                console.print(line, highlight=False, soft_wrap=True)
    path = save_calibration(directory, calibration)
    if as_json:
        document = {"calibration": json.loads(calibration.to_json()), "file": str(path)}
        print(json.dumps(document, indent=2))
    else:
        console.print(f"    kept  {escape(str(path))}", highlight=False, soft_wrap=True)
    return 0


def figures(calibrated: CalibratedLink) -> str:
    """Returns a calibrated link in words."""
    link = calibrated.link
    return (
        f"{link.bandwidth_bytes_per_s / 1e9:.2f} GB/s (middle half within {calibrated.spread:.0%}), latency "
        f"{link.latency_s * 1e6:.0f} µs; best {calibrated.depth} × {_block(calibrated.block_bytes)} in flight"
    )


def _table(calibration: Calibration, calibrated: CalibratedLink) -> Table:
    samples = {(sample.block_bytes, sample.depth): sample for sample in calibrated.samples}
    depths = sorted({depth for _, depth in samples})
    link = calibrated.link
    title = (
        f"{calibration.place}: {link.source.value} to {link.target.value}, by size and number of requests in flight\n"
        "GB/s (± half of what the middle half of the rounds spans), and below it the time of one request"
    )
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    table.add_column("request", justify="right")
    for depth in depths:
        table.add_column(str(depth), justify="right")
    for block_bytes in sorted({block_bytes for block_bytes, _ in samples}):
        cells = []
        for depth in depths:
            sample = samples.get((block_bytes, depth))
            is_best = (block_bytes, depth) == (calibrated.block_bytes, calibrated.depth)
            style = "[bold green]" if is_best else ""
            if sample is None:
                cells.append("")
                continue
            speed = f"{sample.bandwidth_bytes_per_s / 1e9:.2f} ±{sample.spread / 2:.0%}"
            cells.append(f"{style}{speed}\n{sample.latency_s * 1e3:.2f} ms")
        table.add_row(_block(block_bytes), *cells)
    return table


def _lines(calibrated: CalibratedLink) -> list[str]:
    lines = [
        f"    link  {figures(calibrated)}",
        f"  reader  {escape(calibrated.reader)}; {calibrated.num_rounds} rounds or more over a file of "
        f"{format_bytes(calibrated.file_bytes)}",
    ]
    if calibrated.spread > UNSTEADY:
        lines.append(
            "[yellow]unsteady[/]  others use this disk too, or it is throttled: calibrate again when it is quieter. "
            "Plans are corrected by what passes take"
        )
    return lines


def _block(block_bytes: int) -> str:
    return f"{block_bytes // MIB} MiB" if block_bytes >= MIB else f"{block_bytes // KIB} KiB"
