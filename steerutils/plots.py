"""Figures of the book: one function a figure, which draws what it is given and returns the Axes."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import Colormap

COLOURS = {"harmful": "#c1442e", "harmless": "#2b6f9c", "hard harmless": "#e0a030", "random": "#8a8a8a"}


def style() -> None:
    """The book's look: call it once at the top of a notebook."""
    sns.set_theme(context="notebook", style="ticks", font_scale=0.95)
    pd.set_option("display.max_colwidth", None)  # answers are shown whole
    plt.rcParams.update(
        {
            "figure.figsize": (7.2, 3.8),
            "figure.dpi": 110,
            "savefig.bbox": "tight",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )


def score_by_layer(table: pd.DataFrame, groups: str, x: str = "layer", ax: Axes | None = None) -> Axes:
    """Mean refusal score over prompts against `x`, one line a group, with 95 % bootstrap bands.

    `table` has the columns of `sweep` and one named `groups`.
    """
    ax = plt.gca() if ax is None else ax
    palette = {g: COLOURS.get(str(g).split(",")[0], "#8a8a8a") for g in table[groups].unique()}
    sns.lineplot(table, x=x, y="score", hue=groups, palette=palette, errorbar=("ci", 95), n_boot=300, seed=0, ax=ax)
    ax.axhline(0, color="0.6", lw=0.8, ls=":")
    ax.set(
        xlabel="steered block (vector added at its input)" if x == "layer" else x,
        ylabel="refusal score (nats)",
    )
    ax.get_legend().set_title(None)
    return ax


def rate_map(rates: pd.DataFrame, title: str, cmap: str | Colormap = "rocket_r", ax: Axes | None = None) -> Axes:
    """A heat map of shares between 0 and 1: strengths down, layers across (a pivot table)."""
    ax = plt.gca() if ax is None else ax
    sns.heatmap(rates, vmin=0, vmax=1, cmap=cmap, annot=rates.shape[1] <= 16, fmt=".2f", annot_kws={"size": 8},
                linewidths=0.5, cbar_kws={"label": "share of answers"}, ax=ax)  # fmt: skip
    ax.set(title=title, xlabel="steered block", ylabel="strength")
    ax.tick_params(axis="y", rotation=0)
    return ax


def rates_with_intervals(table: pd.DataFrame, x: str, hue: str | None = None, ax: Axes | None = None) -> Axes:
    """Bars of shares with their intervals; `table` has the columns x, value, low, high (and hue)."""
    ax = plt.gca() if ax is None else ax
    groups = [None] if hue is None else list(dict.fromkeys(table[hue]))
    places = {name: i for i, name in enumerate(dict.fromkeys(table[x]))}
    width = 0.8 / len(groups)
    for i, group in enumerate(groups):
        part = table if group is None else table[table[hue] == group]
        at = np.array([places[name] for name in part[x]]) + (i - (len(groups) - 1) / 2) * width
        error = [part["value"] - part["low"], part["high"] - part["value"]]
        colour = COLOURS.get(str(group), sns.color_palette("deep")[i])
        ax.bar(at, part["value"], width * 0.92, color=colour, label=group)
        ax.errorbar(at, part["value"], error, fmt="none", ecolor="0.2", capsize=2.5, lw=1)
    ax.set_xticks(range(len(places)), list(places))
    ax.set(ylim=(0, 1.02), ylabel="share of answers")
    if hue is not None:
        ax.legend(ncols=len(groups), loc="lower left", bbox_to_anchor=(0, 1))
    return ax


def cosine_map(cosines: pd.DataFrame, title: str = "", ax: Axes | None = None) -> Axes:
    """A square heat map of cosines between directions, -1 to 1."""
    ax = plt.gca() if ax is None else ax
    sns.heatmap(cosines, vmin=-1, vmax=1, cmap="vlag", annot=True, fmt=".2f", square=True, cbar=False, ax=ax)
    ax.set(title=title, xlabel="", ylabel="")
    ax.tick_params(axis="y", rotation=0)
    return ax


def norms_by_layer(norms: Mapping[str, Sequence[float]], ax: Axes | None = None) -> Axes:
    """Vector norms against the block, one line a method, on a log scale."""
    ax = plt.gca() if ax is None else ax
    for name, values in norms.items():
        ax.plot(values, label=name)
    ax.set(xlabel="block", ylabel="norm (residual-stream units)", yscale="log")
    ax.legend()
    return ax


def loss_curve(losses: Sequence[float], window: int = 10, ax: Axes | None = None) -> Axes:
    """Training loss a step, and its running mean."""
    ax = plt.gca() if ax is None else ax
    ax.plot(losses, color="0.75", lw=0.8, label="a step")
    ax.plot(pd.Series(losses).rolling(window, min_periods=1).mean(), color="#2b6f9c", label=f"mean of {window}")
    ax.set(xlabel="step", ylabel="loss (nats a response token)", yscale="log")
    ax.legend()
    return ax


def validation_curve(lessons: Sequence[Mapping[str, float]], ax: Axes | None = None) -> Axes:
    """Share of validation prompts likely refused while the adapter learns, one line a prompt set."""
    ax = plt.gca() if ax is None else ax
    table = pd.DataFrame(lessons).set_index("step").rename(columns=lambda name: name.replace("_", " "))
    sns.lineplot(table, palette=COLOURS, dashes=False, markers=True, ax=ax)
    ax.set(ylim=(-0.02, 1.02), xlabel="step", ylabel="share with refusal score > 0")
    return ax


def score_histograms(scores: Mapping[str, Sequence[float]], ax: Axes | None = None) -> Axes:
    """Distributions of refusal scores, one a set of prompts."""
    ax = plt.gca() if ax is None else ax
    table = pd.concat([pd.DataFrame({"score": np.asarray(v), "set": k}) for k, v in scores.items()])
    sns.histplot(table, x="score", hue="set", palette=COLOURS, bins=30, element="step", alpha=0.35, ax=ax)
    ax.axvline(0, color="0.6", lw=0.8, ls=":")
    ax.set(xlabel="refusal score at the last prompt token (nats)", ylabel="prompts")
    ax.get_legend().set_title(None)
    return ax
