"""Sparse steering vectors: how few dimensions of a vector do its work (Cheng et al. 2026, section 7).

A dimension's effect is its share of the metric's change, effect_i = strength * s_i * gradient_i, with the gradient at
the steering node averaged between the base and the steered run and summed over the steered positions.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor

from .attribution import AttributionError, Contrast, Metric, midpoint
from .judges import bootstrap
from .models import ChatModel, resume
from .steering import SteeringError, SteeringVector

METHODS = ("gradient", "effect", "magnitude", "random")


# --- effects of dimensions -------------------------------------------------------------------------------


def steering_gradient(
    model: ChatModel, contrast: Contrast, metric: Metric, points: Sequence[float] = midpoint(10)
) -> Float[Tensor, "batch d_model"]:
    """The metric's gradient at the steering node, summed over steered positions, averaged over points between the runs.

    `contrast` is a `steering_contrast`; times strength * direction this gives each dimension's effect, which add up to
    metric(steered) - metric(base) as the points grow denser. One forward and backward pass through the blocks from
    the vector's on for each point. Raises AttributionError for no points or a gradient that is not finite.
    """
    if not len(points):
        raise AttributionError("no integration points: give midpoint(m).")
    total = torch.zeros_like(contrast.difference[:, 0])
    for point in points:
        start = (contrast.corrupted - point * contrast.difference).detach().requires_grad_()
        with torch.enable_grad():
            final = resume(model, contrast.tape, contrast.graph.first, start)
            value = metric(model.unembed(final[:, -contrast.keep :])).sum()
        total += torch.autograd.grad(value, start)[0].sum(1)  # nothing reads padding: its gradient is zero
    if not torch.isfinite(total).all():
        bad = (~torch.isfinite(total)).any(1).nonzero().flatten().tolist()
        raise AttributionError(f"the gradient of example {bad} is not finite; look at its tokens.")
    return total / len(points)


def importance(
    vector: SteeringVector, method: str, gradient: Float[Tensor, " d_model"] | None = None, seed: int = 0
) -> Float[np.ndarray, " d_model"]:
    """What a method ranks the dimensions by, the largest being kept.

    "gradient": the size of the mean gradient, which is that of effect_i / s_i (the paper's gradient-based rule);
    "effect": of s_i * gradient_i (its IE-based rule); "magnitude": of s_i; "random": an order drawn with `seed`, the
    same for every vector. Dimensions where the vector is zero come last. Raises SteeringError for an unknown method or
    a missing gradient.
    """
    if method not in METHODS:
        raise SteeringError(f"unknown method {method!r}: give {', '.join(METHODS)}.")
    s = np.abs(_numbers(vector.direction))
    if method in ("gradient", "effect"):
        if gradient is None:
            raise SteeringError(f"the {method} method needs the mean gradient: steering_gradient(...).mean(0).")
        slope = np.abs(_numbers(gradient))
        scores = slope if method == "gradient" else slope * s
    else:
        scores = s if method == "magnitude" else np.random.default_rng(seed).random(len(s))
    return np.where(s > 0, scores, -1.0)


def _numbers(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()


# --- sparse vectors --------------------------------------------------------------------------------------


def sparsify(
    vector: SteeringVector,
    method: str,
    sparsity: float,
    gradient: Float[Tensor, " d_model"] | None = None,
    rescale: bool = True,
    seed: int = 0,
) -> SteeringVector:
    """The vector with the share `sparsity` of its dimensions set to zero: those a method (`METHODS`) ranks lowest.

    At least one dimension stays. `rescale` brings what is left to the original norm, as the paper does without saying
    so. Raises SteeringError for a sparsity outside [0, 1), and what `importance` raises.
    """
    if not 0 <= sparsity < 1:
        raise SteeringError(f"a sparsity of {sparsity}: give the share of dimensions to drop, from 0 to below 1.")
    n = max(1, round((1 - sparsity) * len(vector.direction)))
    kept = _largest(importance(vector, method, gradient, seed), n)
    return _with_only(vector, kept, f"random {seed}" if method == "random" else method, rescale)


def sparsify_by_threshold(
    vector: SteeringVector, gradient: Float[Tensor, " d_model"], tau: float, rescale: bool = True
) -> SteeringVector:
    """The paper's gradient-based rule by its own parameter: drop i where abs(effect_i) / norm(effect) is below
    tau * abs(s_i) / norm(s). A tau of 0 keeps everything. Raises SteeringError when nothing is left.
    """
    s = _numbers(vector.direction)
    effect = s * _numbers(gradient)
    kept = np.abs(effect) / np.linalg.norm(effect) >= tau * np.abs(s) / np.linalg.norm(s)
    if not (kept & (s != 0)).any():
        raise SteeringError(f"tau = {tau} drops every dimension: give a smaller one.")
    return _with_only(vector, kept, f"gradient (tau {tau:g})", rescale)


def _largest(scores: np.ndarray, n: int) -> Bool[np.ndarray, " d_model"]:
    kept = np.zeros(len(scores), dtype=bool)
    kept[np.argsort(-scores, kind="stable")[:n]] = True
    return kept


def _with_only(vector: SteeringVector, kept: np.ndarray, method: str, rescale: bool) -> SteeringVector:
    left = vector.direction * torch.as_tensor(kept).to(vector.direction)
    if rescale:
        left = left * (vector.norm / left.norm())
    words = f"{vector.method}, {1 - kept.mean():.1%} sparse by {method}{'' if rescale else ', not rescaled'}"
    return replace(vector, direction=left, method=words)


def kept_dimensions(vector: SteeringVector) -> Bool[np.ndarray, " d_model"]:
    """Which dimensions of a vector are not zero."""
    return _numbers(vector.direction) != 0


def dimension_table(
    vector: SteeringVector, gradient: Float[Tensor, " d_model"], strength: float = 1.0, n: int = 20
) -> pd.DataFrame:
    """The n dimensions of largest effect. Columns: dimension, entry (s_i), gradient, effect, share of the sum."""
    table = pd.DataFrame({"entry": _numbers(vector.direction), "gradient": _numbers(gradient)})
    table = table.assign(effect=strength * table["entry"] * table["gradient"])
    table["share"] = table["effect"] / table["effect"].sum()
    order = table["effect"].abs().sort_values(ascending=False, kind="stable").index[:n]
    return table.loc[order].rename_axis("dimension").reset_index()


# --- how much is kept ------------------------------------------------------------------------------------


def largest_sparsity(
    sparsities: Sequence[float],
    curve: ArrayLike,
    base: ArrayLike,
    keep: float = 0.9,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The largest sparsity up to which at least the share `keep` of the steering effect is left, at every step.

    `curve` [sparsity, example] holds each example's score or flag at rising sparsities, the first being the dense
    vector's (0), `base` [example] that of the unsteered run; the effect is the difference of their means, with either
    sign. With its 95 % bootstrap interval over examples: (value, low, high), each one of `sparsities`. A resample
    without effect counts as 0. Raises ValueError when sparsities do not rise from 0, shapes do not fit, or the dense
    vector has no effect.
    """
    sparsities, curve = np.asarray(sparsities, dtype=float), np.asarray(curve, dtype=float)
    base = np.asarray(base, dtype=float)
    if sparsities[0] != 0 or (np.diff(sparsities) <= 0).any():
        raise ValueError("sparsities must rise, beginning with 0 (the dense vector): sort them.")
    if curve.shape != (len(sparsities), len(base)):
        raise ValueError(
            f"the curve has shape {curve.shape}; it needs a row for each of {len(sparsities)} sparsities and a "
            f"column for each of {len(base)} examples."
        )
    if curve[0].mean() == base.mean():
        raise ValueError("the dense vector has no effect on these examples, so there is nothing to keep.")

    def largest(base: np.ndarray, *rows: np.ndarray) -> float:
        """The last sparsity before the effect first falls below what is to be kept."""
        effects = np.array([row.mean() for row in rows]) - base.mean()
        if not effects[0]:  # a resample in which steering does nothing
            return 0.0
        enough = effects / effects[0] >= keep - 1e-12
        return float(sparsities[np.argmin(enough) - 1])  # before the first that is not; if all are, the last

    return bootstrap(largest, base, *curve, seed=seed)


# --- agreement of the kept dimensions --------------------------------------------------------------------


def agreement(one: Bool[np.ndarray, " d_model"], other: Bool[np.ndarray, " d_model"]) -> dict[str, int | float]:
    """How far two sets of kept dimensions agree: shared (a count), iou, overlap, expected (iou by chance), p.

    iou = intersection over union; overlap = intersection over the smaller set; p is the hypergeometric chance of at
    least as many shared dimensions between two sets of these sizes drawn independently. That null ignores what both
    sets owe to one gradient field: see `field_null`. Raises ValueError for an empty set.
    """
    d, n, m, shared = len(one), int(one.sum()), int(other.sum()), int((one & other).sum())
    if not n or not m:
        raise ValueError("a set of kept dimensions is empty: keep at least one dimension.")
    drawn = stats.hypergeom(d, n, m)
    counts = np.arange(min(n, m) + 1)
    return {
        "shared": shared,
        "iou": shared / (n + m - shared),
        "overlap": shared / min(n, m),
        "expected": float((drawn.pmf(counts) * counts / (n + m - counts)).sum()),
        "p": float(drawn.sf(shared - 1)),
    }


def field_null(
    vectors: tuple[SteeringVector, SteeringVector],
    gradients: tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]],
    method: str,
    sparsity: float,
    n: int = 1000,
    seed: int = 0,
) -> tuple[float, Float[np.ndarray, " n"], float]:
    """Agreement of two vectors' kept dimensions against a null that keeps their gradients: (iou, null ious, p).

    In each draw both vectors' entries are shuffled over the dimensions, apart from each other, and ranked by `method`
    with the gradients as they are. What agreement is left comes from the gradients, not from the vectors. By the
    "gradient" method alone the entries do not count, and p is 1: all of its agreement is the gradients'.
    """
    rng = np.random.default_rng(seed)
    d = len(vectors[0].direction)
    kept = max(1, round((1 - sparsity) * d))

    def iou(pair: Sequence[SteeringVector]) -> float:
        one, other = (_largest(importance(v, method, g), kept) for v, g in zip(pair, gradients))
        return float((one & other).sum() / (one | other).sum())

    def shuffled(vector: SteeringVector) -> SteeringVector:
        return replace(vector, direction=vector.direction[torch.as_tensor(rng.permutation(d))])

    found = iou(vectors)
    null = np.array([iou([shuffled(v) for v in vectors]) for _ in range(n)])
    return found, null, float((1 + (null >= found - 1e-12).sum()) / (1 + n))
