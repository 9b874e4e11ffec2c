"""Writes `bench/results/SPEED.md`, the speed tables, from the result files: `python -m bench.speed.table`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.load.loaders import TITLES
from bench.pages import markdown_table, rewrite, run_update
from bench.results import RESULTS, Result, read_results, show
from bench.speed.plans import BEFORE
from bench.speed.ways import Mode
from bench.speed.workload import Kind

PAGE = RESULTS / "SPEED.md"
PERCENTS = (25, 50, 75)
_HEAD = "# Speed\n\nWritten by `python -m bench.speed.table` from the files here, `make bench` writes those."
_PEERS = {"mball": "mball", "mapped": "transformers, memory-mapped", "accelerate": "accelerate, disk offload"}


class Figures:
    """The measurements of the newest result of a name; every figure of a result that is not there is a dash."""

    def __init__(self, results: Sequence[Result], name: str) -> None:
        found = [result for result in results if result.name == name]
        self.result = max(found, key=lambda result: result.machine.date) if found else None
        self._by_name = {m.name: m for m in self.result.measurements} if self.result else {}

    def has(self, prefix: str) -> bool:
        """Whether anything was measured whose name begins so."""
        return any(name.startswith(prefix) for name in self._by_name)

    def show(self, name: str) -> str:
        """Returns a figure, with the quartiles' distance where there are several samples."""
        found = self._by_name.get(name)
        if found is None:
            return "–"
        spread = f" ± {show(found.iqr, found.unit)}" if found.num_samples > 1 and found.unit == "s" else ""
        return f"{found.figure()}{spread}"

    def interval(self, name: str) -> str:
        """Returns a ratio with the 95 % interval of its median."""
        if name not in self._by_name:
            return "–"
        return f"{self.show(name)} [{self.show(f'{name}_low')}, {self.show(f'{name}_high')}]"

    def verdict(self, name: str) -> str:
        """Returns the target of a figure and whether it was met."""
        found = self._by_name.get(name)
        texts = (found.compared_with or "", found.description) if found else ()
        return next((text[text.index("target ") :] for text in texts if "target " in text), "–")

    def source(self) -> str:
        """Returns when and where it was measured, with a link to the file."""
        if self.result is None:
            return "Not measured."
        facts = self.result.machine
        note = f" {self.result.note}" if self.result.note else ""
        return (
            f"[{self.result.day()}]({self.result.file_name()}), {self.result.hardware()}, {facts.cpu}, torch "
            f"{facts.torch}, transformers {facts.transformers}, mball {facts.commit}.{note}"
        )


def table(results: Sequence[Result]) -> str:
    """Returns the page."""
    parts = [
        _HEAD,
        *_roofline(results),
        *_fits(results),
        *_plans(results),
        *_peers(results),
        *_start(results),
        *_swap(results),
        *_load(results),
    ]
    return "\n\n".join(parts) + "\n"


def _roofline(results: Sequence[Result]) -> list[str]:
    figures = Figures(results, "speed-roofline")
    rows = []
    for mode in Mode:
        for kind in Kind:
            prefix = f"{mode.value}_{kind.value}"
            for percent in PERCENTS:
                name = f"{prefix}_{percent}"
                if not figures.has(f"{name}_s"):
                    continue
                rows.append([
                    f"{mode.value}, {kind.value}, {percent} %", figures.show(f"{name}_s"),
                    figures.show(f"{prefix}_110_s"), figures.show(f"{prefix}_plain_s"),
                    f"{figures.show(f'{name}_disk_s')} ({figures.show(f'{name}_bytes')})",
                    figures.show(f"{name}_stall_s"), figures.interval(name), figures.show(f"{name}_plain"),
                    figures.verdict(name),
                ])  # fmt: skip
    head = ["mode, step, budget", "measured", "resident", "without mball", "bare read", "stall", "÷ roofline"]
    head += ["÷ roofline of plain", "target"]
    text = "A step over max(compute with everything resident, bare read of what is streamed); medians ± IQR."
    return ["## Streaming against the roofline", figures.source(), text, markdown_table(head, rows)]


def _fits(results: Sequence[Result]) -> list[str]:
    figures = Figures(results, "speed-roofline")
    rows = []
    for mode in Mode:
        for kind in Kind:
            name = f"{mode.value}_{kind.value}_fits"
            if figures.has(name):
                rows.append([
                    f"{mode.value}, {kind.value}", figures.show(f"{name}_s"), figures.show(f"{name}_plain_s"),
                    figures.interval(name), figures.show(f"{name}_read"), figures.verdict(f"{name}_high"),
                ])  # fmt: skip
    head = ["mode, step", "mball", "without mball", "ratio", "bytes read meanwhile", "target, of the upper end"]
    return ["## Where the model fits: a budget of 110 %", markdown_table(head, rows)]


def _plans(results: Sequence[Result]) -> list[str]:
    figures = Figures(results, "speed-plans")
    rows = []
    for version in ("", BEFORE):
        for budget in ("smallest", *(f"budget_{percent}" for percent in PERCENTS)):
            name = f"{version}{budget}"
            if figures.has(f"{name}_s"):
                title = budget.removeprefix("budget_") + (" %" if budget != "smallest" else "")
                rows.append([
                    f"{title}{', before' if version else ''}", figures.show(f"{name}_budget"),
                    figures.show(f"{name}_s"),
                    figures.interval(f"{name}_predicted"), figures.show(f"{name}_bytes"),
                    figures.interval(f"{name}_roofline"), figures.interval(f"{name}_least"),
                    figures.interval(f"{name}_change"),
                ])  # fmt: skip
    head = ["budget", "bytes", "a decode step", "÷ predicted", "read", "÷ roofline", "÷ least", "÷ before"]
    text = (
        "Uncompiled decode. Roofline: max(compute with everything resident, bare read of what is streamed). Least: the "
        "same with a bare read of no more than the weights that exceed the budget. Both at the rate of all bare reads "
        "of a round. Before: another version of mball in the same rounds. Median of |measured ÷ predicted - 1| over "
        "all budgets: "
        f"{figures.show('predicted_off')}, {figures.verdict('predicted_off')}; of each budget: in the table."
    )
    return ["## Plans, predicted and executed", figures.source(), text, markdown_table(head, rows)]


def _peers(results: Sequence[Result]) -> list[str]:
    figures = Figures(results, "speed-peers")
    rows = []
    for mode in Mode:
        for kind in Kind:
            for way, title in _PEERS.items():
                name = f"{mode.value}_{kind.value}_{way}"
                if figures.has(f"{name}_s"):
                    rows.append([
                        f"{mode.value}, {kind.value}", title, figures.show(f"{name}_s"),
                        figures.show(f"{mode.value}_{way}_cap"), figures.interval(name), figures.verdict(name),
                    ])  # fmt: skip
    head = ["mode of mball, step", "way", "time", "cap", "times mball's", "target"]
    return ["## Peers in half the memory", figures.source(), markdown_table(head, rows)]


def _load(results: Sequence[Result]) -> list[str]:
    figures = Figures(results, "load")
    rows = []
    for way, title in TITLES.items():
        name, row = way.value, [title]
        for state in ("cold", "warm"):
            prefix = f"{state}_{name}"
            row += [figures.show(f"{prefix}_s"), figures.show(f"{prefix}_cpu_s"), figures.interval(prefix)]
            row.append(figures.verdict(prefix))
        if figures.has(f"cold_{name}") or figures.has(f"warm_{name}"):
            rows.append(row)
    head = ["way"]
    for state in ("cold", "warm"):
        head += [state, f"{state}, processor", f"{state}, ÷ mball.load_file", f"{state}, target"]
    bare = (
        f"{figures.show('size')} until every page of every tensor is in memory. Cold: a bare read of the file takes "
        f"{figures.show('cold_yardstick_s')}; into memory that is there mball reads at "
        f"{figures.interval('cold_disk_prefaulted')} of its speed, {figures.verdict('cold_disk_prefaulted')}, and "
        f"with the faults at {figures.interval('cold_disk_mball')}. Warm: what maps the page cache copies nothing."
    )
    return ["## Loading a checkpoint", figures.source(), bare, markdown_table(head, rows)]


def _start(results: Sequence[Result]) -> list[str]:
    figures = Figures(results, "speed-start")
    rows = []
    for mode in Mode:
        for percent in (50, 110):
            name = f"{mode.value}_cold_{percent}"
            if figures.has(name):
                rows.append([
                    f"{mode.value}, {percent} %", figures.show(f"{name}_s"),
                    figures.show(f"{name}_transformers_first_s"), figures.interval(name), figures.verdict(name),
                    figures.verdict(f"{name}_s"), figures.show(f"{name}_mball_stall_s"),
                    figures.show(f"{name}_mball_steady_s"), figures.show(f"{name}_mball_imports_s"),
                ])  # fmt: skip
    head = ["mode, budget", "first token", "transformers", "ratio", "target", "read + pass + 0.5 s"]
    head += ["longest wait, tokens 2–6", "token 6", "imports, apart"]
    parts = ["## Cold start", figures.source(), markdown_table(head, rows)]
    if figures.has("warm_compile"):
        parts.append(
            f"Second process, compiled code on disk: first token after {figures.show('warm_compile_s')}, "
            f"{figures.interval('warm_compile')} of eager mode's on graphs; {figures.verdict('warm_compile')}. Eager "
            f"mode by default: {figures.show('eager_default_first_s')}."
        )
    return parts


def _swap(results: Sequence[Result]) -> list[str]:
    figures = Figures(results, "speed-swap")
    rows = [
        [what, *(figures.show(f"swap_{who}_{act}_s") for who in ("mball", "bare", "fio")),
         figures.interval(f"swap_{act}"), figures.verdict(f"swap_{act}")]
        for act, what in (("write", "writes, with checksums"), ("both", "the same, and as many reads"))
        if figures.has(f"swap_{act}")
    ]  # fmt: skip
    if figures.has("swap_unchecked"):
        seconds = [figures.show(f"swap_{who}_s") for who in ("unchecked", "bare_write", "fio_write")]
        ratios = [figures.interval("swap_unchecked"), figures.verdict("swap_unchecked")]
        rows.insert(1, ["writes, without checksums", *seconds, *ratios])
    head = ["", "mball", "bare loop", "fio", "over the yardstick", "target"]
    parts = ["## Swap", figures.source(), markdown_table(head, rows)]
    if figures.has("swap_reads_beside"):
        parts.append(
            f"Reads beside writes that nobody waits for take {figures.interval('swap_reads_beside')} of alone."
        )
    if figures.has("swap_xxh3_s"):
        parts.append(
            f"For the checksums of a GB a core takes {figures.show('swap_xxh3_s')} with xxhash, "
            f"{figures.show('swap_crc32_s')} without."
        )
    return parts


def update(page: Path = PAGE, directory: Path = RESULTS) -> bool:
    """Rewrites the page from the result files; returns whether it changed. Raises SchemaError for a malformed file."""
    return rewrite(page, table(read_results(directory)))


def main() -> None:
    """Rewrites this checkout's page."""
    run_update(PAGE.name, update)


if __name__ == "__main__":
    main()
