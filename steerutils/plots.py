"""Figures of the book: one function a figure, which draws what it is given, on new Axes or on `ax`, returning them."""

import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython import get_ipython
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator
from matplotlib_inline.backend_inline import set_matplotlib_formats

from .graph import KINDS, Graph

COLOURS = {"harmful": "#c1442e", "harmless": "#2b6f9c", "hard harmless": "#e0a030", "random": "#8a8a8a"}
COLOURS |= {"equal scores on all edges": "#8a8a8a"}
KIND_COLOURS = dict(zip(KINDS, ("#0072b2", "#56b4e9", "#d55e00", "#009e73", "#8a3d8f")))  # of an edge's reader


def style() -> None:
    """The book's look: call it once at the top of a notebook, whose figures then have twice the pixels."""
    if get_ipython() is not None:
        set_matplotlib_formats("retina")
    sns.set_theme(context="notebook", style="ticks", font_scale=0.95)
    pd.set_option("display.max_colwidth", None, "display.max_rows", 200)  # answers and results are shown whole
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
    ax = plt.subplots()[1] if ax is None else ax
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
    ax = plt.subplots()[1] if ax is None else ax
    sns.heatmap(rates, vmin=0, vmax=1, cmap=cmap, annot=rates.shape[1] <= 16, fmt=".2f", annot_kws={"size": 8},
                linewidths=0.5, cbar_kws={"label": "share of answers"}, ax=ax)  # fmt: skip
    ax.set(title=title, xlabel="steered block", ylabel="strength")
    ax.tick_params(axis="y", rotation=0)
    return ax


def rates_with_intervals(table: pd.DataFrame, x: str, hue: str | None = None, ax: Axes | None = None) -> Axes:
    """Bars of shares with their intervals; `table` has the columns x, value, low, high (and hue)."""
    ax = plt.subplots()[1] if ax is None else ax
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
    ax = plt.subplots()[1] if ax is None else ax
    place = ax.get_window_extent()
    points = 72 / ax.figure.dpi * min(place.width, place.height) / len(cosines)  # of a field's side
    sns.heatmap(cosines, vmin=-1, vmax=1, cmap="vlag", annot=True, fmt=".2f", square=True, cbar=False, ax=ax,
                annot_kws={"size": min(10, points / 3.4)})  # fmt: skip
    ax.set(title=title, xlabel="", ylabel="")
    ax.tick_params(axis="y", rotation=0)
    return ax


def norms_by_layer(norms: Mapping[str, Sequence[float]], ax: Axes | None = None) -> Axes:
    """Vector norms against the block, one line a method, on a log scale."""
    ax = plt.subplots()[1] if ax is None else ax
    sns.lineplot(pd.DataFrame(dict(norms)), ax=ax)  # dashed one by one: lines may lie on each other
    ax.set(xlabel="block", ylabel="norm (residual-stream units)", yscale="log")
    return ax


def loss_curve(losses: Sequence[float], ax: Axes | None = None) -> Axes:
    """Training loss a step, and its running mean."""
    ax = plt.subplots()[1] if ax is None else ax
    ax.plot(losses, color="0.75", lw=0.8, label="a step")
    ax.plot(pd.Series(losses).rolling(10, min_periods=1).mean(), color="#2b6f9c", label="mean of 10")
    ax.set(xlabel="step", ylabel="loss (nats a response token)", yscale="log")
    ax.legend()
    return ax


def validation_curve(lessons: Sequence[Mapping[str, float]], ax: Axes | None = None) -> Axes:
    """Share of validation prompts likely refused while the adapter learns, one line a prompt set."""
    ax = plt.subplots()[1] if ax is None else ax
    table = pd.DataFrame(lessons).set_index("step").rename(columns=lambda name: name.replace("_", " "))
    sns.lineplot(table, palette=COLOURS, dashes=False, markers=True, ax=ax)
    ax.set(ylim=(-0.02, 1.02), xlabel="step", ylabel="share with refusal score > 0")
    return ax


def score_histograms(scores: Mapping[str, Sequence[float]], ax: Axes | None = None) -> Axes:
    """Distributions of refusal scores, one a set of prompts."""
    ax = plt.subplots()[1] if ax is None else ax
    table = pd.concat([pd.DataFrame({"score": np.asarray(v), "set": k}) for k, v in scores.items()])
    sns.histplot(table, x="score", hue="set", palette=COLOURS, bins=30, element="step", alpha=0.35, ax=ax)
    ax.axvline(0, color="0.6", lw=0.8, ls=":")
    ax.set(xlabel="refusal score at the last prompt token (nats)", ylabel="prompts")
    ax.get_legend().set_title(None)
    return ax


# --- edges ---------------------------------------------------------------------------------------------------


def estimate_against_exact(table: pd.DataFrame, title: str = "", ax: Axes | None = None) -> Axes:
    """Estimated against exact effects of edges, one dot an edge, on axes that are linear near 0 and then logarithmic.

    `table` has the columns exact, estimate, kind and strong (a filled dot) or not (an open one).
    """
    ax = plt.subplots()[1] if ax is None else ax
    largest = float(table[["exact", "estimate"]].abs().to_numpy().max())
    linear = 10.0 ** np.floor(np.log10(largest)) / 10_000
    ax.plot([-2 * largest, 2 * largest], [-2 * largest, 2 * largest], color="0.6", lw=0.8)
    for (kind, strong), part in table.groupby(["kind", "strong"]):
        colour = KIND_COLOURS[kind]
        ax.scatter(part["exact"], part["estimate"], s=18, lw=0.8, alpha=0.8, edgecolor=colour,
                   facecolor=colour if strong else "none")  # fmt: skip
    ticks = [sign * linear * 10**power for sign in (-1, 1) for power in (1, 3)]
    for axis, scale in ((ax.xaxis, ax.set_xscale), (ax.yaxis, ax.set_yscale)):
        scale("symlog", linthresh=linear)
        axis.set_ticks([*ticks, 0], [*(f"{tick:g}" for tick in ticks), "0"])
        axis.set_minor_locator(plt.NullLocator())
    ax.set(xlim=(-2 * largest, 2 * largest), ylim=(-2 * largest, 2 * largest), title=title,
           xlabel="exact effect of the edge (nats)", ylabel="estimate (nats)")  # fmt: skip
    return ax


def errors_by_method(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Relative errors on a log scale: a small dot a pair of prompts, their geometric mean, 95 % bootstrap intervals."""
    ax = plt.subplots()[1] if ax is None else ax
    palette = dict(zip(table["target"].unique(), ("#2b6f9c", "#c1442e", "#4d4d4d")))
    ax.set_yscale("log")  # first, so that means and intervals are taken of the logarithms
    shared = dict(data=table, x="method", y="error", hue="target", palette=palette, ax=ax)
    sns.stripplot(**shared, dodge=True, jitter=False, size=3, alpha=0.5, legend=False)
    sns.pointplot(**shared, dodge=0.53, linestyles="none", errorbar=("ci", 95), n_boot=300, seed=0, capsize=0.08,
                  markersize=5, err_kws={"lw": 1.4})  # fmt: skip
    ax.axhline(1, color="0.6", lw=0.8, ls=":")
    ax.set(xlabel="", ylabel="relative error")
    ax.get_legend().set_title(None)
    return ax


def completeness(errors: Mapping[str, pd.Series], ax: Axes | None = None) -> Axes:
    """Distance of the input row's sum from the change of the metric against the number of points m; a line a rule.

    Each series is indexed by m. Thin lines fall like 1/m and 1/m^2.
    """
    ax = plt.subplots()[1] if ax is None else ax
    for (name, series), colour, power in zip(errors.items(), ("#c1442e", "#2b6f9c"), (1, 2)):
        ax.plot(series.index, series, "o-", color=colour, label=name, ms=4)
        guide = series.iloc[-1] * (series.index.to_numpy() / series.index[-1]) ** -float(power)
        ax.plot(series.index, guide, color=colour, lw=0.8, ls=":", label=f"falling like 1/m{'²' if power == 2 else ''}")
    ax.set(yscale="log", xlabel="points m", ylabel="|sum of the input row\n− change of the metric| (nats)")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.legend(fontsize="small")
    return ax


def shortcut_scale(ratios: Mapping[str, Sequence[float]], ax: Axes | None = None) -> Axes:
    """How much longer one kind of edge score is than another, by the reader's block, on a log scale."""
    ax = plt.subplots()[1] if ax is None else ax
    for (name, values), colour in zip(ratios.items(), ("#c1442e", "#2b6f9c")):
        ax.plot(values, "o-", ms=3, color=colour, label=name)
    ax.axhline(1, color="0.6", lw=0.8, ls=":")
    ax.set(xlabel="block of the reader", yscale="log", ylabel="scores without the norm's Jacobian\nover scores with it")
    return ax


def _place(name: str, graph: Graph) -> tuple[float, float]:
    """Where a component stands in a drawing: x in blocks, y in rows; heads above, the input, MLPs and logits below."""
    low = graph.n_heads + 1
    if name in ("input", "logits"):
        return (graph.first - 1.0 if name == "input" else float(graph.n_layers)), low
    block, _, part = name[1:].partition(".")
    if not part:
        return int(block) + 0.2, low
    number, shared = int(part[1:]), graph.n_heads // graph.n_groups
    row = number if part[0] in "hq" else number * shared + (shared - 1) / 2  # a group stands amid its heads
    return int(block) - 0.2, row


def _curve(source: str, reader: str, graph: Graph) -> np.ndarray:
    """The three control points [3, 2] of the curve of an edge; edges between MLPs hang below their row."""
    start, end = np.array(_place(source, graph)), np.array(_place(reader, graph))
    middle = (start + end) / 2
    if start[1] == end[1]:
        length = (end[0] - start[0]) / (len(graph.layers) + 1)
        middle[1] += 1.2 + 18 * length**0.75 if start[1] > graph.n_heads else -1.2
    else:
        middle[1] = end[1] + 0.25 * (start[1] - end[1])
    return np.stack([start, middle, end])


def _depth(edges: pd.DataFrame, graph: Graph) -> float:
    """The lowest y that any curve reaches."""
    curves = [_curve(source, reader, graph) for source, reader in zip(edges["source"], edges["reader"])]
    return max(float((start + 2 * middle + end)[1] / 4) for start, middle, end in curves)


def _block_ticks(graph: Graph) -> list[int]:
    return [layer for layer in graph.layers if layer % (5 if len(graph.layers) > 12 else 1) == 0]


def attribution_graph(edges: pd.DataFrame, graph: Graph, ax: Axes | None = None) -> Axes:
    """A graph's strongest edges from left to right by block, coloured by reader; dashed where the score is < 0.

    `edges` is `EdgeScores.table(n)`. Heads stand in rows, a key/value group amid the heads that share it.
    """
    ax = plt.subplots()[1] if ax is None else ax
    low, largest = graph.n_heads + 1, edges["score"].abs().max()
    for layer in _block_ticks(graph):
        ax.axvline(layer, color="0.93", lw=0.8, zorder=0)
    for row in edges[::-1].itertuples():  # the strongest on top
        curve, share = _curve(row.source, row.reader, graph), abs(row.score) / largest
        path = Path(curve, [Path.MOVETO, Path.CURVE3, Path.CURVE3])
        ax.add_patch(PathPatch(path, fill=False, ec=KIND_COLOURS[row.kind], lw=0.6 + 3.4 * share, alpha=0.75,
                               ls="-" if row.score > 0 else (0, (3, 1.5))))  # fmt: skip
    nodes = np.array([_place(name, graph) for name in [*edges["source"], *edges["reader"]]])
    ax.scatter(*nodes.T, s=9, color="0.2", zorder=3)
    ax.set(xlim=(graph.first - 1.8, graph.n_layers + 0.9), ylim=(max(low, _depth(edges, graph)) + 0.6, -0.8),
           xlabel="block")  # fmt: skip
    ax.set_xticks(_block_ticks(graph))
    ax.set_yticks([*range(graph.n_heads), low], [*(f"head {h}" for h in range(graph.n_heads)), "MLP"])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    for name in ("input", "logits"):
        ax.annotate(name, _place(name, graph), (0, 7), textcoords="offset points", ha="center", fontsize="small")
    handles = [Line2D([], [], color=colour, lw=2.5, label=kind) for kind, colour in KIND_COLOURS.items()]
    signs = [Line2D([], [], color="0.3", ls=ls, label=label) for ls, label in (("-", "score > 0"), ("--", "score < 0"))]
    ax.legend(handles=handles + signs, ncols=7, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize="small",
              handlelength=1.6, columnspacing=1.2)  # fmt: skip
    return ax


_STEP_X, _STEP_Y = 18, 17  # pixels a block and a row
_GRAPH_STYLE = """
.steer-graph{background:#fff;color:#23272b;border:1px solid #e0dbd0;border-radius:6px;padding:10px 12px;
 font:14px/1.45 system-ui,sans-serif;max-width:100%;box-sizing:border-box}
.steer-graph .bar{display:flex;flex-wrap:wrap;gap:4px 14px;align-items:center}
.steer-graph .bar label{display:flex;gap:8px;align-items:center}
.steer-graph .bar input{width:150px;accent-color:#0f5f66}
.steer-graph .bar i{display:inline-block;width:16px;height:4px;margin-right:5px;vertical-align:middle}
.steer-graph .read{min-height:1.5em;font-variant-numeric:tabular-nums}
.steer-graph .scroll{overflow-x:auto;max-width:100%}
.steer-graph svg{display:block;max-width:none;height:auto}
.steer-graph text{font:11px system-ui,sans-serif;fill:#4a5157}
.steer-graph .e path{fill:none;opacity:.7}
.steer-graph circle{fill:#333}
.steer-graph .e .hit{stroke:transparent;stroke-width:9;pointer-events:stroke}
.steer-graph.on .e path{opacity:.2}
.steer-graph.on .e.at path{opacity:1}
"""
_GRAPH_SCRIPT = """
(() => { for (const box of document.querySelectorAll('[data-steer-graph="KEY"]')) {
  if (box.dataset.ready) continue;
  box.dataset.ready = "yes";
  const find = s => box.querySelector(s), edges = [...box.querySelectorAll(".e")], slider = find("input");
  const rest = find(".read").textContent;
  const show = () => {
    find(".count").textContent = slider.value;
    for (const e of edges) e.style.display = +e.dataset.rank < +slider.value ? "" : "none";
  };
  const point = e => {
    for (const other of box.querySelectorAll(".at")) other.classList.remove("at");
    box.classList.toggle("on", !!e);
    if (e) e.classList.add("at");
    find(".read").textContent = e ? e.querySelector("title").textContent : rest;
  };
  slider.addEventListener("input", () => { point(null); show(); });
  for (const kind of ["pointerover", "click"])
    find("svg").addEventListener(kind, event => point(event.target.closest(".e")));
  find("svg").addEventListener("pointerleave", event => { if (event.pointerType === "mouse") point(null); });
  show();
} })()
"""


def interactive_graph(edges: pd.DataFrame, graph: Graph, n_shown: int = 60):
    """The drawing of `attribution_graph` as inline SVG: a slider for how many edges, names and scores by pointing.

    It needs no kernel and loads nothing; without its script the strongest `n_shown` edges are seen, with titles.
    Returns an IPython HTML object.
    """
    from IPython.display import HTML  # only a notebook needs it

    n_shown, low = min(n_shown, len(edges)), graph.n_heads + 1
    largest = edges["score"].abs().max()

    def at(x, y):
        return f"{(x - graph.first + 3.6) * _STEP_X:.0f} {(y + 1) * _STEP_Y:.0f}"

    def dot(x, y):
        px, py = at(x, y).split()
        return f'<circle cx="{px}" cy="{py}" r="2"/>'

    def text(x, y, words, anchor="middle"):
        px, py = at(x, y).split()
        return f'<text x="{px}" y="{py}" text-anchor="{anchor}">{escape(words)}</text>'

    bottom = max(low, _depth(edges, graph))
    rows = [*((h, f"head {h}") for h in range(graph.n_heads)), (low, "MLP")]
    parts = [text(graph.first - 1.4, y + 0.25, words, "end") for y, words in rows]
    parts += [text(*_place(name, graph)[:1], low - 0.6, name) for name in ("input", "logits")]
    for layer in _block_ticks(graph):
        parts.append(f'<path d="M{at(layer, -0.6)} L{at(layer, bottom + 0.4)}" stroke="#ececec"/>')
        parts.append(text(layer, bottom + 1.3, f"block {layer}"))
    for rank, row in reversed(list(enumerate(edges.itertuples()))):  # the strongest on top
        start, middle, end = _curve(row.source, row.reader, graph)
        line, width = f"M{at(*start)} Q{at(*middle)} {at(*end)}", 0.7 + 4.3 * abs(row.score) / largest
        dash = "" if row.score > 0 else ' stroke-dasharray="5 3"'
        title = f"{rank + 1}. {row.source} → {row.reader} ({row.kind}): {row.score:+.4g} nats"
        hidden = "" if rank < n_shown else ' style="display:none"'
        parts.append(
            f'<g class="e" data-rank="{rank}"{hidden}><title>{escape(title)}</title>'
            f'<path d="{line}" stroke="{KIND_COLOURS[row.kind]}" stroke-width="{width:.1f}"{dash}/>'
            f'<path class="hit" d="{line}"/>{dot(*start)}{dot(*end)}</g>'
        )
    width, height = round((len(graph.layers) + 4.5) * _STEP_X), round((bottom + 3) * _STEP_Y)
    key = hashlib.sha256("".join(parts).encode()).hexdigest()[:12]  # the script finds its own drawing by it
    legend = "".join(f'<span><i style="background:{c}"></i>{escape(kind)}</span>' for kind, c in KIND_COLOURS.items())
    return HTML(
        f'<div class="steer-graph" data-steer-graph="{key}"><style>{_GRAPH_STYLE}</style><div class="bar">'
        f'<label>edges <input type="range" min="1" max="{len(edges)}" value="{n_shown}">'
        f'<span class="count">{n_shown}</span></label>{legend}<span>dashed: score &lt; 0</span></div>'
        '<div class="read" aria-live="polite">Point at an edge, or tap it.</div>'
        f'<div class="scroll"><svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="The strongest edges, from block to block">{"".join(parts)}</svg></div></div>'
        f"<script>{_GRAPH_SCRIPT.replace('KEY', key)}</script>"
    )


# --- layers ------------------------------------------------------------------------------------------------------


def shares_by_layer(scores: Mapping[str, Sequence[float]], layers: Sequence[int], ax: Axes | None = None) -> Axes:
    """Layer scores as shares of their largest, one line a score: their shapes, side by side."""
    ax = plt.subplots()[1] if ax is None else ax
    for (name, values), colour in zip(scores.items(), sns.color_palette("deep")):
        ax.plot(layers, np.asarray(values) / np.max(values), "o-", ms=3, color=colour, label=name)
    ax.set(xlabel="block", ylabel="share of the largest", ylim=(0, 1.05))
    ax.legend(fontsize="small")
    return ax


def effect_by_layer(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Share of prompts for which steering worked, by block: columns layer, value, low, high, group."""
    ax = plt.subplots()[1] if ax is None else ax
    for (name, part), colour in zip(table.groupby("group", sort=False), ("#c1442e", "#2b6f9c", "#e0a030", "#4d4d4d")):
        ax.plot(part["layer"], part["value"], "o-", ms=3, color=colour, label=name)
        ax.fill_between(part["layer"], part["low"], part["high"], color=colour, alpha=0.15, lw=0)
    ax.set(xlabel="steered block", ylabel="share where it worked", ylim=(-0.02, 1.02))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(fontsize="small")
    return ax


def measure_by_method(table: pd.DataFrame, measure: str, ax: Axes | None = None) -> Axes:
    """One measure of `judge_rankings`: a dot and a 95 % interval a method, best on top, the random order as a band."""
    ax = plt.subplots()[1] if ax is None else ax
    part = table[table["measure"] == measure].set_index("method")
    chance = part.loc["random order"]
    part = part.drop(index="random order").sort_values("value", ascending=measure.startswith("regret"))[::-1]
    ax.axvspan(chance["low"], chance["high"], color="0.92", lw=0)
    ax.axvline(chance["value"], color="0.55", lw=1, ls=":")
    places = np.arange(len(part))
    ax.hlines(places, part["low"], part["high"], color="#2b6f9c", lw=1.5)
    ax.plot(part["value"], places, "o", color="#2b6f9c", ms=5)
    ax.set_yticks(places, part.index)
    ax.set(xlabel=f"{measure} (grey: random order)", xlim=(-0.02 if part["low"].min() >= 0 else None, None))
    return ax


def curves(table: pd.DataFrame, x: str, y: str, ax: Axes | None = None) -> Axes:
    """Lines of y against x, one a method, with the spread over repeats where there are any."""
    ax = plt.subplots()[1] if ax is None else ax
    names = list(dict.fromkeys(table["method"]))
    palette = dict(zip(names, sns.color_palette("deep", len(names)))) | {"random order": "0.6"}
    sns.lineplot(table, x=x, y=y, hue="method", palette=palette, errorbar=("pi", 95), marker="o", ms=4, ax=ax)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.get_legend().set_title(None)
    return ax


def growth(seconds: Mapping[str, Mapping[str, float]], slopes: Mapping[str, float]):
    """Seconds against one size at a time, log-log, one panel a size, with its slope; returns the figure."""
    fig, axes = plt.subplots(1, len(seconds), figsize=(2.4 * len(seconds), 2.6), sharey=True)
    for ax, (name, row) in zip(axes, seconds.items()):
        ax.plot([float(n) for n in row], list(row.values()), "o-", color="#2b6f9c", ms=4)
        ax.set(xscale="log", yscale="log", xlabel=name, title=f"slope {slopes[name]:.2f}")
        ax.set_xticks([float(n) for n in row], list(row))
        ax.minorticks_off()
    axes[0].set_ylabel("seconds")
    fig.tight_layout()
    return fig


# --- circuits --------------------------------------------------------------------------------------------------


def faithfulness_by_size(
    curve: pd.DataFrame, others: pd.DataFrame, target: float = 0.85, ax: Axes | None = None
) -> Axes:
    """Faithfulness of top circuits against their size on a log scale, with 95 % bands; single circuits as marks.

    Both tables have the columns size (share of all edges), faithfulness, low, high; `others` has circuit, its name.
    """
    ax = plt.subplots()[1] if ax is None else ax
    for height, ls in ((0, "-"), (1, "-"), (target, ":")):
        ax.axhline(height, color="0.6", lw=0.8, ls=ls)
    ax.plot(curve["size"], curve["faithfulness"], "o-", ms=4, color="#2b6f9c", label="strongest edges")
    ax.fill_between(curve["size"], curve["low"], curve["high"], color="#2b6f9c", alpha=0.15, lw=0)
    for row, marker, colour in zip(others.itertuples(), "sXDP^v", sns.color_palette("dark")[1:]):
        error = [[row.faithfulness - row.low], [row.high - row.faithfulness]]
        ax.errorbar(row.size, row.faithfulness, error, fmt=marker, ms=6, color=colour, capsize=2.5, lw=1,
                    label=row.circuit)  # fmt: skip
    ax.set(xscale="log", xlabel="edges in the circuit (share of all)", ylabel="faithfulness")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def kind_shares(shares: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Stacked bars: what share of each set of edges (rows) ends in each kind of reader (columns)."""
    ax = plt.subplots()[1] if ax is None else ax
    left = np.zeros(len(shares))
    for kind in KINDS:
        bars = ax.barh(shares.index, shares[kind], left=left, color=KIND_COLOURS[kind], label=kind, height=0.75)
        words = [f"{share:.0%}" if share >= 0.05 else "" for share in shares[kind]]
        ax.bar_label(bars, words, label_type="center", color="white", fontsize="x-small")
        left += shares[kind].to_numpy()
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), xlabel="share of the edges")
    ax.legend(title="edges into", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def share_map(table: pd.DataFrame, title: str = "", ax: Axes | None = None) -> Axes:
    """A heat map of shares, coloured from 0 to 1 and written into their fields."""
    ax = plt.subplots()[1] if ax is None else ax
    sns.heatmap(table, vmin=0, vmax=1, cmap="Blues", annot=True, fmt=".2f", linewidths=0.5, cbar=False, ax=ax)
    ax.set_title(title)
    ax.tick_params(axis="y", rotation=0)
    ax.tick_params(axis="x", rotation=30)
    return ax


def overlap_with_chance(overlaps: pd.DataFrame, chance: float, ax: Axes | None = None) -> Axes:
    """One bar an overlap coefficient with its interval, and a dotted line where random circuits stand.

    `overlaps`: one row a name (its index), with columns value, low, high; nan for no interval.
    """
    ax = plt.subplots()[1] if ax is None else ax
    bars = ax.barh(overlaps.index, overlaps["value"], color="#2b6f9c", height=0.7)
    ax.bar_label(bars, fmt="%.2f", label_type="center", color="white", fontsize="small")
    if overlaps["low"].notna().any():
        reach = [overlaps["value"] - overlaps["low"], overlaps["high"] - overlaps["value"]]
        ax.errorbar(overlaps["value"], overlaps.index, xerr=reach, fmt="none", ecolor="0.25", capsize=3, lw=1)
    ax.axvline(chance, color="#c1442e", lw=1.2, ls=":", label="random circuits")
    ax.invert_yaxis()
    ax.set(xlim=(0, 1.08), xlabel="overlap coefficient")
    ax.legend(fontsize="small", loc="lower right")
    return ax


def effect_by_position(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """By response position: the share of positions that flip (bars) and a circuit's faithfulness (line, 95 % band).

    Columns position, flipped, faithfulness, low, high; nothing is drawn where no token flips.
    """
    ax = plt.subplots()[1] if ax is None else ax
    ax.bar(table["position"], table["flipped"], color="0.85", label="share of responses whose token flips")
    ax.plot(table["position"], table["faithfulness"], "o-", ms=4, color="#2b6f9c", label="faithfulness of the circuit")
    ax.fill_between(table["position"], table["low"], table["high"], color="#2b6f9c", alpha=0.15, lw=0)
    ax.axhline(1, color="0.6", lw=0.8)
    ax.set(xlabel="response token (0 is the first)", ylim=(-0.05, 1.3))
    ax.legend(fontsize="small", ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    return ax


# --- attention ---------------------------------------------------------------------------------------------------

VERDICT_COLOURS = {"refusal": "#8a3d8f", "compliance": "#009e73", "incoherent": "#b5b5b5"}
TASK_COLOURS = {"induce": COLOURS["harmless"], "bypass": COLOURS["harmful"]}


def verdict_shares(verdicts: Mapping[str, Sequence[str]], ax: Axes | None = None) -> Axes:
    """Stacked bars of verdicts, one a setting, the first on top: answers that refuse, comply, or have fallen apart."""
    ax = plt.subplots()[1] if ax is None else ax
    shares = pd.DataFrame({name: pd.Series(list(row)).value_counts(normalize=True) for name, row in verdicts.items()})
    shares = shares.reindex(list(VERDICT_COLOURS)).fillna(0)
    left = np.zeros(len(verdicts))
    for verdict, colour in VERDICT_COLOURS.items():
        ax.barh(list(verdicts), shares.loc[verdict], left=left, height=0.78, color=colour, label=verdict)
        left += shares.loc[verdict].to_numpy()
    ax.set(xlim=(0, 1), ylim=(len(verdicts) - 0.5, -0.5), xlabel="share of answers")
    ax.tick_params(axis="y", length=0)
    return ax


def drops_by_intervention(ours: pd.DataFrame, published: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How much of an effect each intervention takes away: filled dots with intervals, and published values, hollow.

    Both tables have the columns intervention, task ("induce" or "bypass") and value; `ours` low and high beside them,
    `published` the model.
    """
    ax = plt.subplots()[1] if ax is None else ax
    places = {name: i for i, name in enumerate(dict.fromkeys(ours["intervention"]))}
    shapes = dict(zip(dict.fromkeys(published["model"]), "s^Dv"))
    for (task, colour), shift in zip(TASK_COLOURS.items(), (-0.17, 0.17)):
        part = ours[ours["task"] == task]
        at = part["intervention"].map(places) + shift
        ax.hlines(at, part["low"], part["high"], color=colour, lw=1.5)
        ax.plot(part["value"], at, "o", color=colour, ms=6, label=f"{task}, here")
        for model, rows in published[published["task"] == task].groupby("model", sort=False):
            ax.plot(rows["value"], rows["intervention"].map(places) + shift, shapes[model], mfc="none", mec=colour,
                    ms=6, label=f"{task}, {model}")  # fmt: skip
    ax.axvline(0, color="0.6", lw=0.8, ls=":")
    ax.set_yticks(list(places.values()), list(places))
    ax.set_ylim(len(places) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    return ax


def attention_change(
    base: np.ndarray, steered: np.ndarray, tokens: Sequence[str], first: int = 0, title: str = ""
) -> Sequence[Axes]:
    """One head's attention pattern [query, key] in both runs and their difference, from token `first` on.

    The text's first token, on which much attention rests, keeps its column. Colours follow the square root of the
    weights, so that small ones are seen.
    """
    keys = sorted({0, *range(first, len(tokens))})
    future = np.triu(np.ones_like(base, dtype=bool), 1)[first:, keys]
    largest = max(float(np.abs(steered - base).max()), 1e-6)
    change = dict(cmap="vlag", vmin=-largest, vmax=largest, cbar_kws={"label": "difference"})
    share = dict(cmap="Blues", norm=PowerNorm(0.5, 0, 1), cbar_kws={"label": "share of attention (square-root scale)"})
    panels = [("base", base, share), ("steered", steered, share), ("steered − base", steered - base, change)]
    fig, axes = plt.subplots(1, 3, figsize=(14, 4.6), sharey=True)
    for ax, (name, values, colours) in zip(axes, panels):
        sns.heatmap(values[first:, keys], mask=future, xticklabels=[tokens[k] for k in keys],
                    yticklabels=tokens[first:], ax=ax, **colours)  # fmt: skip
        ax.tick_params(labelsize=7, length=0)
        ax.set(title=name, xlabel="looks at")
    axes[0].set_ylabel("token that looks")
    fig.suptitle(title)
    fig.tight_layout()
    return axes


# --- heads -------------------------------------------------------------------------------------------------------


def head_map(
    values: np.ndarray,
    first: int,
    title: str = "",
    label: str = "",
    top: float | None = None,
    ax: Axes | None = None,
    limit: float | None = None,
) -> Axes:
    """A heat map of one number a head, [layer, head]: blocks down (the first is `first`), heads across.

    Colours lie around 0, up to `limit` (the largest number here, unless given), or go from 0 to `top` where that is.
    """
    ax = plt.subplots()[1] if ax is None else ax
    table = pd.DataFrame(values, index=range(first, first + len(values)))
    limit = np.abs(values).max() if limit is None else limit
    scale = dict(vmin=-limit, vmax=limit, cmap="vlag") if top is None else dict(vmin=0, vmax=top, cmap="Reds")
    sns.heatmap(table, **scale, linewidths=0.4, cbar_kws={"label": label}, ax=ax)
    ax.set(title=title, xlabel="head", ylabel="block")
    ax.tick_params(axis="y", rotation=0)
    return ax


def dots_against_band(table: pd.DataFrame, x: str, title: str = "", ax: Axes | None = None, bar: float = 0.05) -> Axes:
    """A dot a method on its own null: null directions up to the value to beat as a band, and a bar at their mean.

    `table` has the columns method, value, p, null_low, null_mean, null_high; a dot with p < `bar` is filled. With
    null_high the value that p < `bar` must exceed (infinite if no value would do), filled dots are those past the band.
    """
    ax = plt.subplots()[1] if ax is None else ax
    places = np.arange(len(table))[::-1]
    numbers = table[["value", "null_low", "null_mean", "null_high"]].to_numpy()
    low, top = (reach(numbers[np.isfinite(numbers)]) for reach in (np.min, np.max))
    if low >= 0:  # shares: nothing lies below 0
        top = 1.08 * top or 1
        left, right = -0.04 * top, top
    else:
        left, right = low - 0.05 * (top - low), top + 0.05 * (top - low)
    ax.set_xlim(left, right)
    high = np.minimum(table["null_high"], right)
    ax.hlines(places, table["null_low"], high, color="0.85", lw=9, label=f"null, up to what p < {bar:.2g} must beat")
    ax.plot(table["null_mean"], places, "|", color="0.45", ms=11, label="mean of the null")
    for beyond, face in ((True, "#c1442e"), (False, "white")):
        part = ((table["p"] < bar) == beyond).to_numpy()
        ax.plot(table["value"][part], places[part], "o", mec="#c1442e", mfc=face, ms=7)
    ax.set_yticks(places, table["method"])
    ax.set(xlabel=x, title=title, ylim=(-0.6, len(table) - 0.4))
    ax.xaxis.set_major_locator(MaxNLocator(4))
    return ax


_HEADS_STYLE = """
.steer-heads{background:#fff;color:#23272b;border:1px solid #e0dbd0;border-radius:6px;padding:10px 12px;
 font:14px/1.45 system-ui,sans-serif;max-width:100%;box-sizing:border-box}
.steer-heads .scroll{overflow-x:auto;max-width:100%}
.steer-heads table{border-collapse:separate;border-spacing:2px;margin:6px 0;width:auto;table-layout:auto;font:inherit}
.steer-heads th{font-weight:400;color:#4a5157;padding:0 5px;text-align:right;background:none;border:0}
.steer-heads td{padding:0;border:0;background:none}
.steer-heads button{display:block;width:34px;height:22px;border:1px solid #e0dbd0;border-radius:3px;padding:0;
 cursor:pointer;font:11px system-ui,sans-serif;font-variant-numeric:tabular-nums}
.steer-heads button.at{outline:2px solid #23272b}
.steer-heads .read{min-height:5.4em}
.steer-heads .read span{display:inline-block;background:#f1efe9;color:#23272b;border-radius:3px;padding:0 5px;
 margin:2px 3px 0 0;white-space:pre}
.steer-heads .read span.hit{background:#c1442e;color:#fff}
"""
_HEADS_SCRIPT = """
(() => { for (const box of document.querySelectorAll('[data-steer-heads="KEY"]')) {
  if (box.dataset.ready) continue;
  box.dataset.ready = "yes";
  const read = box.querySelector(".read");
  box.addEventListener("click", event => {
    const at = event.target.closest("button");
    if (!at) return;
    for (const other of box.querySelectorAll(".at")) other.classList.remove("at");
    at.classList.add("at");
    read.innerHTML = box.querySelector('template[data-of="' + at.dataset.head + '"]').innerHTML;
  });
} })()
"""


def interactive_heads(
    values: np.ndarray, first: int, tokens: Sequence[Sequence[Sequence[str]]], marked: np.ndarray, label: str
):
    """The heat map of `head_map` as a table of buttons, each of which opens its head's tokens.

    `tokens` [layer][head] are lists of words, best first, and `marked` [layer, head, word] says which of them to
    colour. The head of the largest value is open from the start. It needs no kernel and loads nothing; without its
    script the tokens are the buttons' titles. Returns an IPython HTML object.
    """
    from IPython.display import HTML  # only a notebook needs it

    largest, colours = np.abs(values).max() or 1.0, plt.get_cmap("vlag")
    best = np.unravel_index(np.argmax(values), values.shape)  # open from the start

    def cell(row: int, head: int) -> str:
        """The HTML of one head: its share as a colour and a number, its tokens as a title."""
        share = values[row, head]
        red, green, blue = (round(255 * part) for part in colours(0.5 + 0.5 * share / largest)[:3])
        ink = "#fff" if abs(share) > 0.6 * largest else "#23272b"
        name = f"block {first + row}, head {head}: {label} {share:+.3f}"
        title = f"{name}. {' '.join(word.strip() for word in tokens[row][head])}"
        text = f"{100 * share:.1f}" if abs(share) >= 5e-4 else "0"
        opened = " class=at" if (row, head) == best else ""
        return (
            f'<td><button{opened} data-head="{row}.{head}" '
            f'style="background:rgb({red},{green},{blue});color:{ink}" '
            f'title="{escape(title)}" aria-label="{escape(name)}">{text}</button></td>'
        )

    def words(row: int, head: int) -> str:  # what is read when a head is opened
        spans = "".join(f"<span{' class=hit' if hit else ''}>{escape(word)}</span>"
                        for word, hit in zip(tokens[row][head], marked[row, head]))  # fmt: skip
        name = f"block {first + row}, head {head}: {label} {values[row, head]:+.3f}"
        return f"<b>{escape(name)}</b><br>{spans}"

    n_rows, n_heads = values.shape
    head_row = "".join(f"<th>{head}</th>" for head in range(n_heads))
    rows = [f"<tr><th>block {first + row}</th>{''.join(cell(row, head) for head in range(n_heads))}</tr>"
            for row in range(n_rows)]  # fmt: skip
    lists = "".join(f'<template data-of="{row}.{head}">{words(row, head)}</template>'
                    for row in range(n_rows) for head in range(n_heads))  # fmt: skip
    key = hashlib.sha256("".join([*rows, lists]).encode()).hexdigest()[:12]  # the script finds its own table by it
    return HTML(
        f'<div class="steer-heads" data-steer-heads="{key}"><style>{_HEADS_STYLE}</style>'
        f'<div>Each number: {escape(label)}, in per cent. Press a head for its tokens.</div><div class="scroll">'
        f"<table><tr><th>head</th>{head_row}</tr>{''.join(rows)}</table></div>"
        f'<div class="read" aria-live="polite">{words(*best)}</div>{lists}</div>'
        f"<script>{_HEADS_SCRIPT.replace('KEY', key)}</script>"
    )


def token_table(table: pd.DataFrame, title: str = ""):
    """Rows of `ov.word_rows` as a table of words, those on the list in red; a column `share` is shown in per cent.

    Returns an IPython HTML object; the words are escaped.
    """
    from IPython.display import HTML  # only a notebook needs it

    words = [name for name in table.columns if str(name).isdigit()]
    rows = []
    for row in table.to_dict("records"):
        share = row.get("share", np.nan)
        shown = (escape(str(row[word]).replace("\n", "⏎")) for word in words)
        hits = (" class=hit" if hit == "1" else "" for hit in str(row["listed"]).zfill(len(words)))
        spans = "".join(f"<span{hit}>{word}</span>" for hit, word in zip(hits, shown))
        cells = row["method"], row["read"], "" if pd.isna(share) else f"{100 * share:+.1f} %"
        rows.append("<tr>" + "".join(f"<th>{escape(str(cell))}</th>" for cell in cells) + f"<td>{spans}</td></tr>")
    return HTML(
        f'<div class="steer-heads"><style>{_HEADS_STYLE}</style><div>{escape(title)}</div>'
        f'<div class="scroll read"><table>{"".join(rows)}</table></div></div>'
    )


# --- sparse vectors ----------------------------------------------------------------------------------------------

METHOD_COLOURS = {"effect": "#c1442e", "gradient": "#e0a030", "magnitude": "#2b6f9c", "random": "#8a8a8a"}
METHOD_COLOURS |= {"DIM": "#c1442e", "NTP": "#e0a030", "PO": "#2b6f9c"}  # and the recipes of whole vectors
METHOD_COLOURS |= {"shuffled": "#7b4ea3", "orthogonal": "#3a8f5a"}  # the controls that are not just random


def by_sparsity(table: pd.DataFrame, ylabel: str, title: str = "", ax: Axes | None = None) -> Axes:
    """Lines against sparsity with their 95 % intervals, on an axis that spreads 90, 99 and 99.9 %.

    `table` has the columns sparsity (0 to below 1), value, low, high and method; the methods' points stand side by
    side, so that their intervals can be told apart.
    """
    ax = plt.subplots()[1] if ax is None else ax
    groups = list(table.groupby("method", sort=False))
    apart = min(1.05, 1.13 ** (2 / max(1, len(groups) - 1)))  # so that many stay within the axis, too
    for place, (name, part) in enumerate(groups):
        kind = name.rstrip(" 0123456789")  # "random 1" and "random 2" are of one kind
        colour = METHOD_COLOURS.get(kind, "#4d4d4d")
        kept = (1 - part["sparsity"]) * apart ** ((len(groups) - 1) / 2 - place)
        ax.vlines(kept, part["low"], part["high"], color=colour, lw=1.6, alpha=0.55)
        ax.plot(kept, part["value"], "o-", ms=3.5, lw=1.1, color=colour, label=kind)
    ticks = sorted({1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001} & {round(1 - s, 6) for s in table["sparsity"]})[::-1]
    ax.set(xscale="log", xlabel="share of dimensions set to zero (%)", ylabel=ylabel, title=title)
    ax.set_xlim(1.15, (1 - table["sparsity"].max()) / 1.15)  # not inverted, which shared axes would undo
    ax.set_xticks(ticks, [f"{100 * (1 - tick):g}" for tick in ticks])
    ax.minorticks_off()
    return ax


def panels_by_sparsity(table: pd.DataFrame, title: str = "") -> Figure:
    """`by_sparsity` for each measure (a row) and direction (a column).

    `table` has the columns of `by_sparsity`, direction and measure (what the panel's axis is called).
    """
    ways, measures = table["direction"].unique(), table["measure"].unique()
    fig, axes = plt.subplots(
        len(measures), len(ways), figsize=(4.4 * len(ways), 2.9 * len(measures)), squeeze=False, sharey="row"
    )
    for (measure, way), ax in zip(product(measures, ways), axes.flat):
        by_sparsity(table[(table["direction"] == way) & (table["measure"] == measure)], measure, way, ax)
    plt.setp(axes[:-1], xlabel="")
    plt.setp(axes[1:], title="")
    plt.setp(axes[:, 1:], ylabel="")
    fig.suptitle(title)
    fig.tight_layout()
    lines = dict(zip(*axes[0, 0].get_legend_handles_labels()[::-1]))
    fig.legend(lines.values(), lines, fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0))
    return fig


def cumulative_effect(effects: Mapping[str, np.ndarray], ax: Axes | None = None) -> Axes:
    """The part of the sum of effects that the n largest dimensions hold, n on a log scale; one line a direction."""
    ax = plt.subplots()[1] if ax is None else ax
    for (name, values), colour in zip(effects.items(), ("#2b6f9c", "#c1442e")):
        ordered = np.sort(np.abs(values))[::-1].cumsum()
        ax.plot(np.arange(1, len(values) + 1), ordered / ordered[-1], color=colour, label=f"{name}: |effect|")
        order = np.argsort(-values * np.sign(values.sum()))
        ax.plot(np.arange(1, len(values) + 1), values[order].cumsum() / values.sum(), color=colour, ls=":",
                label=f"{name}: effect, best first")  # fmt: skip
    ax.axhline(1, color="0.7", lw=0.8)
    ax.set(xscale="log", xlabel="dimensions, largest first", ylabel="share of the sum")
    ax.legend(fontsize="small")
    return ax


def agreement_by_sparsity(table: pd.DataFrame, title: str = "", ax: Axes | None = None) -> Axes:
    """Intersection over union of kept dimensions against sparsity, a line a pair of vectors, over their nulls.

    `table` has the columns sparsity, pair, iou, expected (by chance) and field_low, field_high (of the null that keeps
    the gradients); the bands of all pairs lie over each other.
    """
    ax = plt.subplots()[1] if ax is None else ax
    for (name, part), colour in zip(table.groupby("pair", sort=False), sns.color_palette("deep")):
        kept = 1 - part["sparsity"]
        ax.fill_between(kept, part["field_low"], part["field_high"], color=colour, alpha=0.13, lw=0)
        ax.plot(kept, part["iou"], "o-", ms=3, color=colour, label=name)
    first = table[table["pair"] == table["pair"].iloc[0]]
    ax.plot(1 - first["sparsity"], first["expected"], ls=":", color="0.3", label="independent sets")
    ax.set(xscale="log", xlabel="share of dimensions set to zero (%)", ylabel="intersection over union", title=title)
    ax.set_xlim((1 - table["sparsity"].min()) * 1.15, (1 - table["sparsity"].max()) / 1.15)
    ax.set_xticks(1 - first["sparsity"], [f"{100 * s:g}" for s in first["sparsity"]])
    ax.minorticks_off()
    ax.legend(fontsize="small")
    return ax


# --- traits ------------------------------------------------------------------------------------------------------


def trait_maps(grid: Mapping[str, pd.DataFrame]):
    """For each trait, over steered block and strength: share of coherent answers at its high end, and share coherent.

    The first is grey where no answer is coherent. `grid` maps a trait to its table of `steered_traits`; returns the
    figure.
    """
    fig, axes = plt.subplots(2, len(grid), figsize=(2.3 * len(grid), 5), sharex=True, sharey=True, squeeze=False)
    for column, (trait, table) in enumerate(grid.items()):
        high = table.assign(high=(table[trait] > 0.5).where(table["coherent"]).astype(float))
        parts = ((high, "high", "vlag", trait), (table, "coherent", "mako", "coherent"))
        for ax, (part, value, cmap, title) in zip(axes[:, column], parts):
            cells = part.pivot_table(index="strength", columns="layer", values=value, aggfunc="mean", dropna=False)
            few = cells.shape[1] < 8  # of more, the numbers would not fit
            sns.heatmap(cells.sort_index(ascending=False), vmin=0, vmax=1, cmap=cmap, annot=few, fmt=".1f",
                        annot_kws={"size": 8}, linewidths=0.5 * few, cbar=column == len(grid) - 1, ax=ax)  # fmt: skip
            ax.set(title=title, xlabel="steered block" if ax in axes[1] else "", ylabel="" if column else "strength")
            ax.tick_params(axis="y", rotation=0)
    for ax in axes[0]:
        ax.set_facecolor("0.6")  # where no answer was coherent
    axes[0, 0].set_ylabel("strength\n(share at the high end)")
    axes[1, 0].set_ylabel("strength\n(share coherent)")
    fig.tight_layout()
    return fig


def trade_off(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Success against coherence: columns coherent, right (both shares), trait, strength; a dot a block and strength."""
    ax = plt.subplots()[1] if ax is None else ax
    rng = np.random.default_rng(0)
    moved = points.assign(
        coherent=points["coherent"] + rng.uniform(-0.02, 0.02, len(points)),  # equal dots lie beside each other
        right=points["right"] + rng.uniform(-0.02, 0.02, len(points)),
    )
    sns.scatterplot(moved, x="coherent", y="right", hue="trait", style="strength", s=55, alpha=0.75, ax=ax)
    ax.axhline(0.5, color="0.6", lw=1, ls=":")
    ax.set(xlabel="share of coherent answers", ylabel="of these, share that went\nwhere it was steered")
    ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def side_effects(matrix: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """A heat map of changes in probability, -1 to 1: rows what was steered (and controls), columns what was judged."""
    ax = plt.subplots(figsize=(6.4, 4.6))[1] if ax is None else ax
    sns.heatmap(matrix.astype(float), vmin=-1, vmax=1, cmap="vlag", annot=True, fmt="+.2f", linewidths=0.5,
                cbar_kws={"label": "change of P(high)"}, ax=ax)  # fmt: skip
    ax.axhline(matrix.shape[1], color="0.2", lw=1.5)
    ax.set(xlabel="judged", ylabel="steered")
    ax.tick_params(axis="x", rotation=25)
    ax.tick_params(axis="y", rotation=0)
    return ax


# --- circuits, by steered block ----------------------------------------------------------------------------------


def faithfulness_by_block(carried: pd.DataFrame, needed: pd.DataFrame, target: float = 0.85):
    """By steered block: what circuits carry, one line a group, and the smallest circuit that carries the target.

    Columns layer, value, low, high, of `carried` also group; in `needed` they are shares of all edges, and nan in low
    and high stands for no interval. Returns the figure.
    """
    fig, axes = plt.subplots(1, 2, figsize=(11, 3.4))
    effect_by_layer(carried, axes[0])
    axes[0].axhline(target, color="0.6", lw=0.8, ls=":")
    axes[0].set(ylabel="faithfulness", ylim=(-0.1, 1.3))
    axes[1].plot(needed["layer"], needed["value"], "o-", color="#c1442e", ms=4)
    axes[1].fill_between(needed["layer"], needed["low"], needed["high"], color="#c1442e", alpha=0.15, lw=0)
    ylabel = f"smallest share of all edges\nthat carries {target:g}"
    axes[1].set(xlabel="steered block", ylabel=ylabel, ylim=(0, 1.05))
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    fig.tight_layout()
    return fig


def loss_panels(lost: pd.DataFrame, published: pd.DataFrame, title: str = "") -> Figure:
    """What each intervention takes away, counted in three ways: a panel of `drops_by_intervention` for each.

    `lost` holds tables of `losses`, with the column task; `published` has the columns model, task, intervention, points
    and share. What is added to an unsteered model takes nothing away, and is left out.
    """
    labels = {
        "points": "percentage points lost",
        "share": "share of the effect lost",
        "first_token": "share of the first token's change lost",
    }
    lost = lost[~lost["intervention"].str.startswith("steered")]
    fig, axes = plt.subplots(1, 3, figsize=(14, 4.4), sharey=True)
    for ax, (column, label) in zip(axes, labels.items()):
        ours = lost[["task", "intervention"]].copy()
        ours[["value", "low", "high"]] = lost[column].tolist()
        theirs = published.rename(columns={column: "value"}) if column in published else published[:0]
        drops_by_intervention(ours, theirs, ax)
        ax.set_xlabel(label)
    fig.suptitle(title)
    fig.legend(*axes[0].get_legend_handles_labels(), ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.01),
               fontsize="small")  # fmt: skip
    fig.tight_layout()
    return fig


def mean_and_spread(tables: Mapping[str, pd.DataFrame], ylabel: str, ax: Axes | None = None) -> Axes:
    """Mean and standard deviation by block, a line a group: tables by block with the columns mean and spread."""
    ax = plt.subplots(figsize=(6.4, 3.2))[1] if ax is None else ax
    for (name, table), colour in zip(tables.items(), ("#c1442e", "#2b6f9c")):
        ax.errorbar(table.index, table["mean"], table["spread"], fmt="o-", ms=4, capsize=3, color=colour, label=name)
    ax.axhline(0, color="0.6", lw=0.8)
    ax.set(xlabel="steered block", ylabel=ylabel)
    ax.legend(fontsize="small")
    return ax


def dots_by_measure_and_place(table: pd.DataFrame, labels: Mapping[str, str], bar: float = 0.05) -> Figure:
    """Panels of `dots_against_band`: a column a measure, over its label, and a row a place that was read.

    `table` has that function's columns, and measure and place; `labels` maps each measure to its axis label.
    """
    places = list(dict.fromkeys(table["place"]))
    fig, axes = plt.subplots(len(places), len(labels), figsize=(4.6 * len(labels), 2.8 * len(places)), sharey=True,
                             squeeze=False)  # fmt: skip
    for (place, (measure, label)), ax in zip(product(places, labels.items()), axes.flat):
        part = table[(table["place"] == place) & (table["measure"] == measure)]
        dots_against_band(part, label, place, ax, bar)
    plt.setp(axes[:-1], xlabel="")
    fig.tight_layout()
    handles = axes[0, 0].get_legend_handles_labels()
    fig.legend(*handles, fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, 0))
    return fig


def head_maps(maps: Mapping[str, np.ndarray], first: int, label: str = "", top: float | None = None) -> Figure:
    """`head_map` of several tables of heads, by title, side by side and in one scale of colours."""
    shape = next(iter(maps.values())).shape
    fig, axes = plt.subplots(1, len(maps), figsize=(6 * len(maps), 0.3 * shape[0] + 1.6), sharey=True, squeeze=False)
    limit = max(np.abs(values).max() for values in maps.values())
    for ax, (title, values) in zip(axes[0], maps.items()):
        head_map(values, first, title, label, top, ax, limit)
    fig.tight_layout()
    return fig


def error_panels(errors: pd.DataFrame) -> Figure:
    """`errors_by_method` by measure (a row of panels each) and by edges (a column each), from the columns method,
    target, edges, measure and error. Returns the figure.
    """
    measures, edges = errors["measure"].unique(), errors["edges"].unique()
    fig, axes = plt.subplots(len(measures), len(edges), figsize=(11, 7), sharex=True, sharey="row", squeeze=False)
    for (row, column), ax in np.ndenumerate(axes):
        part = errors[(errors["measure"] == measures[row]) & (errors["edges"] == edges[column])]
        errors_by_method(part, ax=ax)
        ax.set(title=f"{edges[column]} edges, {measures[row]}", ylabel=None if column else "relative error")
        methods = part["method"].unique()
        ax.set_xticks(range(len(methods)), [name.replace(", ", ",\n") for name in methods])
        if ax is not axes[-1, -1]:
            ax.get_legend().remove()
    fig.tight_layout()
    return fig


def curve_panels(curves: pd.DataFrame) -> Figure:
    """Curves with their bands on a logarithmic axis, a panel each (three a row) and a line a method: columns panel,
    method, x, value, low, high. Returns the figure.
    """
    panels = list(dict.fromkeys(curves["panel"]))
    colours = dict(zip(curves["method"].unique(), sns.color_palette("colorblind", 10)))
    columns, rows = min(3, len(panels)), -(-len(panels) // 3)
    fig, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.6 * rows), squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, panel in zip(axes.flat, panels):
        part = curves[curves["panel"] == panel]
        for name, line in part.groupby("method", sort=False):
            ax.plot(line["x"], line["value"], "o-", ms=3, color=colours[name], label=name)
            ax.fill_between(line["x"], line["low"], line["high"], color=colours[name], alpha=0.1, lw=0)
        ax.legend(fontsize="x-small")
        ax.set(title=panel, xscale="log", xlabel="", ylabel="", ylim=(min(-0.02, part["low"].min()), 1.02))
    fig.tight_layout()
    return fig
