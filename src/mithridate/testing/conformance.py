"""Whether a component keeps the rules of its kind: one line in its author's test."""

from collections.abc import Sequence

from mithridate.core.errors import ConfigError, nearest
from mithridate.core.registry import KINDS, Kind, entries, entry
from mithridate.testing.checks.component import CHECKS
from mithridate.testing.checks.subject import Check, entry_of


def component_checks(kind: Kind) -> Sequence[Check]:
    """The checks of a kind: functions that take a class and raise AssertionError with what is wrong.

    For tests that name each check::

        @pytest.mark.parametrize("check", component_checks("attack"), ids=lambda check: check.__name__)
        def test_my_attack(check):
            check(MyAttack)

    Args:
        kind: Of the component.

    Raises:
        ConfigError: There is no such kind.
    """
    if kind not in CHECKS:
        raise ConfigError(f"there is no kind of component '{kind}': {nearest(kind, CHECKS)}")
    return CHECKS[kind]


def check_component(component: type | str, *, kind: Kind | None = None) -> None:
    """Run every check of its kind on a component.

    Args:
        component: Its class, registered or not; or the name under which it is registered.
        kind: Which one is meant, where components of several kinds have that name.

    Raises:
        AssertionError: It breaks rules; says all of them, each with the name of its check.
        ConfigError: It is no component, or its name belongs to none or to several.
    """
    cls = _class_of(component, kind) if isinstance(component, str) else component
    known = entry_of(cls)
    checks = component_checks(known.kind)
    faults, first = [], None
    for check in checks:
        try:
            check(cls)
        except Exception as error:  # a check is where an author's code may raise anything
            first = first or error
            said = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            faults.append(f"- {check.__name__}: {said}")
    if faults:
        told = "\n".join(faults)
        raise AssertionError(
            f"{known.kind} {known.name} ({cls.__name__}) fails {len(faults)} of {len(checks)} checks:\n{told}"
        ) from first


def _class_of(name: str, kind: Kind | None) -> type:
    kinds = [one for one in KINDS if name in entries(one)] if kind is None else [kind]
    if len(kinds) > 1:
        raise ConfigError(f"'{name}' is the name of {' and '.join(kinds)}: say which with `kind`.")
    if not kinds:
        raise ConfigError(f"no component is named '{name}': say its `kind` for a list, or give its class.")
    return entry(kinds[0], name).cls
