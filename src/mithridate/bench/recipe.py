"""Recipes: TOML tables -> settings objects -> the grid of runs (attack x defence x seed) that they ask for."""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from mithridate.bench.changes import ARRAYS, TABLES, Table, apply_change, check_depth, check_size, expanded, label_of
from mithridate.bench.inheritance import EXTENDS, inherited
from mithridate.bench.store import run_id
from mithridate.bench.surrogate import Surrogate
from mithridate.core import registry
from mithridate.core.attack import Attack
from mithridate.core.defence import Defence
from mithridate.core.errors import ConfigError, nearest, shown
from mithridate.core.files import path_of
from mithridate.core.modes import BatchNormMode
from mithridate.core.past import older_epoch
from mithridate.core.registry import Kind, config_of, fields_of, make
from mithridate.core.settings import UNSET
from mithridate.core.update_attack import UpdateAttack
from mithridate.core.view import Need
from mithridate.core.watch import Detector, Monitor
from mithridate.data.shards import Shards
from mithridate.data.stream import StreamSettings
from mithridate.simulation.clients import FederatedRun
from mithridate.simulation.online import OnlineRun
from mithridate.training.burn_in import BurnIn

__all__ = ["TABLES", "Cell", "Labelled", "Recipe", "Surrogate", "Table", "apply_change", "make_recipe", "read_recipe"]

PATHS = (("data", "path"), ("burn_in", "checkpoint"))
"""Settings that are paths."""

MOST = 1000
"""Runs of a recipe at most, if nobody says that more are meant."""

LARGEST_FLOAT = 3.4028234e38

_KEYS = ("title", "variant", "plugins")
"""What stands before the tables."""
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")

C = TypeVar("C")


@dataclass(frozen=True)
class Labelled(Generic[C]):
    """A component and what tables, figures and run ids call it.

    Args:
        label: Letters, digits, `.`, `_`, `+`, `-`; unique among the recipe's components of that kind.
        component: The settings object.
    """

    label: str
    component: C

    def config(self) -> Table:
        """The table that builds it, label included where it says more than the name."""
        table = config_of(self.component)
        return table if table["name"] == self.label else {**table, "label": self.label}


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Args:
        attack: What happens to the stream.
        defence: What stands before the model.
        seed: Decides everything that is drawn.
        recipe: The recipe that it is a cell of: of several variants its own; of several robust rules and surrogates
            with its own in `run` and `surrogate`.

    Raises:
        ConfigError: A component looks back at a model that the burn-in does not keep.
    """

    attack: Labelled[Attack] | Labelled[UpdateAttack]
    defence: Labelled[Defence]
    seed: int
    recipe: "Recipe"

    def __post_init__(self) -> None:
        kept, length = self.recipe.burn_in.older_epochs, self.recipe.burn_in.epochs
        surrogate = self.recipe.surrogate
        if Need.SURROGATE in self.attack.component.needs and surrogate.kind == "checkpoint":
            older_epoch(surrogate.epoch, kept, length, who="[surrogate]")
        for kind, labelled in (
            ("attack", self.attack),
            ("defence", self.defence),
            *(("detector", detector) for detector in self.recipe.detectors),
        ):
            for epoch in labelled.component.old_epochs:
                older_epoch(epoch, kept, length, who=f"{kind} {labelled.label}")

    @property
    def run_id(self) -> str:
        """The name of its directory."""
        return run_id(self.attack.label, self.defence.label, self.seed, variant=self.recipe.variant)

    @property
    def burn_in_seed(self) -> int:
        """What the burn-in draws from."""
        seed = self.recipe.burn_in.seed
        return self.seed if seed is None else seed

    def config(self) -> Table:
        """The resolved settings, itself a valid recipe of this one run."""
        r = self.recipe
        monitors = [m.config() for m in r.monitors]
        uses_surrogate = Need.SURROGATE in self.attack.component.needs
        return {
            "title": r.title,
            **({"variant": r.variant} if r.variant else {}),
            **({"plugins": list(r.plugins)} if r.plugins else {}),
            "data": fields_of(r.data.resolved()),
            "model": config_of(r.model),
            "burn_in": fields_of(r.burn_in),
            **({"surrogate": fields_of(r.surrogate)} if uses_surrogate else {}),
            "attack": self.attack.config(),
            "defence": self.defence.config(),
            **({"detector": [d.config() for d in r.detectors]} if r.detectors else {}),
            "monitor": monitors[0] if len(monitors) == 1 else monitors,
            **({"clients": fields_of(r.clients)} if r.clients else {}),
            "federated" if r.clients else "run": {**fields_of(r.run), "seeds": [self.seed]},
        }


@dataclass(frozen=True)
class Recipe:
    """A whole experiment.

    Args:
        title: One line.
        data: Which samples, in what portions.
        model: Settings of the architecture; has `build(info, seed=...)`.
        burn_in: Training before the stream.
        attacks: One row of the grid each.
        defences: One column each.
        detectors: Score every batch of every run.
        surrogate: What attackers without access to the victim's model craft on.
        surrogates: Several of those, by label: a run of each such attack for each. Empty: the one of `surrogate`.
        monitors: Watch every run.
        run: Length and options of the loop.
        rules: Robust rules of a federation's server, by label: a run of each pair for each. Empty: the rule of `run`.
        seeds: One run of each pair a seed.
        clients: How samples are divided among the clients of a federation; None for an online run.
        plugins: Loaded before anything is looked up: modules by name, files by their absolute path.
        variant: What run ids call it, where it is one of several.
        variants: The recipes that a grid makes of this one, which is then the first of them.
    """

    title: str
    data: StreamSettings
    model: Any
    burn_in: BurnIn
    attacks: Sequence[Labelled[Attack]] | Sequence[Labelled[UpdateAttack]]
    defences: Sequence[Labelled[Defence]]
    monitors: Sequence[Labelled[Monitor]]
    run: OnlineRun | FederatedRun
    seeds: Sequence[int]
    detectors: Sequence[Labelled[Detector]] = ()
    surrogate: Surrogate = field(default_factory=Surrogate)
    surrogates: Mapping[str, Surrogate] = field(default_factory=dict)
    clients: Shards | None = None
    rules: Mapping[str, FederatedRun] = field(default_factory=dict)
    plugins: Sequence[str] = ()
    variant: str = ""
    variants: Sequence["Recipe"] = ()

    @property
    def ood(self) -> str | None:
        """The other image set that detectors score, if any."""
        return self.run.ood if isinstance(self.run, OnlineRun) else None

    @property
    def update_mode(self) -> BatchNormMode:
        """BatchNorm in the victim's updates."""
        return self.run.update_mode if isinstance(self.run, OnlineRun) else "train"

    def each(self) -> Sequence["Recipe"]:
        """The variants, each a recipe by itself; this one alone where no grid makes any."""
        return self.variants or [self]

    def cells(self) -> Iterator[Cell]:
        """All runs, those that share a burn-in next to each other."""
        for recipe in self.each():
            for seed in recipe.seeds:
                for defence in recipe.defences:
                    for attack in recipe.attacks:
                        yield from recipe._cells(attack, defence, seed)

    def _cells(self, attack: Labelled[Any], defence: Labelled[Defence], seed: int) -> Iterator[Cell]:
        """The runs of a pair with a seed: under every rule, on every surrogate if the attack crafts on one."""
        needed = self.surrogates if Need.SURROGATE in attack.component.needs else {}
        rules: Mapping[str, OnlineRun | FederatedRun] = self.rules or {"": self.run}
        for rule, run in rules.items():
            by_rule = rule if rule and defence.label == "none" else "+".join(filter(None, [defence.label, rule]))
            for label, surrogate in (needed or {"": self.surrogate}).items():
                one = replace(self, run=run, rules={}, surrogate=surrogate, surrogates={})
                by_surrogate = f"{attack.label}+{label}" if label else attack.label
                yield Cell(replace(attack, label=by_surrogate), replace(defence, label=by_rule), seed, one)


def read_recipe(
    path: str | Path,
    *,
    plugins: Sequence[str] = (),
    changes: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    defences: Sequence[str] | None = None,
    most: int | None = MOST,
) -> Recipe:
    """A recipe from a TOML file, merged over those that it `extends` (see `bench.inheritance`).

    Paths in a file that are not absolute start at its folder, those in `changes` at the current one.

    Args:
        path: The file. The plug-ins that a file names as files are looked for beside it; those of bases come first.
        plugins: Plug-ins to load besides (see `registry.load_plugin`); they become part of the recipe.
        changes: `table.key=value` each; see `apply_change`.
        seeds: Replace the recipe's.
        defences: Replace the recipe's: names, or `package.module:Class`.
        most: Runs at most; None: any number.

    Raises:
        LargeGridError: It has more runs than `most`.
        ConfigError: A file is missing, no TOML, extends itself, or asks for what is not there.
    """
    tables = inherited(path_of(path), _placed)
    _check_tables(tables)
    tables["plugins"] = [*tables.get("plugins", []), *map(registry.load_plugin, plugins)]
    if defences is not None:
        tables["defence"] = [{"name": name} for name in defences]
    for change in changes:
        apply_change(tables, change)
    if seeds is not None:
        tables.setdefault("federated" if "federated" in tables else "run", {})["seeds"] = list(seeds)
    return make_recipe(tables, most=most)


def _placed(tables: Table, folder: Path) -> Table:
    """The tables of one file, checked, with paths and plug-ins that begin at its folder."""
    _check_tables({key: value for key, value in tables.items() if key not in (*TABLES, "grid") or value != UNSET})
    for table, key in PATHS:
        values = tables.get(table)
        value = values.get(key) if isinstance(values, dict) else None
        if isinstance(value, str) and value not in {"", UNSET}:
            tables[table][key] = str(folder / path_of(value))
    burn_in = tables.get("burn_in")
    older: Any = burn_in.get("older") if isinstance(burn_in, dict) else {}
    for epoch, value in older.items() if isinstance(older, dict) else ():
        older[epoch] = str(folder / path_of(value)) if isinstance(value, str) and value else value
    if "plugins" in tables:
        tables["plugins"] = [registry.load_plugin(plugin, folder=folder) for plugin in tables["plugins"]]
    return tables


def make_recipe(tables: Mapping[str, Any], *, most: int | None = MOST) -> Recipe:
    """A recipe from tables; those of attacks, defences, detectors, monitors and surrogates may be arrays of tables.

    Args:
        tables: By name.
        most: Runs at most; None: any number.

    Raises:
        LargeGridError: It has more runs than `most`.
        ConfigError: An unknown table, key or component, a value of the wrong type or range, or two equal labels.
    """
    _check_tables(tables)
    if most is not None:
        check_size(tables, most)
    variants = [_variant(of_one, label) for label, of_one in expanded(dict(tables))]
    ids = [cell.run_id.lower() for variant in variants for cell in variant.cells()]
    if twice := next((name for name in ids if ids.count(name) > 1), None) if len(set(ids)) < len(ids) else None:
        raise ConfigError(f"two runs are called {twice}; give attacks, defences or the grid's values other labels.")
    return replace(variants[0], variants=variants) if len(variants) > 1 else variants[0]


def _variant(tables: Mapping[str, Any], label: str) -> Recipe:
    """The recipe of tables without a grid; `label` is what a grid calls them."""
    if "attack" not in tables:
        raise ConfigError("the recipe has no [attack]: say which; `mithridate list attacks` shows them.")
    federated = "federated" in tables
    if federated and ("run" in tables or "detector" in tables):
        odd = "run" if "run" in tables else "detector"
        raise ConfigError(
            f"[{odd}] belongs to an online recipe, and [federated] is there too; take out one of the two."
        )
    if "clients" in tables and not federated:
        raise ConfigError("[clients] belongs to a federation; add a table [federated].")
    loop = "federated" if federated else "run"
    run = dict(tables.get(loop, {}))
    rules = _rules(run) if federated and isinstance(run.get("rule"), list) else {}
    plugins = tuple(dict.fromkeys(registry.load_plugin(plugin) for plugin in tables.get("plugins", [])))
    variant = "+".join(filter(None, [str(tables.get("variant", "")), label]))
    surrogates = _surrogates(tables.get("surrogate", {}))
    recipe = Recipe(
        title=str(tables.get("title", "")),
        variant=_checked_label("variant", variant, ()) if variant else "",
        plugins=plugins,
        data=make(StreamSettings, tables.get("data", {}), where="[data]"),
        model=registry.build("model", tables.get("model", {"name": "small_cnn"})),
        seeds=_seeds(run.pop("seeds", [0]), where=f"[{loop}]"),
        burn_in=make(BurnIn, tables.get("burn_in", {}), where="[burn_in]"),
        attacks=_labelled("attack", tables["attack"], kind_of="update_attack" if federated else "attack"),
        defences=_labelled("defence", tables.get("defence", {"name": "none"})),
        monitors=_labelled("monitor", tables.get("monitor", [])),
        run=make(FederatedRun, run, where="[federated]") if federated else make(OnlineRun, run, where="[run]"),
        clients=make(Shards, tables.get("clients", {}), where="[clients]") if federated else None,
        detectors=_labelled("detector", tables.get("detector", [])),
        surrogate=next(iter(surrogates.values())),
        surrogates=surrogates if len(surrogates) > 1 else {},
        rules=rules,
    )
    if federated and recipe.data.passes > 1:
        raise ConfigError(
            f"[data] passes = {recipe.data.passes}: clients of a federation draw from their shards round by round, as "
            "often as it lasts; leave it out."
        )
    recipe.data.resolved()
    return recipe


def _surrogates(tables: Table | list[Table]) -> dict[str, Surrogate]:
    """The surrogates by label; the only one may have none."""
    surrogates: dict[str, Surrogate] = {}
    several = isinstance(tables, list) and len(tables) > 1
    for table in tables if isinstance(tables, list) else [tables]:
        values = dict(table)
        label = str(values.pop("label", ""))
        made = make(Surrogate, values, where="[surrogate]")
        surrogates[_checked_label("surrogate", label, surrogates) if several else label] = made
    return surrogates or {"": Surrogate()}


def _rules(run: Table) -> dict[str, FederatedRun]:
    """The settings of the runs, one a rule, where `rule` is an array of tables; takes that key out.

    Args:
        run: The table [federated].
    """
    common = {key: value for key, value in run.items() if key != "seeds"}
    rules: dict[str, FederatedRun] = {}
    tables = run.pop("rule")
    if not tables:
        raise ConfigError("[federated] rule = []: give a table, an array of tables, or leave it out.")
    for table in tables:
        if not isinstance(table, Mapping):
            raise ConfigError(f"[federated] rule must be a table or an array of tables, not {shown(table)}.")
        values = dict(table)
        label = _checked_label("rule", values.pop("label", values.get("name", "")), rules)
        rules[label] = make(FederatedRun, {**common, "rule": values}, where="[federated]")
    return rules


def _checked_label(kind: str, label: object, taken: Collection[str]) -> str:
    """A label that may stand in names of directories, and that no component in `taken` has."""
    if not isinstance(label, str) or not _LABEL.fullmatch(label):
        raise ConfigError(
            f"[{kind}] label {shown(label)}: use 1 to 64 letters, digits, '.', '_', '+' or '-', a letter or digit "
            "first."
        )
    if label in taken:
        raise ConfigError(f"two [[{kind}]] are called '{label}'; give each its own `label`.")
    return label


def _check_tables(tables: Mapping[str, Any]) -> None:
    """Refuse unknown names, and values where tables belong."""
    check_depth(tables, where="the recipe")
    for key, value in tables.items():
        if key == "plugins" and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise ConfigError(
                f"plugins = {shown(value)}: give a list of modules or .py files, such as ['my_defences.py']."
            )
        if key in ("title", "variant") and not isinstance(value, str):
            raise ConfigError(f"{key} = {shown(value)}: give a line of text.")
        if key == EXTENDS:
            raise ConfigError(f"{EXTENDS} belongs to a file: give `read_recipe` its path, or merge tables by `merged`.")
        if key not in (*TABLES, *_KEYS, "grid"):
            raise ConfigError(f"unknown table [{key}]: {nearest(key, (*TABLES, 'grid'))}")
        several = key in (*ARRAYS, "grid")
        if key not in _KEYS and not isinstance(value, dict | list if several else dict):
            raise ConfigError(f"[{key}] must be a table, not {shown(value)}.")
        if key in ("attack", "defence") and value == []:
            raise ConfigError(f"{key} = []: name one at least, or leave it out; `mithridate list {key}s` shows them.")
        for item in value if several and isinstance(value, list) else []:
            if not isinstance(item, dict):
                raise ConfigError(f"[{key}] must be a table or an array of tables, not {shown(item)}.")
        _check_floats(value, where=f"[{key}]")


def _check_floats(value: object, *, where: str) -> None:
    """Refuse finite numbers that float32, in which models compute, cannot hold; infinity may mean something."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(item, float) and LARGEST_FLOAT < abs(item) < math.inf:
            raise ConfigError(f"{where} {key} = {item}: larger than float32 can hold; give a smaller number.")
        _check_floats(item, where=where)


def _seeds(value: object, *, where: str) -> list[int]:
    if not isinstance(value, list) or not value or not all(type(s) is int and 0 <= s < 2**63 for s in value):
        said = shown(value)
        raise ConfigError(
            f"{where} seeds = {said}: give a list of whole numbers from 0 to 2**63 - 1, such as [0, 1, 2]."
        )
    if len(set(value)) != len(value):
        raise ConfigError(f"{where} seeds = {shown(value)}: a seed twice is the same run twice; leave it out.")
    return list(value)


def _labelled(kind: Kind, tables: Table | list[Table], kind_of: Kind | None = None) -> list[Labelled[Any]]:
    """The components of a table, or of an array of them.

    Args:
        kind: What the table is called.
        tables: The table, or an array of tables.
        kind_of: The kind of component that its names stand for; that of the table by default.
    """
    components: list[Labelled[Any]] = []
    for table in tables if isinstance(tables, list) else [tables]:
        values = dict(table)
        label = label_of(values)
        values.pop("label", None)
        component = registry.build(kind_of or kind, values, where=f"[{kind}]")
        components.append(Labelled(_checked_label(kind, label, {m.label for m in components}), component))
    return components
