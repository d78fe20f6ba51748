"""What `mithridate audit` does: run it, print the verdict and the lines that say it all, and where the page is."""

from pathlib import Path

from mithridate.audit import AuditPlan, run
from mithridate.audit.output.evidence import lines
from mithridate.audit.result import Audited
from mithridate.cli.terminal import err, out

STYLE = {"pass": "bold green", "fail": "bold red", "inconclusive": "bold yellow"}


def audit_and_print(plan: AuditPlan, out_dir: Path) -> Audited:
    """Audit, with a line on standard error for every run that ends.

    Args:
        plan: What and how.
        out_dir: Where the files go.

    Raises:
        UserError: The plan, the user's function or the folder cannot work.
    """
    audited = run(
        plan,
        out=out_dir,
        watch=lambda line: err.print(line, style="dim", markup=False, highlight=False, soft_wrap=True),
    )
    out.print(audited.verdict.upper(), style=STYLE[audited.verdict], end=": ", highlight=False)
    for line in [audited.statement, *lines(audited), f"page: {out_dir / 'audit.html'}"]:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    return audited
