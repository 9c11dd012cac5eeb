"""How good estimated edge scores are: exact effects to hold them against, their errors, and whether they add up."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from .attribution import Contrast, Metric, graph_of, logits_read
from .circuits import patch_edges
from .graph import Graph
from .models import ChatModel, edit, repeated, resume, tape
from .prompts import align_pairs, batches

# --- estimates beside exact effects ------------------------------------------------------------------------------


def sample_edges(
    graph: Graph, scores: Iterable[Float[np.ndarray, "source reader"]], n_strong: int, n_random: int, seed: int = 0
) -> tuple[Int[np.ndarray, "edge 2"], Bool[np.ndarray, " edge"]]:
    """Edges to test estimates on, as (source, reader) pairs, and which of them are strong.

    The strong ones are the `n_strong` largest of any of the score matrices, so that none of them chooses the test
    alone; then come `n_random` of the rest. Raises ValueError if the rest is fewer.
    """
    every = np.flatnonzero(graph.edges)
    largest = [every[np.argsort(-np.abs(values.ravel()[every]))[:n_strong]] for values in scores]
    strong = np.unique(np.concatenate(largest))
    rest = np.random.default_rng(seed).choice(np.setdiff1d(every, strong), n_random, replace=False)
    edges = np.stack(np.unravel_index(np.concatenate([strong, rest]), graph.edges.shape), 1)
    return edges, np.arange(len(edges)) < len(strong)


def edge_effects(
    model: ChatModel, contrast: Contrast, metric: Metric, edges: Int[np.ndarray, "edge 2"]
) -> pd.DataFrame:
    """Exact effects of edges in a contrast's first example, taken at both of its ends: a row an edge.

    Columns: source and reader (indices), kind (of reader); "base", what `patch_edges` gives: this edge corrupted, all
    others as in the clean run; "other", the same step at the other end: metric(corrupted run) - metric(corrupted run
    with this edge set back); and "mean of both". In the metric's unit.
    """
    back = replace(contrast, clean=contrast.corrupted, corrupted=contrast.clean, clean_run=None, corrupted_run=None)
    table = pd.DataFrame(edges, columns=["source", "reader"])
    table["kind"] = contrast.graph.reader_kinds[edges[:, 1]]
    table["base"] = patch_edges(model, contrast, metric, edges)[:, 0]
    table["other"] = -patch_edges(model, back, metric, edges)[:, 0]
    return table.assign(**{"mean of both": (table["base"] + table["other"]) / 2})


def overall_error(estimate: ArrayLike, exact: ArrayLike) -> float:
    """Length of the errors over the length of the exact effects: 0 is perfect, 1 is what predicting zero gets."""
    estimate, exact = np.asarray(estimate), np.asarray(exact)
    return float(np.linalg.norm(estimate - exact) / np.linalg.norm(exact))


def typical_error(estimate: ArrayLike, exact: ArrayLike) -> float:
    """Median over edges of abs(estimate - exact) / abs(exact); edges without any exact effect do not count."""
    estimate, exact = np.asarray(estimate), np.asarray(exact)
    acts = exact != 0
    return float(np.median(np.abs(estimate - exact)[acts] / np.abs(exact[acts])))


def estimate_errors(table: pd.DataFrame, methods: Iterable[str]) -> pd.DataFrame:
    """Relative errors of estimates: a row a (method, target, edges, measure), and the error.

    `table` is that of `edge_effects` with a column a method, and with `strong`, by which its edges are "strong" or
    "random". Targets are its three exact effects, measures "overall" and "typical" (`overall_error`, `typical_error`).
    """
    parts = {"strong": table[table["strong"]], "random": table[~table["strong"]]}
    rows = [
        (method, target, edges, name, measure(part[method], part[target]))
        for edges, part in parts.items()
        for method in methods
        for target in ("base", "other", "mean of both")
        for name, measure in (("overall", overall_error), ("typical", typical_error))
    ]
    return pd.DataFrame(rows, columns=["method", "target", "edges", "measure", "error"])


# --- completeness ------------------------------------------------------------------------------------------------


@torch.no_grad()
def run_values(model: ChatModel, contrast: Contrast, metric: Metric) -> Float[np.ndarray, "2 batch"]:
    """The metric of the clean and of the corrupted run: their difference is what edges are to account for."""
    finals = (resume(model, contrast.tape, contrast.graph.first, h) for h in (contrast.clean, contrast.corrupted))
    return np.stack([metric(logits_read(model, contrast, final)).double().cpu().numpy() for final in finals])


def entered_at(model: ChatModel, clean: Sequence[str], corrupted: Sequence[str], layer: int) -> Contrast:
    """The runs of `pair_contrast`, begun at the input of block `layer`: all that lies below is one source.

    Raises PromptError for pairs that do not align.
    """
    pairs = align_pairs(model.tokenizer, list(clean), list(corrupted), model.device)
    near, far = (tape(model, side.inputs()) for side in (pairs.clean, pairs.corrupted))
    starts = near.residuals[layer], far.residuals[layer]
    near.residuals.clear()
    return Contrast(graph_of(model, layer), near, *starts)


POINTS_TOGETHER = 8  # points of a path, of one example, in one pass


def slopes_along(
    model: ChatModel, contrast: Contrast, metric: Metric, points: Sequence[float]
) -> Float[np.ndarray, "point batch"]:
    """The metric's slope at points of the straight path from the corrupted to the clean input: what the scores of the
    edges from the input add up to there.

    It is (corrupted - clean) . gradient at the input. The mean over a path is the change of the metric from the clean
    to the corrupted run, as far as the points are enough. Points are as in `attribute`: fractions of the clean run.
    """
    n, slopes = len(contrast.clean), []
    for part in batches(list(points), max(1, POINTS_TOGETHER // n)):
        share = torch.tensor(part).to(contrast.clean)[:, None, None, None]
        h = (contrast.corrupted - share * contrast.difference).requires_grad_()  # [point, batch, pos, d_model]
        final = resume(model, repeated(contrast.tape, len(part)), contrast.graph.first, h.flatten(0, 1))
        logits = logits_read(model, contrast, final.unflatten(0, (-1, n)))  # [point, batch, keep, word]
        (gradient,) = torch.autograd.grad(sum(metric(row).sum() for row in logits), h)
        slopes.append((gradient * contrast.difference).sum((-2, -1)).double().cpu().numpy())
    return np.concatenate(slopes)


def rule_errors(slopes: Float[np.ndarray, " point"], change: float) -> dict[str, pd.Series]:
    """How far the mean slope of m points is from the change of the metric, for m = 1, 2, 4, ...: a series by m for
    "left points" and one for "midpoints".

    `slopes` are those of `left(n)`, n a power of two: they hold the left points of every smaller power, and the
    midpoints of all but n itself. Raises ValueError for another n.
    """
    n = len(slopes)
    powers = [2**i for i in range(n.bit_length())]
    if powers[-1] != n:
        raise ValueError(f"{n} points: give the slopes at left(n) for n = 1, 2, 4, 8, ...")
    return {
        "left points": pd.Series({m: abs(slopes[:: n // m].mean() - change) for m in powers}),
        "midpoints": pd.Series({m: abs(slopes[n // (2 * m) :: n // m].mean() - change) for m in powers[:-1]}),
    }


# --- the norm between a source and its reader --------------------------------------------------------------------


def mlp_gradients(
    model: ChatModel, contrast: Contrast, metric: Metric
) -> tuple[Float[Tensor, "layer batch pos d_model"], Float[Tensor, "layer batch pos d_model"]]:
    """In the clean run, at every MLP of the graph: the residual stream before its norm, and the gradient of the metric
    by what the MLP is given, after that norm.

    The gradient belongs to changes after the norm; the norm's Jacobian carries it to changes of the stream.
    """
    layers, kept = contrast.graph.layers, {}
    keep = [(site, layer, lambda h, key=(site, layer): kept.update({key: h}))
            for layer in layers for site in ("mlp_residual", "mlp_input")]  # fmt: skip
    with edit(model, keep):
        final = resume(model, contrast.tape, contrast.graph.first, contrast.clean.clone().requires_grad_())
    value = metric(logits_read(model, contrast, final)).sum()
    gradients = torch.autograd.grad(value, [kept["mlp_input", layer] for layer in layers])
    return torch.stack([kept["mlp_residual", layer].detach() for layer in layers]), torch.stack(gradients)
