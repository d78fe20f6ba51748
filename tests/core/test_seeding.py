import torch

from mithridate.core.seeding import derived_seed, generator, seeded_default


def test_keys_decide_the_draw_and_earlier_draws_do_not() -> None:
    first = torch.rand(4, generator=generator("a", 1))
    torch.rand(100, generator=generator("a", 2))
    assert torch.equal(first, torch.rand(4, generator=generator("a", 1)))


def test_every_key_counts_and_their_borders_too() -> None:
    keys: list[tuple[int | str, ...]] = [(1,), ("1",), (1, 1), (11,), ("a", "b"), ("ab",), ("a,b",), (-1,), ()]
    seeds = [derived_seed(*k) for k in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_is_the_same_on_every_machine() -> None:
    assert derived_seed("victim order", 0) == 7_071_678_719_888_869_512


def test_seeded_default_gives_the_global_state_back() -> None:
    before = torch.get_rng_state()
    with seeded_default(3):
        first = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded_default(3):
        assert torch.equal(torch.rand(2), first)
