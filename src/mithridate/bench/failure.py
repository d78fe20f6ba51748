"""Why a run failed: what is kept of its error in its directory, sealed by a checksum. Imports no torch by itself."""

import hashlib
import json
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mithridate.bench import store
from mithridate.core.errors import BusyError, StoreError, UserError, said


@dataclass(frozen=True)
class Failure:
    """Why a run failed.

    Args:
        kind: Class of the error, or how its process ended, such as `SIGKILL`.
        message: What is said of it, in a line.
        traceback: Where it was raised; empty if that is not known.
        told: Whether the message tells a user's mistake, with what to do; else something is broken.
        recorded: Whether `error.json` in the run's directory says so; it does not where the directory is another's.
    """

    kind: str
    message: str
    traceback: str = ""
    told: bool = False
    recorded: bool = False

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """What is to be kept of an error, as it was caught; a component from elsewhere that raised it is named."""
        from mithridate.core.culprit import culprit

        kind, told = type(error).__name__, isinstance(error, UserError)
        raised = error.__cause__ if told and error.__cause__ is not None else error
        whose = culprit(raised)
        if told:
            message = str(error)
        else:
            message = f"{whose} raised {kind}: {said(error)}." if whose else f"{kind}: {said(error)}."
        message = "".join(c if c.isprintable() else "?" for c in message)
        return cls(kind, message, "".join(traceback.format_exception(error)), told)

    @property
    def busy(self) -> bool:
        """Whether another process was at work on the run."""
        return self.kind == BusyError.__name__

    def write(self, directory: Path) -> "Failure":
        """Record it in the directory of the run, which the caller has locked; a finished run is left as it is.

        Raises:
            WriteError: The file system refuses.
        """
        if store.finished(directory):
            return self
        written = replace(self, recorded=True)
        content = asdict(written)
        store.write_json(directory / store.ERROR, {**content, "sha256": _checksum(content)})
        return written


def read_failure(directory: Path) -> Failure | None:
    """Why a run failed; None if it did not, or has been finished since.

    Raises:
        StoreError: The file is not as it was written.
    """
    path = directory / store.ERROR
    if store.finished(directory):
        return None
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("sha256")
        failure = Failure(**content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path} is damaged ({type(error).__name__}: {said(error)}); go on with --resume.") from error
    if checksum != _checksum(content):
        raise StoreError(f"{path} is damaged (it is not as it was written); go on with --resume.")
    return failure


def read_failures(directories: str | Path | Sequence[str | Path]) -> dict[str, str]:
    """Why runs in some directories (as in `store.read_runs`) failed, by name; or that its record is damaged."""
    reasons: dict[str, str] = {}
    for path in store.failed(directories):
        try:
            failure = read_failure(path)
        except StoreError as error:
            reasons[path.name] = str(error)
        else:
            reasons |= {path.name: failure.message} if failure else {}
    return reasons


def _checksum(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
