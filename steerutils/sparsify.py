"""Sparse steering vectors: how few dimensions of a vector do its work (Cheng et al. 2026, section 7).

A dimension's effect is its share of the metric's change, effect_i = strength * s_i * gradient_i, with the gradient at
the steering node averaged between the base and the steered run and summed over the steered positions.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Shaped
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor

from .attribution import AttributionError, Contrast, Metric, divergence_from, logits_read, midpoint, steering_contrast
from .judges import bootstrap, bootstrap_draws, refusal_score, refusal_tokens
from .models import ChatModel, resume
from .prompts import batches, encode
from .record import kept_arrays
from .steering import SteeringError, SteeringVector, last_logits, sweep, vector_key
from .vectors import judged_grid

METHODS = ("gradient", "effect", "magnitude", "random")
PROMPTS_TOGETHER = 8  # in one backward pass
VECTORS_TOGETHER = 24  # measured, and kept, as one part


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
            value = metric(logits_read(model, contrast, final)).sum()
        total += torch.autograd.grad(value, start)[0].sum(1)  # nothing reads padding: its gradient is zero
    if not torch.isfinite(total).all():
        bad = (~torch.isfinite(total)).any(1).nonzero().flatten().tolist()
        raise AttributionError(f"the gradient of example {bad} is not finite; look at its tokens.")
    return total / len(points)


def gradients_by_prompt(
    model: ChatModel,
    vector: SteeringVector,
    prompts: Sequence[str],
    strength: float,
    metric: Metric,
    points: Sequence[float],
) -> Float[Tensor, "prompt d_model"]:
    """`steering_gradient` along a vector's path at a strength, for each chat prompt; on the CPU.

    Raises what `steering_contrast` and `steering_gradient` raise.
    """
    found = []
    for chunk in batches(list(prompts), PROMPTS_TOGETHER):
        contrast = steering_contrast(model, encode(model.tokenizer, chunk, device=model.device), vector, strength)
        found.append(steering_gradient(model, contrast, metric, points))  # [prompt, d_model]
    return torch.cat(found).cpu()


def dimensions_holding(effects: Float[np.ndarray, " d_model"], share: float) -> int:
    """How many dimensions, those of the largest effect first, it takes to hold a share of the sum of abs(effect)."""
    held = np.sort(np.abs(effects))[::-1].cumsum()
    return int((held < share * held[-1]).sum()) + 1


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
    """The n dimensions of largest effect. Columns: dimension, entry (s_i), gradient, effect, share.

    The share is of the sum of absolute effects: that of plain ones may be near zero, and a share of it says nothing.
    """
    table = pd.DataFrame({"entry": _numbers(vector.direction), "gradient": _numbers(gradient)})
    table = table.assign(effect=strength * table["entry"] * table["gradient"])
    table["share"] = table["effect"].abs() / table["effect"].abs().sum()
    order = table["effect"].abs().sort_values(ascending=False, kind="stable").index[:n]
    return table.loc[order].rename_axis("dimension").reset_index()


@torch.no_grad()
def read_dimensions(model: ChatModel, table: pd.DataFrame, tokens: Sequence[int]) -> pd.DataFrame:
    """A `dimension_table` with what the logit lens reads from each dimension alone, in the direction that is added.

    Columns more: added (+1 or -1, the sign of strength * entry), lift (mean logit of `tokens` above the vocabulary's,
    in standard deviations of it), words (the two highest tokens, shortened). The lens is the final norm and the
    unembedding: what later blocks do with a dimension it does not see.
    """
    added = np.sign(table["effect"] * table["gradient"]).to_numpy()
    units = torch.zeros(len(table), model.d_model)
    units[torch.arange(len(table)), torch.tensor(table["dimension"].to_numpy())] = torch.tensor(added).float()
    logits = model.unembed(units.to(model.device, model.dtype)).float()  # [dimension, vocab]
    lift = (logits[:, list(tokens)].mean(1) - logits.mean(1)) / logits.std(1)
    words = [" ".join(map(model.tokenizer.decode, row))[:30] for row in logits.topk(2).indices.tolist()]
    return table.assign(added=added.astype(int), lift=lift.double().cpu().numpy(), words=words)


# --- what vectors do -------------------------------------------------------------------------------------


def refusal_by_vector(
    model: ChatModel,
    vectors: Sequence[SteeringVector],
    prompts: Sequence[str],
    strength: float,
    folder: Path | str | None = None,
) -> Float[np.ndarray, "vector prompt"]:
    """The refusal score (nats) of every prompt's first answer token under every vector, added at all positions.

    In a `folder` the scores of every few vectors are kept, so that a run that was cut off goes on after them. Raises
    SteeringError for an ablation, as `sweep` does.
    """
    tokens = refusal_tokens(model.tokenizer)
    return _swept(
        model, vectors, prompts, strength, "refusal score", lambda logits: refusal_score(logits, tokens), folder
    )


def divergence_by_vector(
    model: ChatModel,
    vectors: Sequence[SteeringVector],
    prompts: Sequence[str],
    strength: float,
    folder: Path | str | None = None,
) -> Float[np.ndarray, "vector prompt"]:
    """KL(unsteered || steered) of the first answer token in nats; prompts, vectors and `folder` as `refusal_by_vector`.

    A vector's side effect, where the prompts are such as it should leave alone.
    """
    divergence = divergence_from(last_logits(model, prompts)[:, None])
    return _swept(model, vectors, prompts, strength, "KL", lambda logits: divergence(logits[:, None]), folder)


def verdicts_by_vector(
    model: ChatModel,
    vectors: Sequence[SteeringVector],
    prompts: Sequence[str],
    strength: float,
    max_new_tokens: int,
    folder: Path | str | None = None,
) -> Shaped[np.ndarray, "vector prompt"]:
    """Verdicts of `judge` on whole greedy answers; prompts, vectors and `folder` as `refusal_by_vector`.

    The answers themselves are dropped.
    """

    def judged(some: list[SteeringVector]) -> np.ndarray:
        table = judged_grid(model, prompts, [(v, strength) for v in some], max_new_tokens, batch_size=96)
        return table["verdict"].to_numpy(str).reshape(len(some), len(prompts))

    return _in_parts(model, vectors, [prompts, strength, max_new_tokens], "verdicts", judged, folder)


def _swept(model, vectors, prompts, strength, name: str, score, folder) -> Float[np.ndarray, "vector prompt"]:
    def scores(some: list[SteeringVector]) -> np.ndarray:
        table = sweep(model, some, prompts, [strength], score, batch_size=len(prompts))
        return table["score"].to_numpy().reshape(len(some), len(prompts))

    return _in_parts(model, vectors, [prompts, strength, name], "scores", scores, folder)


def _in_parts(model, vectors, about: list, name: str, measure, folder) -> Shaped[np.ndarray, "vector prompt"]:
    """A measure of a few vectors at a time, each part kept under all that it depends on."""
    parts = []
    for some in batches(list(vectors), VECTORS_TOGETHER):
        what = [model.revision, str(model.dtype), *about, [vector_key(vector) for vector in some]]
        parts.append(kept_arrays(folder, what, lambda some=some: {name: measure(some)})[name])
    return np.concatenate(parts)


def measure_series(
    series: Mapping[Hashable, Sequence[SteeringVector]],
    measure: Callable[[list[SteeringVector]], Shaped[np.ndarray, "vector prompt"]],
) -> dict[Hashable, Shaped[np.ndarray, "step prompt"]]:
    """A measure of several series of vectors that begin with the same one (the dense), which is measured only once.

    `measure` is called once, with all vectors. Raises ValueError when series begin with different vectors.
    """
    dense = next(iter(series.values()))[0]
    if any(vectors[0] is not dense for vectors in series.values()):
        raise ValueError("the series begin with different vectors: put the same dense one first.")
    first, *rest = measure([dense, *(vector for vectors in series.values() for vector in vectors[1:])])
    rows = iter(rest)
    return {key: np.stack([first, *(next(rows) for _ in vectors[1:])]) for key, vectors in series.items()}


# --- how much is kept ------------------------------------------------------------------------------------


def share_left(change: ArrayLike, dense: ArrayLike, seed: int = 0, n: int = 1000) -> tuple[float, float, float]:
    """What is left of a dense vector's effect: mean(change) / mean(dense), with its interval: (value, low, high).

    Both are changes of the same prompts, [prompt], from what the unsteered model does. `bootstrap` over prompts, n
    resamples; a dense effect of 0 counts as nothing left. For flags it is too short: see `share_of_answers`. The
    changes of several draws of a random control, [draw, prompt], are averaged; then it is `bootstrap_draws`.
    """
    return _over_draws(_ratio, change, dense, seed=seed, n=n)


def _over_draws(statistic, changes: ArrayLike, *samples: ArrayLike, seed: int, n: int, axes: int = 1):
    """`bootstrap_draws` of changes with so many axes, or with one more, the draws."""
    changes = np.asarray(changes, float)
    return bootstrap_draws(statistic, changes if changes.ndim > axes else changes[None], *samples, seed=seed, n=n)


def distance_from_dense(
    changes: Float[np.ndarray, "*draw step prompt"], seed: int = 0, n: int = 1000
) -> tuple[float, float, float]:
    """How far the share of the dense effect is from 1, on either side, mean over sparse steps: (value, low, high).

    `changes` as for `share_left`, draws included, the first row being the dense vector's. 0: every step does what the
    dense one does.
    """

    def distance(rows: np.ndarray, axis: int) -> np.ndarray | float:
        return abs(_ratio(rows[..., 1:, :], rows[..., :1, :], axis) - 1).mean(-1)

    return _over_draws(distance, changes, seed=seed, n=n, axes=2)


def _ratio(change: np.ndarray, dense: np.ndarray, axis: int) -> np.ndarray | float:
    """mean(change) / mean(dense), and 0 where nothing is to be divided by."""
    part, whole = np.broadcast_arrays(change.mean(axis), dense.mean(axis))
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole != 0)


def beside_random(
    change: Float[np.ndarray, " prompt"], randoms: Float[np.ndarray, "draw prompt"], sign: int, seed: int = 0
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """A vector's change of a score beside those of random vectors on the same prompts, each as (value, low, high).

    First the random ones' mean change as a share of the vector's, with an interval over prompts and draws; then how
    much further it moves the score than the strongest of them, upwards with a sign of 1, downwards with -1 (an interval
    over prompts).
    """
    strongest = randoms[np.argmax(sign * randoms.mean(1))]
    return share_left(randoms, change, seed), bootstrap(np.mean, sign * (change - strongest), seed=seed)


def beside_weaker(
    effect: Float[np.ndarray, " prompt"],
    side: Float[np.ndarray, " other"],
    weaker: Float[np.ndarray, "scale prompt"],
    weaker_side: Float[np.ndarray, "scale other"],
    seed: int = 0,
) -> tuple[float, float, float] | None:
    """How much more a vector disturbs other prompts than the dense one does, made weaker to the same mean effect.

    `effect` and `side` are the vector's change of a score and its side effect, `weaker` and `weaker_side` those of the
    dense vector at rising scales from 0 on; between scales both are taken as straight lines. With a 95 % bootstrap
    interval over both kinds of prompts: (value, low, high). None where the dense vector at its largest scale does less
    than the vector in more than one resample of twenty.
    """
    rng = np.random.default_rng(seed)
    sign = np.sign(weaker[-1].mean()) or 1.0

    def difference(rows: np.ndarray, others: np.ndarray) -> float:
        """The vector's side effect less the weaker dense one's, for these prompts; nan where none does as much."""
        reached = np.maximum.accumulate(sign * weaker[:, rows].mean(1))  # a larger scale may do less again
        asked = sign * effect[rows].mean()
        if asked > reached[-1]:
            return np.nan
        return float(side[others].mean() - np.interp(asked, reached, weaker_side[:, others].mean(1)))

    sizes = len(effect), len(side)
    value = difference(*map(np.arange, sizes))
    drawn = np.array([difference(*(rng.integers(size, size=size) for size in sizes)) for _ in range(1000)])
    if np.isnan(value) or np.isnan(drawn).mean() > 0.05:
        return None
    return value, *map(float, np.nanquantile(drawn, [0.025, 0.975]))


def curve_table(
    curves: Mapping[str, Shaped[np.ndarray, "*draw step prompt"]],
    sparsities: Sequence[float],
    interval: Callable[[Shaped[np.ndarray, "*draw prompt"]], tuple[float, float, float]],
) -> pd.DataFrame:
    """A statistic of each step's prompts with its interval, as `plots.by_sparsity` takes it.

    `curves` are named by method; a step of one with several draws is [draw, prompt]. Columns: sparsity, value, low,
    high, method.
    """
    by_step = {method: np.moveaxis(curve, -2, 0) for method, curve in curves.items()}
    rows = [(x, *interval(row), method) for method, curve in by_step.items() for x, row in zip(sparsities, curve)]
    return pd.DataFrame(rows, columns=["sparsity", "value", "low", "high", "method"])


def rows_of_curves(
    curves: Mapping[tuple, Shaped[np.ndarray, "step prompt"]], sparsities: Sequence[float], columns: Sequence[str]
) -> pd.DataFrame:
    """Curves as one wide table, to be kept by `record_rows`: a row a key and step, a column a prompt ("0", "1", ...).

    `columns` name the parts of a key; then comes "sparsity". A curve with fewer steps than there are sparsities has the
    first ones, one with fewer prompts has blanks at the end. `curves_of_rows` reads it.
    """
    rows = [(*key, x, *row) for key, curve in curves.items() for x, row in zip(sparsities, curve)]
    n = max(map(len, rows)) - len(columns) - 1
    rows = [(*row, *[None] * (n + len(columns) + 1 - len(row))) for row in rows]
    return pd.DataFrame(rows, columns=[*columns, "sparsity", *map(str, range(n))])


def curves_of_rows(table: pd.DataFrame) -> dict[tuple, Shaped[np.ndarray, " prompt"]]:
    """What `rows_of_curves` made a table of: each step's prompts by (key, ..., sparsity)."""
    ends = table.columns.get_loc("sparsity") + 1
    values = table.iloc[:, ends:]
    return {
        tuple(key): row.dropna().to_numpy()
        for key, (_, row) in zip(table.iloc[:, :ends].itertuples(index=False, name=None), values.iterrows())
    }


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
    sign. With its 95 % bootstrap interval over examples: (value, low, high), each one of `sparsities`. The mean of a
    random control's draws [draw, sparsity, example] has that of `bootstrap_draws`. A resample without effect counts as
    0. Raises ValueError when sparsities do not rise from 0, shapes do not fit, or the dense vector has no effect.
    """
    sparsities, curve = np.asarray(sparsities, dtype=float), np.asarray(curve, dtype=float)
    base = np.asarray(base, dtype=float)
    if sparsities[0] != 0 or (np.diff(sparsities) <= 0).any():
        raise ValueError("sparsities must rise, beginning with 0 (the dense vector): sort them.")
    if curve.shape[-2:] != (len(sparsities), len(base)):
        raise ValueError(
            f"the curve has shape {curve.shape}; it needs a row for each of {len(sparsities)} sparsities and a "
            f"column for each of {len(base)} examples."
        )
    if curve[..., 0, :].mean() == base.mean():
        raise ValueError("the dense vector has no effect on these examples, so there is nothing to keep.")

    def largest(rows: np.ndarray, base: np.ndarray, axis: int) -> np.ndarray:
        """The last sparsity before the effect first falls below what is to be kept."""
        left = _ratio(rows - base[..., None, :], (rows - base[..., None, :])[..., :1, :], axis)  # [..., step]
        enough = left >= keep - 1e-12
        last = sparsities[np.argmin(enough, -1) - 1]  # before the first that is not; if all are, the last
        return np.where(left[..., 0] == 0, 0.0, last)  # 0: a resample in which steering does nothing

    return _over_draws(largest, curve, base, seed=seed, n=1000, axes=2)


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
    bins: int = 1,
) -> tuple[float, Float[np.ndarray, " n"], float]:
    """Agreement of two vectors' kept dimensions against a null that keeps their gradients: (iou, null ious, p).

    In each draw both vectors' entries are shuffled over the dimensions, apart from each other, and ranked by `method`
    with the gradients as they are. Kept fixed: both gradients, each vector's set of entries, the number of dimensions
    kept. With several `bins`, entries are only shuffled within as many equal groups of dimensions by the size of their
    own vector's gradient, so that each vector's fit to its gradient (large entries where it is large) is kept as well.
    What agreement is left comes from what is fixed. By the "gradient" method alone the entries do not count, and p is
    1: all of its agreement is the gradients'.
    """
    rng = np.random.default_rng(seed)
    d = len(vectors[0].direction)
    groups = [np.abs(_numbers(g)).argsort().argsort() * bins // d for g in gradients]  # [d_model] each: 0 to bins - 1
    kept = max(1, round((1 - sparsity) * d))

    def iou(pair: Sequence[SteeringVector]) -> float:
        one, other = (_largest(importance(v, method, g), kept) for v, g in zip(pair, gradients))
        return float((one & other).sum() / (one | other).sum())

    def shuffled(vector: SteeringVector, group: np.ndarray) -> SteeringVector:
        moved = torch.empty_like(vector.direction)
        places = torch.as_tensor(group.argsort(kind="stable"))  # that of ties differs by processor otherwise
        moved[places] = vector.direction[torch.as_tensor(np.lexsort((rng.random(d), group)))]
        return replace(vector, direction=moved)

    found = iou(vectors)
    null = np.array([iou([shuffled(v, group) for v, group in zip(vectors, groups)]) for _ in range(n)])
    return found, null, float((1 + (null >= found - 1e-12).sum()) / (1 + n))


def agreement_table(
    vectors: Mapping[str, SteeringVector],
    gradients: Mapping[str, Float[Tensor, " d_model"]],
    sparsities: Sequence[float],
    n: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """`agreement` of every two vectors' kept dimensions, each ranked with its own gradient, beside `field_null`.

    A row a pair, rule (effect, gradient, magnitude) and sparsity. Columns: pair ("A and B"), method, sparsity, iou,
    expected and p (of independent sets), field_p, field_low, field_median, field_high (of n draws that keep the
    gradients: p, and the null's 2.5, 50 and 97.5 % quantiles), fit_p, fit_median (the same of draws that keep each
    vector's fit to its gradient, too: within tenths of the dimensions by its size).
    """
    rows = []
    for one, other in combinations(vectors, 2):
        pair, slopes = (vectors[one], vectors[other]), (gradients[one], gradients[other])
        for method in ("effect", "gradient", "magnitude"):
            for x in sparsities:
                found = agreement(*(kept_dimensions(sparsify(v, method, x, g)) for v, g in zip(pair, slopes)))
                _, null, p = field_null(pair, slopes, method, x, n, seed)
                low, median, high = np.quantile(null, [0.025, 0.5, 0.975])
                _, fit, fit_p = field_null(pair, slopes, method, x, n, seed, bins=10)
                row = {"pair": f"{one} and {other}", "method": method, "sparsity": x}
                row |= {name: found[name] for name in ("iou", "expected", "p")}
                row |= {"field_p": p, "field_low": low, "field_median": median, "field_high": high}
                rows.append(row | {"fit_p": fit_p, "fit_median": float(np.median(fit))})
    return pd.DataFrame(rows)
