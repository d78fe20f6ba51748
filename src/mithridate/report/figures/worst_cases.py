"""What each attack leaves of each defence: the chart of a leaderboard."""

from collections.abc import Mapping
from dataclasses import replace

from mithridate.report.figures.drawing import PALETTE, Drawing, fitting, legend, looks_of, panels, saved, style
from mithridate.report.rows import Row
from mithridate.report.statistic import Statistic
from mithridate.report.wording import points


@style()
def worst_cases(defences: Mapping[str, Mapping[str, Statistic]], row: Row) -> Drawing:
    """A line a defence, a mark an attack, at the accuracy that the attack leaves.

    Args:
        defences: Accuracy after the trigger by attack, fractions, each of one seed at least; defences from the top.
        row: Gives model and data set.
    """
    looks = looks_of(attack for attacks in defences.values() for attack in attacks)
    figure, (ax,) = panels(1, width=7.6, height=0.5 + 0.27 * len(defences), top=0.8)
    worst: dict[str, tuple[str, float]] = {}
    for place, (defence, attacks) in enumerate(defences.items()):
        means = {attack: 100 * (statistic.mean or 0) for attack, statistic in attacks.items()}
        lowest = min(means, key=means.__getitem__)
        worst[defence] = lowest, means[lowest]
        ax.plot([means[lowest], max(means.values())], [place, place], color=PALETTE["faint"], linewidth=1.0, zorder=1)
        spread = 100 * (attacks[lowest].std or 0)
        ax.plot(
            [means[lowest] - spread, means[lowest] + spread],
            [place, place],
            color=looks[lowest].colour,
            linewidth=3.5,
            alpha=0.4,
            solid_capstyle="butt",
            zorder=2,
        )
        for attack, mean in means.items():
            look = looks[attack]
            ax.plot([mean], [place], color=look.colour, marker=look.marker, markersize=6, linestyle="", zorder=3)
    ax.set_yticks(range(len(defences)), [fitting(name) for name in defences])
    ax.set_ylim(len(defences) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("accuracy after the trigger (%)")
    legend(figure, {name: replace(look, dashes="") for name, look in looks.items()})
    return saved(
        figure,
        row,
        "worst-cases",
        heading="What each attack leaves",
        caption="A line a defence, a mark an attack: mean accuracy after its trigger, over seeds. The mark furthest to "
        "the left is the worst attack, which decides the place; the bar around it: one standard deviation each way.",
        alt="Dot chart of accuracy after the trigger, a line a defence. "
        + " ".join(f"{name}: at worst {points(left / 100)} percent, by {by}." for name, (by, left) in worst.items()),
    )
