"""Run faults and say how they ended: `python -m tools.faults [KIND ...] [--count N] [--seed S]`."""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from tools.faults.case import BAD, OUTCOMES, Fault, Outcome, Result, UnpreparedError

KINDS = ("kills", "grids", "trainer", "files", "recipes", "batches", "flower")
CHUNKS = {"kills": 8, "grids": 2, "trainer": 10, "files": 16, "recipes": 200, "batches": 100, "flower": 20}
"""Cases a process."""

SECONDS = 300
"""After which a case hangs, on a busy machine, too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print a table; 1 if a case was bad, 2 if a kind cannot be run here."""
    parser = argparse.ArgumentParser(prog="python -m tools.faults", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)}; all of them by default")
    parser.add_argument("--count", type=int, help="cases of each kind; by default those of a full run")
    parser.add_argument("--seed", type=int, default=0, help="decides every fault; 0 by default")
    parser.add_argument("--only", type=int, metavar="N", help="the case of this number alone, with all that it says")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time; 2 by default")
    options = parser.parse_args(arguments)
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"no kind {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded; and threads do not survive a fork
    print(f"{'kind':<9}{'cases':>7}" + "".join(f"{name:>11}" for name in OUTCOMES) + f"{'seconds':>9}", flush=True)
    codes = [_run(kind, options) for kind in options.kinds or KINDS]
    return max(codes)


def _run(kind: str, options: argparse.Namespace) -> int:
    from tools.faults.processes import results

    try:
        module = import_module(f"tools.faults.{kind}")
    except ModuleNotFoundError as error:
        print(f"{kind:<9} cannot be run: {error}; install the extras `test` and `loops`", file=sys.stderr)
        return 2
    import torch

    torch.set_num_threads(1)
    began, counts, bad = time.monotonic(), Counter[Outcome](), list[tuple[int, Result]]()
    with tempfile.TemporaryDirectory(prefix=f"faults-{kind}-") as folder:
        shared, cases = Path(folder) / "shared", Path(folder) / "cases"
        shared.mkdir()
        cases.mkdir()
        fault: Fault = module.make(options.seed, shared)
        try:
            fault.prepare()
        except UnpreparedError as error:
            print(f"{kind:<9} cannot be prepared: {error}", file=sys.stderr)
            return 1
        numbers = range(options.count or fault.full) if options.only is None else [options.only]
        for number, result in results(fault, numbers, cases, jobs=options.jobs, chunk=CHUNKS[kind], limit=SECONDS):
            counts[result.outcome] += result.size
            if result.outcome in BAD:
                bad.append((number, result))
            if options.only is not None:
                print(f"{result.outcome}: {result.what}\n  {result.said}")
    cells = "".join(f"{counts[name]:>11}" for name in OUTCOMES)
    print(f"{kind:<9}{counts.total():>7}{cells}{time.monotonic() - began:>9.0f}", flush=True)
    for number, result in sorted(bad):
        print(f"  {result.outcome}: {_short(result.what)}: {_short(result.said)}")
        print(f"    python -m tools.faults {kind} --seed {options.seed} --only {number}", flush=True)
    return int(bool(bad))


def _short(text: str, most: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"


if __name__ == "__main__":
    sys.exit(main())
