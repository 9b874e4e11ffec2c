"""The command `mball`: `demo`, `doctor`, `plan` and `top`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mball.errors import MballError

TOP_INTERVAL_S = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments` (default: the process's) and returns the exit status.

    0 is success, 1 a check that failed (a demo with two answers, a doctor who found a mandatory part missing),
    2 an error of mball's or a wrong command line, 130 Ctrl-C (which is also how one leaves `top`).
    """
    parser = argparse.ArgumentParser(prog="mball", description="Runs PyTorch models in less memory than they need.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="a language model answers under a memory budget far below its size")
    demo.add_argument("--budget", default="80MiB", help="memory for weights, KV cache and activations (default 80MiB)")
    demo.add_argument("--prompt", default="Why is the sky blue?", help="the question (default: %(default)s)")
    demo.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="length of the answer, at most")
    doctor = commands.add_parser("doctor", help="what this machine has, lacks, and what to do about it")
    doctor.add_argument("--directory", default=".", help="where checkpoints lie: its disk is measured (default: here)")
    doctor.add_argument(
        "--calibrate",
        nargs="?",
        const="",
        metavar="DIRECTORY",
        help="measure that disk for half a minute (or by a file on it), and keep the figures for plans to come",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of tables")
    plan = commands.add_parser("plan", help="what a budget would do to a checkpoint or a trace, before anything runs")
    plan.add_argument("source", help="a safetensors file, a checkpoint directory, or a trace (mball.save_trace)")
    plan.add_argument("--budget", required=True, help="memory for weights and activations, such as 6GiB")
    plan.add_argument("--bandwidth", help="bytes a second of the disk, such as 2GB (default: calibrated or measured)")
    plan.add_argument("--host-budget", help="host memory that weights come through to a GPU, such as 64GiB")
    plan.add_argument(
        "--offload-budget", help="the most that what is offloaded may take at one time below the device, such as 8GiB"
    )
    plan.add_argument("--link-bandwidth", help="bytes a second from there to the GPU (default 20GB)")
    plan.add_argument("--curve", action="store_true", help="show what other budgets would give")
    plan.add_argument("--picture", metavar="FILE.png", help="draw memory and lanes over time (and the curve)")
    plan.add_argument("--json", action="store_true", help="print JSON instead of text")
    top = commands.add_parser("top", help="memory of this machine and its GPUs, and who holds it, live")
    top.add_argument(
        "--interval", type=_seconds, metavar="SECONDS", help=f"from look to look (default {TOP_INTERVAL_S})"
    )
    top.add_argument("--once", action="store_true", help="look once, and end (so it does where there is no terminal)")
    top.add_argument("--json", action="store_true", help="look once, and print JSON instead of tables")
    options = parser.parse_args(arguments)
    try:
        # Each command loads what it needs: `--help` and the doctor must work where half of it is missing.
        if options.command == "demo":
            from mball.cli.demo import run_demo

            return run_demo(budget=options.budget, prompt=options.prompt, max_new_tokens=options.max_new_tokens)
        if options.command == "plan":
            from mball.cli.plan import Request, run_plan

            return run_plan(
                Request(
                    source=options.source,
                    budget=options.budget,
                    bandwidth=options.bandwidth,
                    host_budget=options.host_budget,
                    offload_budget=options.offload_budget,
                    link_bandwidth=options.link_bandwidth,
                    curve=options.curve,
                    picture=options.picture,
                    as_json=options.json,
                )
            )
        if options.command == "top":
            from mball.cli.top import View, run_top

            view = View.JSON if options.json else View.TABLES if options.once else View.LIVE
            return run_top(view, interval_s=options.interval)
        if options.calibrate is not None:
            from mball.cli.calibrate import run_calibrate

            return run_calibrate(where=options.calibrate or options.directory, as_json=options.json)
        from mball.cli.doctor import run_doctor

        return run_doctor(directory=options.directory, as_json=options.json)
    except MballError as error:
        print(f"mball {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0.1 <= number <= 3600:
        raise argparse.ArgumentTypeError(f"must be 0.1 to 3600 seconds, not {text}")
    return number
