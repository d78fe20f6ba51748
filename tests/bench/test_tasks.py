"""Which cell a process gets next, and that a cell made from what was written down is the same."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from mithridate.bench.engine import _task
from mithridate.bench.origin import Origin, settings_key
from mithridate.bench.place import Place
from mithridate.bench.recipe import Recipe, make_recipe
from mithridate.bench.tasks import Queue, Task
from mithridate.core.errors import ConfigError
from tests.recipes import ACCUMULATIVE, FEDERATION, tiny_recipe


def task(run: str) -> Task:
    """`a1x`: burn-in a, prepared with it as a1 says."""
    return Task(run, {}, Origin("", "", ""), prepared=run[:2], burn_in=run[0])


def taken(queue: Queue, last: str = "") -> str:
    got = queue.take(task(last) if last else None)
    return got.run if got else ""


def test_no_two_processes_get_cells_of_a_burn_in_before_it_is_trained() -> None:
    queue = Queue([task(run) for run in ("a1x", "a1y", "b1x", "b1y")])
    assert [taken(queue), taken(queue), taken(queue)] == ["a1x", "b1x", ""]
    queue.trained(task("a1x"))
    assert [taken(queue), taken(queue)] == ["a1y", ""]
    assert len(queue) == 1
    queue.over(task("b1x"))  # it failed before its burn-in was there
    assert [taken(queue), taken(queue), len(queue)] == ["b1y", "", 0]


def test_a_process_goes_on_with_what_it_has_and_burn_ins_come_first() -> None:
    queue = Queue([task(run) for run in ("a1x", "a1y", "a2x", "a2y", "b1x")])
    assert taken(queue) == "a1x"
    queue.trained(task("a1x"))
    assert taken(queue, "a2z") == "a2x"
    assert taken(queue) == "b1x"
    assert taken(queue, "a2x") == "a2y"
    assert taken(queue, "b1x") == "a1y"


def test_a_busy_task_is_tried_again_after_all_others_and_then_waits() -> None:
    queue = Queue([task("a1x"), task("a1y")])
    first = queue.take()
    assert first is not None
    queue.over(first)
    queue.put_back(first)
    assert taken(queue, "a1x") == "a1y"
    queue.trained(task("a1y"))
    last = queue.take()
    assert last == replace(first, patient=True)
    assert len(queue) == 0


@pytest.mark.parametrize("seed", range(20))
def test_every_task_is_handed_out_once_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311  (no secret)
    tasks = [task(f"{rng.choice('abc')}{rng.choice('12')}{n}") for n in range(30)]
    queue, under_way, ended = Queue(tasks), list[Task](), list[str]()
    while len(queue) or under_way:
        training = [t.burn_in for t in under_way if t.burn_in in queue._training]
        assert len(training) == len(set(training))
        if len(under_way) < 3 and (got := queue.take(rng.choice([*tasks, None]))):
            under_way.append(got)
            continue
        assert under_way, "tasks wait for what nobody does"
        chosen = rng.choice(under_way)
        if rng.random() < 0.5:
            queue.trained(chosen)
        else:
            under_way.remove(chosen)
            queue.over(chosen)
            ended.append(chosen.run)
    assert sorted(ended) == sorted(t.run for t in tasks)


RECIPES = {
    "grid": tiny_recipe(
        ACCUMULATIVE + '[[defence]]\nname = "none"\n[[defence]]\nname = "clip"\nlabel = "c"\n'
        '[[detector]]\nname = "loss"\n[[monitor]]\nname = "accuracy_floor"\n'
        '[grid]\nrun.lr = [0.1, 0.2]\nattack.eps = ["8/255", 0.1]\ndata.victim = [60, 0.05]\n'
    ),
    "surrogates": tiny_recipe(
        '[[attack]]\nname = "accumulative"\nmodel_access = "surrogate"\n[[surrogate]]\nlabel = "old"\nepoch = 1\n'
        '[[surrogate]]\nlabel = "other"\nkind = "trained"\nmodel = { name = "small_cnn", width = 3 }\n'
    ),
    "federated": tiny_recipe(FEDERATION, 'federated.rule=[{name="krum"}, {name="median", label="m"}]'),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_cell_made_from_its_settings_is_the_same(recipe: Recipe) -> None:
    cells = list(recipe.cells())
    assert len(cells) > 1
    for cell in cells:
        made = _task(Place(cell, Path(), Origin(settings_key(cell.config()), "", ""), resume=False))
        again = made._cell()
        assert (again.run_id, again.config()) == (cell.run_id, cell.config())
        assert again.recipe.run == cell.recipe.run
        assert again.attack.component == cell.attack.component
    with pytest.raises(ConfigError, match="its settings, written down and read again, are others"):
        replace(made, origin=Origin("another", "", ""))._cell()


def test_cells_that_share_a_burn_in_say_so() -> None:
    def of(recipe: Recipe) -> list[tuple[str, str]]:
        places = [Place(cell, Path(), Origin("", "", ""), resume=False) for cell in recipe.cells()]
        tasks = [_task(place) for place in places]
        burn_ins, prepared = ([*dict.fromkeys(t)] for t in zip(*((t.burn_in, t.prepared) for t in tasks), strict=True))
        return [(f"{burn_ins.index(t.burn_in)}", f"{prepared.index(t.prepared)}") for t in tasks]

    two = tiny_recipe('[[defence]]\nname = "none"\n[[defence]]\nname = "clip"\n[grid]\nrun.lr = [0.1, 0.2]\n')
    assert of(two) == [("0", "0"), ("0", "0"), ("0", "1"), ("0", "1")]
    assert of(tiny_recipe("", "run.seeds=[0, 1]")) == [("0", "0"), ("1", "1")]
    assert of(tiny_recipe("", "run.seeds=[0, 1]", "burn_in.seed=7")) == [("0", "0"), ("0", "1")]
    rules = tiny_recipe(FEDERATION, 'federated.rule=[{name="krum"}, {name="median"}]')
    assert of(rules) == [("0", "0"), ("0", "0")]
    assert make_recipe(next(rules.cells()).config())
