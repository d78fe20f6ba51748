"""What every aggregator must pass."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mithridate.core.aggregator import Aggregator, Context, Property, Spread
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.registry import entries
from mithridate.maths.rows import lengths
from mithridate.testing.checks.evidence import Evidence
from mithridate.testing.checks.subject import Check, entry_of, fields_in, fresh, named_choices, variants
from mithridate.testing.checks.witness import Witness, bits, through_file, unsaveable

ROWS, WIDTH = 24, 7
SCALES = (1e-4, 1.0, 1e4)
"""Typical sizes of an entry: bounds in the units of the rows bind at some of them."""
SIZES = (0.5, 3.0, 1e3, 1e10, 1e30)
"""How long hostile rows are, in honest deviations."""
SEEDS = range(4)
TOLERANCE = 1e-8
"""Relative, in float64."""


class Round(NamedTuple):
    """One round of honest clients.

    Args:
        rows: (n, P).
        context: Of the round.
        scale: Typical size of an entry.
    """

    rows: Tensor
    context: Context
    scale: float


def a_round(seed: int, scale: float = 1.0, n: int = ROWS, dtype: torch.dtype = torch.float64) -> Round:
    """Honest rows around a common point, with the server's own update near it."""
    rng = torch.Generator().manual_seed(seed)
    point = torch.randn(WIDTH, generator=rng, dtype=torch.float64)
    rows = scale * (point + torch.randn(n, WIDTH, generator=rng, dtype=torch.float64))
    own = scale * (point + 0.3 * torch.randn(WIDTH, generator=rng, dtype=torch.float64))
    clients = 3 * torch.randperm(n, generator=rng) + 1
    context = Context(clients=clients, rng=torch.Generator().manual_seed(seed), trusted=own.to(dtype))
    return Round(rows.to(dtype), context, scale)


def rounds(n: int = ROWS) -> Iterator[Round]:
    """Rounds of every seed and scale."""
    for seed in SEEDS:
        for scale in SCALES:
            yield a_round(seed, scale, n)


def again(context: Context, **changes: Any) -> Context:  # noqa: ANN401  (fields of a context)
    """The same context with its own notes and a generator in the same state."""
    rng = torch.Generator()
    rng.set_state(context.rng.get_state())
    return dataclasses.replace(context, **{"rng": rng, "memory": dict(context.memory), **changes})


@lru_cache(maxsize=64)
def settings_of(cls: type) -> tuple[Aggregator, ...]:
    """The rule with its defaults, with other settings that all rules name alike, and around every other rule."""
    tables: list[Mapping[str, Any]] = [{}, *entry_of(cls).presets.values(), *named_choices(cls)]
    tables += [fields_in(cls, {"hostile": 1}), fields_in(cls, {"worker_momentum": 0.5})]
    if "inner" in entry_of(cls).fields:
        tables += [{"inner": {"name": inner}} for inner in entries("aggregator")]
    return tuple(variants(cls, tables))


@lru_cache(maxsize=64)
def exercised(cls: type) -> Evidence:
    """What is found when a rule aggregates two rounds in all its settings; tried once."""
    evidence = Evidence()
    with evidence.trying(cls.__name__):
        for rule in settings_of(cls):
            with evidence.trying(rule):
                _run_and_resume(rule, evidence)
        if evidence.crashed:
            return evidence
        for rule in settings_of(cls):
            with evidence.trying(rule, "dtype"):
                _try_float32(rule, evidence)
    return evidence


def _run_and_resume(rule: Aggregator, evidence: Evidence) -> None:
    """Two rounds; then the first again, and the second from notes that were saved, by another object."""
    (rows, before, _), (later, after, _) = a_round(0), a_round(1)
    weights = torch.arange(1.0, ROWS + 1)
    context = again(before, weights=weights)
    handed = {"rows": rows, "clients": context.clients, "weights": weights, "trusted": context.trusted}
    with Witness(rule, evidence).watching("aggregate", handed, notes=context.memory):
        made = rule.aggregate(rows.requires_grad_(), context)
    rows = rows.detach()
    if made.requires_grad:
        evidence.add("shape", rule, "gives a result that carries a gradient")
    if rule.remembers_clients and not context.memory:
        evidence.add("notes", rule, "says that it keeps notes on clients, and has none")
    if unsaveable(context.memory):
        return  # that is on record
    saved = through_file(context.memory)
    first = bits(made)
    made.add_(1.0)
    if any(bits(note) != bits(saved[key]) for key, note in context.memory.items()):
        evidence.add("notes", rule, "hands out its notes: what is done to its result is done to them")
        return
    other = fresh(rule)
    if bits(other.aggregate(rows, again(before, weights=weights))) != first:
        evidence.add("repeats", rule, "gives other bits the second time")
    second = rule.aggregate(later, again(after, memory=context.memory))
    if bits(other.aggregate(later, again(after, memory=saved))) != bits(second):
        evidence.add("resumes", rule, "goes on otherwise once its notes were saved")


def _try_float32(rule: Aggregator, evidence: Evidence) -> None:
    """float32 rows give float32, near the float64 result."""
    rows, context, _ = a_round(1, dtype=torch.float32)
    made = rule.aggregate(rows, again(context))
    exact = rule.aggregate(rows.double(), again(context))
    if (made.dtype, made.shape) != (torch.float32, (WIDTH,)):
        evidence.add("dtype", rule, f"makes {made.dtype} {tuple(made.shape)} of float32 {tuple(rows.shape)}")
    elif not torch.allclose(made.double(), exact, rtol=1e-5, atol=1e-5):
        evidence.add("dtype", rule, "loses precision in float32")


def _working(cls: type) -> tuple[Aggregator, ...]:
    """The settings in which a rule is judged; none if it fails to run, which is on record."""
    return () if exercised(cls).crashed else settings_of(cls)


def check_gives_no_gradient(cls: type) -> None:
    """The result carries no gradient, even of rows that do."""
    exercised(cls).require("shape")


def _close(made: Tensor, expected: Tensor, size: float) -> bool:
    return bool(((made - expected).abs() <= TOLERANCE * size).all())


def check_any_order(cls: type) -> None:
    """Clients in another order give the same result, in the first round and in the second."""
    for rule in _working(cls):
        for now in rounds():
            order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(9))
            weights = torch.arange(1, ROWS + 1).double()
            plain = again(now.context, weights=weights)
            turned = again(now.context, weights=weights[order], clients=now.context.clients[order])
            for _ in range(2):
                first, second = rule.aggregate(now.rows, plain), rule.aggregate(now.rows[order], turned)
                assert _close(first, second, 10 * now.scale), f"{rule} depends on the order of the clients"


def _holds_or_is_declared(cls: type, name: Property, broken: Callable[[Aggregator, Round], bool]) -> None:
    for rule in _working(cls):
        failing = [now.scale for now in rounds() if broken(rule, now)]
        if name not in rule.unmet:
            assert not failing, f"{rule} lacks the property '{name}' (rows of scale {failing[0]:g}); mend or declare it"
        else:
            assert failing, f"{rule} declares that it lacks '{name}', and has it"
            assert len(rule.unmet[name]) > 10, f"{rule} gives no reason for lacking '{name}'"


def check_translation(cls: type) -> None:
    """All rows moved by a vector move the result by it, unless the class says why not."""

    def broken(rule: Aggregator, now: Round) -> bool:
        shift = now.scale * torch.linspace(-20, 30, WIDTH, dtype=torch.float64)
        still, moved = (rule.aggregate(rows, again(now.context)) for rows in (now.rows, now.rows + shift))
        return not _close(moved, still + shift, 100 * now.scale)

    _holds_or_is_declared(cls, "translation", broken)


def check_scale(cls: type) -> None:
    """Rows and trusted update times c give the result times c, unless the class says why not."""

    def broken(rule: Aggregator, now: Round) -> bool:
        assert now.context.trusted is not None
        large = again(now.context, trusted=1000 * now.context.trusted)
        once, times = rule.aggregate(now.rows, again(now.context)), rule.aggregate(1000 * now.rows, large)
        return not _close(times, 1000 * once, 10_000 * now.scale)

    _holds_or_is_declared(cls, "scale", broken)


def check_consensus(cls: type) -> None:
    """Identical rows give that row, unless the class says why not."""

    def broken(rule: Aggregator, now: Round) -> bool:
        made = rule.aggregate(now.rows[:1].repeat(ROWS, 1), again(now.context))
        return not _close(made, now.rows[0], 10 * now.scale)

    _holds_or_is_declared(cls, "consensus", broken)


def hostile_rows(honest: Tensor, count: int, size: float, how: str, seed: int) -> Tensor:
    """Rows of attackers that know the honest ones: (count, P).

    Args:
        honest: (n, P).
        count: How many.
        size: How far they go, in honest deviations of each column.
        how: `apart`: each its own way; `together`: all send one row; `lean`: along the honest deviations, around the
            mean; `beside`: together, just outside the box of the honest rows.
        seed: Of directions.
    """
    rng = torch.Generator().manual_seed(seed)
    mean, deviation = honest.mean(0), honest.std(0, correction=0)
    if how == "apart":
        return mean + size * deviation * torch.randn(count, honest.shape[1], generator=rng, dtype=honest.dtype)
    if how == "together":
        return (mean + size * deviation * torch.randn(honest.shape[1], generator=rng, dtype=honest.dtype)).repeat(
            count, 1
        )
    if how == "lean":
        return mean - size * deviation * torch.rand(count, 1, generator=rng, dtype=honest.dtype)
    return (honest.amax(0) + 0.01 * size * deviation).repeat(count, 1)


def outside(made: Tensor, honest: Tensor) -> float:
    """The l2 distance of a point from the smallest box around some rows."""
    low, high = honest.amin(0), honest.amax(0)
    return float(lengths((made - made.clamp(low, high)).unsqueeze(0)))


def _attacked(rule: Aggregator, count: int) -> Iterator[tuple[float, float, str]]:
    """Under every attack by `count` clients: distance from the honest box, the worst_deviation and what was done."""
    for seed in SEEDS:
        for scale in SCALES:
            rows, context, _ = a_round(seed, scale)
            honest = rows[: ROWS - count]
            allowed = rule.worst_deviation(Spread.of(honest), ROWS, context)
            for how in ("apart", "together", "lean", "beside"):
                for size in SIZES:
                    sent = torch.cat([honest, hostile_rows(honest, count, size, how, seed)])
                    made = rule.aggregate(sent, again(context))
                    yield outside(made, honest) / scale, allowed / scale, f"{how}, size {size:g}, scale {scale:g}"


def check_hostile_rows(cls: type) -> None:
    """With as many hostile rows as it stands, of any size, it stays as near to the honest box as it says."""
    for rule in _working(cls):
        count = min(rule.most_hostile(ROWS), ROWS - 2)  # two honest rows are the fewest that have a spread
        if count == 0:
            continue
        for distance, allowed, how in _attacked(rule, count):
            assert distance <= allowed + 1e-6, (
                f"{rule}: {count} hostile of {ROWS} rows ({how}) take it {distance:g} out of the box; "
                f"{allowed:g} is allowed"
            )


def check_average_is_declared(cls: type) -> None:
    """A rule that is declared not robust stands none, and one row does take it out of the box; another stands some."""
    for rule in _working(cls):
        if rule.average:
            assert rule.most_hostile(ROWS) == 0, f"{rule} is declared an average and claims to stand hostile rows"
            assert any(distance > 1 for distance, _, _ in _attacked(rule, 1)), f"{rule} is robust, and says it is not"
        else:
            assert rule.most_hostile(ROWS) > 0, (
                f"{rule} stands no hostile row of {ROWS}, and is not declared an average"
            )


def check_weights(cls: type) -> None:
    """A rule that uses weights forgets rows of weight zero; another gives the same bits with and without them."""
    for rule in _working(cls):
        rows, context, _ = a_round(2)
        weights = (torch.arange(ROWS) % 3).double()
        plain = rule.aggregate(rows, again(context))
        with_weights = rule.aggregate(rows, again(context, weights=weights))
        if not rule.weighted:
            assert torch.equal(plain, with_weights), f"{rule} uses weights and does not declare it"
            continue
        assert not torch.allclose(plain, with_weights), f"{rule} declares that it uses weights, and does not"
        more = rule.aggregate(rows, again(context, weights=1e300 * weights))
        assert torch.allclose(with_weights, more), f"{rule} depends on the unit of the weights"


def check_number_of_rows(cls: type) -> None:
    """Any number of rows works or is refused with the bound; none is refused; what it stands grows with the rows."""
    for rule in _working(cls):
        stands = [rule.most_hostile(n) for n in range(1, 40)]
        assert stands == sorted(stands), f"{rule} stands fewer hostile rows among more"
        assert all(0 <= f <= n for n, f in enumerate(stands, start=1)), (
            f"{rule} stands more hostile rows than there are"
        )
        for n in range(1, 13):
            rows, context, _ = a_round(0, n=n)
            try:
                rule.check(n)
            except ConfigError as error:
                if f"{n} rows" not in str(error):
                    raise AssertionError(f"{rule} does not say how many rows were too few: {error}") from error
                continue
            rule.aggregate(rows, context)
        try:
            rule.aggregate(torch.zeros(0, WIDTH), Context(clients=torch.zeros(0).long(), rng=torch.Generator()))
        except ConfigError:
            continue
        raise AssertionError(f"{rule} makes an update of no rows")


def check_unusable_rows(cls: type) -> None:
    """Rows with NaN or infinity are refused, by the client's id."""
    for rule in _working(cls):
        for value, dtype in product((torch.nan, torch.inf, -torch.inf), (torch.float32, torch.float64)):
            rows, context, _ = a_round(0, dtype=dtype)
            rows[5, 2] = value
            try:
                rule.aggregate(rows, context)
            except DataError as error:
                if f"client {int(context.clients[5])} " not in str(error):
                    raise AssertionError(f"{rule} does not say whose row is unusable: {error}") from error
                continue
            raise AssertionError(f"{rule} takes a row that holds {value}")


CHECKS: Sequence[Check] = (
    check_gives_no_gradient,
    check_any_order,
    check_translation,
    check_scale,
    check_consensus,
    check_hostile_rows,
    check_average_is_declared,
    check_weights,
    check_number_of_rows,
    check_unusable_rows,
)
