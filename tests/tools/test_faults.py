"""The fault harness: a few faults of each kind end well, and what does not end well is told."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OUTCOMES = ("refused", "redone", "same", "silent", "exception")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the harness forks and kills processes")


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, which the harness forks; `main` is its command."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(  # noqa: S603  (our own command)
        [sys.executable, "-c", f"import sys\nfrom tools.faults.__main__ import main\n{code}", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,  # of a busy machine, too
    )


def counts(output: str, kind: str) -> dict[str, int]:
    """The row of a kind in the table."""
    (row,) = [line.split() for line in output.splitlines() if line.startswith(kind)]
    return dict(zip(("cases", *OUTCOMES), map(int, row[1:7]), strict=True))


COUNTS = {
    "kills": (9, 14),
    "grids": (20, 3),
    "files": (30, 10),
    "recipes": (100, 10),
    "batches": (100, 4),
    "flower": (22, 6),
}
"""Cases of each kind: in the library as it is, and with a fault of its own."""

PLANTED = {
    "kills": (
        "from mithridate.training.learner import Learner; restore = Learner.restore\n"
        "Learner.restore = lambda self, snapshot: None if 0 < snapshot.step < 5 else restore(self, snapshot)"
    ),
    "grids": (
        "import tools.faults.grids as g\n"  # a command that goes on, in one process, draws from another seed
        "g.START = g.START.replace('if __name__', 'if Path(sys.argv[2]).exists() and sys.argv[4] == str(1):\\n'\n"
        "    '    import mithridate.bench.running as r; run_online = r.run_online\\n'\n"
        "    '    r.run_online = lambda *a, **o: run_online(*a, **{**o, \"seed\": 99})\\nif __name__', 1)"
    ),
    "files": (
        "import mithridate.bench.store as s, dataclasses, random; read = s.read_run\n"
        "s.read_run = lambda path: dataclasses.replace(read(path), environment={'torch': random.random()})"
    ),
    "recipes": "import mithridate.bench.recipe as r; r.apply_change = lambda *_: {}['no such key']",
    "batches": (
        "from mithridate.training.learner import Learner; import torch; update = Learner.update\n"
        "def broken(self, batch):\n"
        "    next(self.model.parameters()).data.view(-1)[0] = torch.nan\n"
        "    return update(self, batch)\n"
        "Learner.update = broken"
    ),
    "flower": (
        "from mithridate.guard.flower import GuardedStrategy as G\n"
        "G.aggregate_train = lambda self, n, replies: self.inner.aggregate_train(n, list(replies))"
    ),
}


THREE_TIMES = """
import contextlib, importlib, io, json, tempfile
from pathlib import Path

kind, sound, broken, fault_of_the_library = sys.argv[1:]
module = importlib.import_module(f"tools.faults.{kind}")
told = []

def call(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        code = main([kind, "--seed", "7", *arguments])
    told.append((text.getvalue(), code))

with tempfile.TemporaryDirectory() as shared:
    fault = module.make(7, Path(shared))
    fault.prepare()  # once: it is most of the time
    fault.prepare = lambda: None
    module.make = lambda seed, folder: fault
    call("--count", sound)
    exec(fault_of_the_library, {})
    call("--count", broken)
    hint = next((line for line in told[-1][0].splitlines() if "--only" in line), "--only none")
    call("--only", hint.split()[-1])
print(json.dumps([*told, hint]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_a_few_of_each_kind_end_well_and_a_fault_of_the_library_is_told(kind: str) -> None:
    """And a case that ended badly can be seen again as the harness says."""
    if kind == "flower" and importlib.util.find_spec("flwr") is None:
        pytest.skip("the extra 'flower' is not installed")
    sound, broken = COUNTS[kind]
    ended = run(THREE_TIMES, kind, sound, broken, PLANTED[kind])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (well, code), (badly, failed), (again, failed_again), hint = json.loads(ended.stdout)
    row = counts(well, kind)
    assert (code, row["silent"], row["exception"]) == (0, 0, 0), well
    assert row["cases"] >= sound
    assert row["refused"] + row["redone"] > 0  # the faults were felt
    row = counts(badly, kind)
    assert failed == 1, badly
    assert row["silent"] + row["exception"] > 0
    assert hint.split()[:-1] == ["python", "-m", "tools.faults", kind, "--seed", "7", "--only"]
    if kind != "grids":  # whose kills are at moments, which fall elsewhere the next time, on a busy machine above all
        assert failed_again == 1, badly + again


@dataclass
class Staged:
    """Cases that end in every way that a process can end."""

    full: int = 5

    def prepare(self) -> None:
        pass

    def case(self, number: int, folder: Path) -> "object":
        from tools.faults.case import Result

        match number:
            case 0:
                return Result("same", "all is well")
            case 1:
                raise KeyError("lost")
            case 2:
                os.kill(os.getpid(), signal.SIGKILL)
            case 3:
                time.sleep(60)
        return Result("refused", "in words", size=3)


def test_whatever_a_case_does_the_others_go_on(tmp_path: Path) -> None:
    """Dying, hanging and raising are told of the case that did it, and of no other."""
    pytest.importorskip("tools.faults.processes")
    from tools.faults.processes import results

    ended = dict(results(Staged(), range(5), tmp_path, jobs=2, chunk=5, limit=1.0))  # type: ignore[arg-type]  # a stage
    assert {number: result.outcome for number, result in ended.items()} == {
        0: "same",
        1: "exception",
        2: "exception",
        3: "exception",
        4: "refused",
    }
    assert "KeyError" in ended[1].said
    assert "died" in ended[2].said
    assert "hung" in ended[3].said
    assert ended[4].size == 3
    assert not list(tmp_path.glob("case-0*"))


def test_an_unknown_kind_is_refused() -> None:
    ended = run("sys.exit(main())", "kils", "--count", 1)
    assert ended.returncode == 2
    assert "no kind kils" in ended.stderr
