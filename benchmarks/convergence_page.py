"""What benchmarks/convergence.py has found, as a page and its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convergence import Group, Losses

_CLOSEST, _FURTHEST = 1e-8, 1e-2
"""Where the colours of distances begin and end."""


def draw(found: dict[str, Any], groups: Sequence[Group], path: Path) -> None:
    """A row for each group: its curves, laid over each other, and the distance of each run from its plain one at every step."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tunesmith"
    from matplotlib import pyplot

    groups = [group for group in groups if _compared(group, found["runs"])]
    heights = [max(4.0, 1.4 + 0.22 * len(group.runs)) for group in groups]
    figure = pyplot.figure(figsize=(13, sum(heights)), layout="constrained")
    rows = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, group in zip(rows, groups):
        row.suptitle(f"{group.title}, {group.steps} steps", fontsize=12, fontweight="bold")
        curves, distances = row.subplots(1, 2, width_ratios=[5, 4])
        _draw_curves(curves, group, found["runs"])
        _draw_distances(row, distances, group, found["runs"])
    figure.savefig(path, metadata={"Date": None})


def _compared(group: Group, losses: Losses) -> list[str]:
    """Names of the runs that have been made and have another to be compared with."""
    return [name for name in group.runs if name in losses and group.against(name) != name]


def _draw_curves(axes: Any, group: Group, losses: Losses) -> None:
    """Plain runs as wide lines, what must equal them dashed on top, what is rounded otherwise as thin lines."""
    styles = iter([("#bbbbbb", 6), ("#8ecae6", 4.5), ("#ffb703", 3), ("#90be6d", 2.5), ("#c77dff", 1.5)])
    kinds: dict[str, int] = {}
    for name, run in group.runs.items():
        if name not in losses:
            continue
        style: dict[str, Any] = {"color": "black", "linewidth": 0.9, "linestyle": (0, (4, 4)), "zorder": 3}
        kind = "other order of sums"
        if group.against(name) == name:
            color, width = next(styles)
            style, kind = {"color": color, "linewidth": width, "zorder": 1}, name
        elif run.rounded:
            style, kind = {"color": "#d1495b", "linewidth": 0.9, "zorder": 2}, "rounded otherwise"
        axes.plot(range(1, len(losses[name]) + 1), losses[name], label=None if kind in kinds else kind, **style)
        kinds[kind] = kinds.get(kind, 0) + 1
    handles, labels = axes.get_legend_handles_labels()
    labels = [f"{one} ({kinds[one]} runs)" if kinds[one] > 1 else one for one in labels]
    axes.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=9, frameon=False)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)


def _draw_distances(figure: Any, axes: Any, group: Group, losses: Losses) -> None:
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    names = _compared(group, losses)
    apart = [[value or math.nan for value in group.apart(name, losses)] for name in names]
    colors = pyplot.colormaps["viridis"].with_extremes(bad="#eeeeee")
    image = axes.imshow(
        apart,
        aspect="auto",
        interpolation="none",
        cmap=colors,
        norm=LogNorm(_CLOSEST, _FURTHEST),
        extent=(0.5, group.steps + 0.5, len(names) - 0.5, -0.5),
    )
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set(xlabel="step")
    figure.colorbar(image, ax=axes, label="|loss / plain loss - 1|; grey: none")


def write_page(found: dict[str, Any], groups: Sequence[Group], path: Path) -> None:
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "tunesmith"))
    number = sum(name in found["runs"] for group in groups for name in group.runs)
    path.write_text(f"""# Convergence

Every technique and layout in a real run: a Llama of 11 million parameters on {found["text"]}, 2048 tokens a step, {number} runs of `tune run pretrain`.
Only what the name of a run says differs from the plain one; the data of a step depend on the seed and the step alone, so curves can be laid over each other.

![loss curves, and each run's distance from its plain one](convergence.svg)

Left: the loss of every step. Right: how far each run is from its plain one at that step, |loss / plain loss - 1|.

{"".join(_section(group, found["runs"]) for group in groups if _compared(group, found["runs"]))}## Made by

`python benchmarks/convergence.py PATH/TO/{found["text"]}` makes this page again; on {found["machine"]["cores"]} quiet cores a run takes about two minutes.
Left out: activation offloading, which moves nothing on a CPU, where all of this was measured, and fp16, whose products take a CPU a minute a step.
{found["date"]}; {found["machine"]["processor"]}; {versions}. Every loss is in `benchmarks/results/convergence.json`.
""")


def _section(group: Group, losses: Losses) -> str:
    names = [name for name in group.runs if name in losses]
    rows = "\n".join(_row(group, name, losses) for name in names)
    return f"""## {group.title}

{group.about} {group.steps} steps.

| run | compared with | last loss | furthest from it in the first 10 steps | in all {group.steps} |
|---|---|---|---|---|
{rows}

{_verdict(group, losses)}

"""


def _row(group: Group, name: str, losses: Losses) -> str:
    last, other = f"{losses[name][-1]:.5f}", group.against(name)
    if other == name:
        return f"| **{name}** | | {last} | | |"
    apart = group.apart(name, losses)
    return f"| {name} | {other.partition(':')[0]} | {last} | {_distance(max(apart[:10]))} | {_distance(max(apart))} |"


def _distance(value: float) -> str:
    return f"{value:.1e}" if value else "equal"


def _verdict(group: Group, losses: Losses) -> str:
    """What the numbers say, so that it stays true of new ones."""
    furthest = {name: max(group.apart(name, losses)) for name in _compared(group, losses)}
    exact = {name: value for name, value in furthest.items() if group.is_exact(name)}
    rounded = {name: value for name, value in furthest.items() if not group.is_exact(name)}
    sentences = []
    if exact:
        worst = max(exact, key=lambda name: exact[name])
        equal = sum(value == 0 for value in exact.values())
        sentences.append(
            f"{len(exact)} runs may differ from their plain one in the order of sums only: the furthest of them ({worst}) is "
            f"{exact[worst]:.1e} of the loss away" + (f", {equal} are equal to the last bit." if equal else ".")
        )
    if rounded:
        worst = max(rounded, key=lambda name: rounded[name])
        sentences.append(
            f"Where numbers are rounded otherwise ({len(rounded)} runs), curves part by that rounding, by {rounded[worst]:.1e} at "
            f"most ({worst}), and stay together."
        )
    plain = [name for name in group.runs if name in losses and group.against(name) == name]
    if len(plain) > 1:
        means = (f"{name} {sum(losses[name][-10:]) / 10:.3f}" for name in plain)
        sentences.append(f"Mean loss of the last 10 steps: {', '.join(means)}.")
    return "\n".join(sentences)
