"""Ranking layers by attribution (A2A), and judging a ranking against the grid that it should replace."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ndcg_score
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from .attribution import Contrast, Metric, clean_residuals, logits_read
from .graph import Graph
from .judges import judge, refusal_score, refusal_tokens
from .models import ChatModel, resume, widened
from .prompts import batches
from .record import all_of, read_json, result_name, stored_results, write_json
from .steering import SteeringVector, steered_answers

EPSILON = 1e-12
SCORES = ("in", "out", "total", "ratio")


# --- scores of layers ------------------------------------------------------------------------------------------


def layer_scores(graph: Graph, scores: Float[np.ndarray, "source reader"]) -> pd.DataFrame:
    """A2A's In, Out, Total and Ratio of every block, from absolute edge scores; their forms per edge beside them.

    In sums the edges that end in a block, Out those that start in one; an edge inside a block counts in both. Input
    and unembedding belong to no block. "per edge" divides each sum by its number of edges, which grows with depth for
    In and falls for Out whatever the model does; Total per edge adds the two means.
    """
    into, out = ends_of_layers(graph, scores)
    n_in, n_out = ends_of_layers(graph, graph.edges.astype(float))
    table = pd.DataFrame({"in": into, "out": out, "total": into + out, "ratio": out / (into + EPSILON)})
    table["in per edge"], table["out per edge"] = into / n_in, out / n_out
    table["total per edge"] = table["in per edge"] + table["out per edge"]
    table["ratio per edge"] = table["out per edge"] / (table["in per edge"] + EPSILON)
    table.index = pd.Index(graph.layers, name="layer")
    return table


def ends_of_layers(
    graph: Graph, scores: Float[np.ndarray, "*batch source reader"]
) -> Float[np.ndarray, "2 *batch layer"]:
    """Sums of the edges that end in each block, and of those that start in it."""
    scores = np.where(graph.edges, scores, 0.0)
    blocks = np.array(graph.layers)
    into = scores.sum(-2) @ (graph.reader_layers[:, None] == blocks)
    out = scores.sum(-1) @ (graph.source_layers[:, None] == blocks)
    return np.stack([into, out])


def edge_count_confound(graph: Graph, scores: Float[np.ndarray, "source reader"], seed: int = 0) -> pd.DataFrame:
    """How much of the order of layers by absolute edge scores is there without the model: a row a score of SCORES.

    Columns: Kendall's "tau with edge counts" (every edge scored 1), and "tau with shuffled" scores, which were
    permuted over all edges: the mean of 20 draws, and "low" and "high", between which 95 % of them lie.
    """
    rng, found = np.random.default_rng(seed), layer_scores(graph, scores)
    counts, shuffled = layer_scores(graph, np.ones(graph.edges.shape)), []
    for _ in range(20):
        moved = np.zeros_like(scores)
        moved[graph.edges] = rng.permutation(scores[graph.edges])
        shuffled.append(layer_scores(graph, moved))
    rows = {}
    for name in SCORES:
        taus = [rank_correlation(found[name], table[name]) for table in shuffled]
        rows[name] = rank_correlation(found[name], counts[name]), np.mean(taus), *np.quantile(taus, [0.025, 0.975])
    columns = ["tau with edge counts", "tau with shuffled", "low", "high"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def joint_scores(graph: Graph, scores: Float[np.ndarray, "source reader"], layers: Sequence[int]) -> dict[str, float]:
    """In, Out and Total of several blocks taken as one: edges among them count neither as In nor as Out."""
    scores = np.where(graph.edges, scores, 0.0)
    arriving, leaving = np.isin(graph.reader_layers, layers), np.isin(graph.source_layers, layers)
    into, out = scores[~leaving][:, arriving].sum(), scores[leaving][:, ~arriving].sum()
    return {"in": float(into), "out": float(out), "total": float(into + out)}


def activation_difference(
    positive: Float[Tensor, "prompt layer d_model"], negative: Float[Tensor, "other layer d_model"]
) -> Float[np.ndarray, " layer"]:
    """ActDiff: norm of the difference of the means of two sides, over the mean norm there (relative, no unit)."""
    difference = positive.double().mean(0) - negative.double().mean(0)
    typical = torch.cat([positive, negative]).double().norm(dim=-1).mean(0)
    return (difference.norm(dim=-1) / typical).cpu().numpy()


def probe_accuracy(
    positive: Float[Tensor, "prompt layer d_model"], negative: Float[Tensor, "other layer d_model"]
) -> Float[np.ndarray, " layer"]:
    """Five-fold accuracy of a linear probe (logistic regression) that tells two sides apart, by layer."""
    both = torch.cat([positive, negative]).double().cpu().numpy()
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    return np.array([cross_val_score(probe, both[:, i], labels, cv=5).mean() for i in range(both.shape[1])])


@torch.no_grad()
def layer_patching(model: ChatModel, contrast: Contrast, metric: Metric) -> Float[np.ndarray, "layer batch"]:
    """Exact effect of a block: the metric of the clean run when what this block writes is taken from the corrupted run,
    less the metric of the clean run. One forward pass of the later blocks a layer.
    """
    residuals = clean_residuals(model, contrast)
    other, effects = contrast.corrupted, []
    for layer in contrast.graph.layers:
        after = _one_block(model, contrast, layer, other)
        patched = residuals[layer] + (after - other)
        logits = logits_read(model, contrast, resume(model, contrast.tape, layer + 1, patched))
        effects.append(metric(logits))
        other = after
    clean = metric(logits_read(model, contrast, residuals[model.n_layers]))
    return widened(torch.stack(effects) - clean).cpu().numpy()


def _one_block(model: ChatModel, contrast: Contrast, layer: int, residual: Tensor) -> Tensor:
    out = model.blocks[layer](residual, **contrast.tape.arguments[layer])
    return out[0] if isinstance(out, tuple) else out


# --- the grid that a ranking should replace ----------------------------------------------------------------------


def working_strength(model: ChatModel) -> float:
    """The smallest strength of the stored full-size grid at which DIM at 60 % of the depth turns at least nine in ten
    of all validation answers round, both ways; 1 where none does, or for a model that nobody has measured.

    One difference of means (strength 1) is much for some models and next to nothing for others.
    """
    try:
        grid = stored_results(result_name("ranking", model.name))
    except ValueError:
        return 1.0
    layer, shares = int(0.6 * model.n_layers), {}
    for task, wanted in (("induce", "r"), ("bypass", "c")):
        for row in grid["values"][task]["validation"]:
            if row["layer"] == layer:
                turned = row["verdicts"].count(wanted) / len(row["verdicts"])
                shares.setdefault(abs(row["strength"]), []).append(turned)
    return min((strength for strength, found in shares.items() if len(found) == 2 and min(found) >= 0.9), default=1.0)


JUDGED_TOGETHER = 16  # settings whose answers are judged in one call, where each prompt runs once for all of them


def steered_verdicts(
    model: ChatModel,
    settings: Sequence[tuple[SteeringVector, float]],
    prompts: Sequence[str],
    max_new_tokens: int = 24,
    path: Path | str | None = None,
) -> pd.DataFrame:
    """Judged answers to every prompt under every (vector, strength): layer, strength, prompt (index), verdict, score.

    `score` is the refusal score of the first token, `verdict` that of `judge` on the whole greedy answer; the answers
    themselves are dropped. With a `path`, rows and their seconds are kept there (JSON), written after every few
    settings: what is there is not run again, so that an interrupted run goes on and settings can be added. There a
    vector is told by block, method and norm: give vectors that differ in direction alone methods of their own. Raises
    ValueError for a file of another run.
    """
    about = {"model": model.name, "revision": model.revision, "dtype": str(model.dtype).removeprefix("torch."),
             "tokens": max_new_tokens, "prompts": digest(prompts)}  # fmt: skip
    done = _finished(path, about)
    tokens = refusal_tokens(model.tokenizer)
    places = [place_of(v.layer, v.method, v.norm, strength) for v, strength in settings]
    missing = [i for i, place in enumerate(places) if place not in done]
    for group in batches(missing, JUDGED_TOGETHER):
        answers, scores, start = [], [], time.time()
        for texts, logits in steered_answers(model, prompts, [settings[i] for i in group], max_new_tokens):
            answers += texts
            scores.append([round(x, 3) for x in refusal_score(logits, tokens).tolist()])
        letters = "".join(word[0] for word in judge(model, [*prompts] * len(group), answers)["verdict"])
        each = round((time.time() - start) / len(group), 1)
        for i, verdicts, row in zip(group, batches(list(letters), len(prompts)), scores):
            done[places[i]] = {"verdicts": "".join(verdicts), "scores": row, "seconds": each}
        if path is not None:
            write_json(path, {"about": about, "rows": done})
    return verdict_table(
        [{"layer": v.layer, "strength": s} | done[place] for (v, s), place in zip(settings, places, strict=True)]
    )


def place_of(layer: int, method: str, norm: float, strength: float) -> str:
    """What a setting's row is kept under."""
    return f"block {layer}, {method} of norm {norm:.5g}, {strength:g}"


VERDICTS = {word[0]: word for word in ("refusal", "compliance", "incoherent")}


def digest(texts: Sequence[str]) -> str:
    """A short fingerprint of a list of texts, for result files that should not hold them."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


def _finished(path: Path | str | None, about: dict) -> dict[str, dict]:
    """The rows of a file, by setting."""
    if path is None or not Path(path).exists():
        return {}
    stored = read_json(path)
    if stored["about"] != about:
        raise ValueError(
            f"{path} holds another run (other prompts, tokens, model or number format): give another path."
        )
    return stored["rows"]


def successful(table: pd.DataFrame, wanted: str, judged: str = "answer") -> pd.DataFrame:
    """Whether steering did what was wanted ("refusal" or "compliance"): a row a (layer, strength), a column a prompt.

    `judged` is "answer" (the verdict, coherence gate included) or "first token" (the refusal score's sign).
    """
    if judged == "answer":
        done = table["verdict"] == wanted
    else:
        done = (table["score"] > 0) == (wanted == "refusal")
    return table.assign(done=done).pivot(index=["layer", "strength"], columns="prompt", values="done").astype(float)


def success_by_judge(table: pd.DataFrame, wanted: str) -> pd.DataFrame:
    """Share of successes by layer (rows) and judge (columns "answer", "first token": see `successful`).

    Each at the strength that this judge likes best there.
    """
    shares = {judged: successful(table, wanted, judged).mean(axis=1) for judged in ("answer", "first token")}
    return pd.DataFrame({judged: row.groupby("layer").max() for judged, row in shares.items()})


def first_token_shifts(table: pd.DataFrame, plain: Float[np.ndarray, " prompt"]) -> pd.DataFrame:
    """How far steering shifts the first token's refusal score in each layer, over prompts: mean and standard deviation
    ("spread"), in nats, and their "ratio" without its sign: the smaller, the more alike all prompts are shifted.

    `table` is that of `steered_verdicts`, `plain` the same prompts' scores without steering. Raises ValueError for more
    than one strength a layer.
    """
    shifts = table.pivot(index="layer", columns="prompt", values="score") - plain
    found = pd.DataFrame({"mean": shifts.mean(axis=1), "spread": shifts.std(axis=1)})
    return found.assign(ratio=found["spread"] / found["mean"].abs())


def best_strengths(successes: pd.DataFrame) -> pd.Series:
    """The strength with the largest share of successes in every layer; of equal ones that nearest to 1 or -1."""
    shares = successes.mean(axis=1).unstack("strength")
    return shares[sorted(shares, key=lambda strength: abs(np.log(abs(strength))))].idxmax(axis=1)


# --- judging a ranking -------------------------------------------------------------------------------------------


def order_of(scores: ArrayLike) -> Int[np.ndarray, " layer"]:
    """Layers from the best to the worst score; equal scores in the order of depth."""
    return np.argsort(-np.asarray(scores, dtype=float), kind="stable")


def rank_gains(effect: ArrayLike) -> Float[np.ndarray, " layer"]:
    """Gain 2^-(rank - 1) of every layer by its measured effect, the best first; tied layers share their places' mean.

    These gains fit the nDCG values that A2A prints; the paper itself does not state its gains.
    """
    effect = np.asarray(effect, dtype=float)
    by_place = 2.0 ** -np.arange(len(effect))
    gains = np.empty(len(effect))
    gains[order_of(effect)] = by_place
    return pd.Series(gains).groupby(effect).transform("mean").to_numpy()


def ndcg(scores: ArrayLike, gains: ArrayLike, k: int | None = None) -> float:
    """scikit-learn's nDCG@k of layers sorted by their scores, for the given gains (tied scores are averaged)."""
    return float(ndcg_score(np.asarray(gains, dtype=float)[None], np.asarray(scores, dtype=float)[None], k=k))


def random_ndcg(gains: ArrayLike, k: int | None = None, n: int = 2000) -> tuple[float, float, float]:
    """nDCG@k of a random order: its exact expected value, and the 2.5 and 97.5 % points over `n` orders."""
    gains, rng = np.asarray(gains, dtype=float), np.random.default_rng(0)
    k = len(gains) if k is None else min(k, len(gains))
    discounts = 1 / np.log2(np.arange(2, k + 2))
    best = np.sort(gains)[::-1][:k] @ discounts
    drawn = np.array([rng.permutation(gains)[:k] for _ in range(n)]) @ discounts / best
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(gains.mean() * discounts.sum() / best), float(low), float(high)


def rank_correlation(scores: ArrayLike, effect: ArrayLike) -> float:
    """Kendall's tau-b between a score of layers and their measured effect; 0 if one is the same everywhere."""
    if len(np.unique(scores)) < 2 or len(np.unique(effect)) < 2:
        return 0.0
    return float(stats.kendalltau(scores, effect).statistic)


def regret_at(order: ArrayLike, k: int, validation: ArrayLike, test: ArrayLike) -> float:
    """What is lost by searching only the first `k` layers of an order: best test effect of all layers, minus the test
    effect of the layer that is best on validation among those k. Every method is judged so.

    Of several that are equally good on validation any might be taken, whatever their places in the order: the mean of
    their effects counts. So with all layers searched, every order loses the same.
    """
    validation, test, chosen = np.asarray(validation), np.asarray(test), np.asarray(order)[:k]
    best = chosen[validation[chosen] == validation[chosen].max()]
    return float(test.max() - test[best].mean())


def judge_rankings(
    methods: Mapping[str, Float[np.ndarray, "seed layer"]],
    validation: Float[np.ndarray, " layer"],
    test: Float[np.ndarray, "layer prompt"],
    k: int = 5,
    n: int = 300,
    seed: int = 0,
) -> pd.DataFrame:
    """Every method under one protocol: nDCG, Kendall's tau, and the best of its top k, with 95 % intervals.

    `methods` holds each method's layer scores, one row a seed; `validation` the share of successes of every layer,
    on which the best of the top k is chosen; `test` the successes that everything is judged on. Columns: method,
    measure, value, low, high; the interval resamples test prompts and seeds together. The method "random order" has the
    exact mean of all orders for nDCG and that of `n` drawn ones otherwise; its interval holds 95 % of random orders.
    """
    rng, rows = np.random.default_rng(seed), []
    draws = _draws(test.shape[1], n, rng)
    for name, scores in methods.items():
        whole = pd.DataFrame([_measures(row, validation, test.mean(1), k) for row in scores]).mean()
        drawn = _drawn_measures(scores, validation, test, draws, k)
        low, high = drawn.quantile(0.025), drawn.quantile(0.975)
        rows += [(name, measure, whole[measure], low[measure], high[measure]) for measure in whole.index]
    effect = test.mean(1)
    drawn = pd.DataFrame([_measures(rng.permutation(len(test)), validation, effect, k) for _ in range(n)])
    exact = {f"nDCG@{at}": random_ndcg(rank_gains(effect), at)[0] for at in DEPTHS}
    exact["mean nDCG"] = float(np.mean(list(exact.values())))
    if effect.any():
        exact[f"nDCG@{k}, measured gains"] = random_ndcg(effect, k)[0]
    for measure in drawn:
        value = exact.get(measure, drawn[measure].mean())
        rows.append(("random order", measure, value, *drawn[measure].quantile([0.025, 0.975])))
    return pd.DataFrame(rows, columns=["method", "measure", "value", "low", "high"])


def _draws(n_prompts: int, n: int, rng: np.random.Generator) -> list[tuple[np.ndarray, float]]:
    """Prompts drawn anew, and a number in [0, 1) that draws a seed, `n` times."""
    return [(rng.integers(n_prompts, size=n_prompts), rng.random()) for _ in range(n)]


def _drawn_measures(
    scores: Float[np.ndarray, "seed layer"],
    validation: Float[np.ndarray, " layer"],
    test: Float[np.ndarray, "layer prompt"],
    draws: Sequence[tuple[np.ndarray, float]],
    k: int,
) -> pd.DataFrame:
    """All measures of one method in every draw of prompts and seed: [draw, measure]."""
    return pd.DataFrame(
        [_measures(scores[int(u * len(scores))], validation, test[:, prompts].mean(1), k) for prompts, u in draws]
    )


def beats_random(measure: Sequence[float], of_random: Sequence[float]) -> bool | None:
    """Whether a ranking is better than a random order, from (value, low, high) of one measure of both.

    True where the whole interval lies above that of 95 % of random orders, False where it lies below it, and None where
    it reaches into it: so good, or so bad, may chance be.
    """
    (_, smallest, largest), (_, low, high) = of_random, measure
    return True if low > largest else False if high < smallest else None


def better_than_random(judged: pd.DataFrame, method: str, k: int = 5) -> bool | None:
    """`beats_random` by nDCG@5 with rank gains and by nDCG@k with measured ones; `judged` is of `judge_rankings`."""
    rows = judged.set_index(["method", "measure"])[["value", "low", "high"]].sort_index()
    kinds = ("nDCG@5", f"nDCG@{k}, measured gains")
    return all_of([beats_random(*(tuple(rows.loc[name, kind]) for name in (method, "random order"))) for kind in kinds])


def best_of_random(validation: ArrayLike, effect: ArrayLike, k: int) -> float:
    """Effect of the layer that is best on validation among the first `k` of a random order: the exact mean of orders.

    The layer in place r of n by validation is chosen if it, and none of the r - 1 better ones, is among the k; layers
    that tie there share their chances.
    """
    validation, n, k = np.asarray(validation), len(validation), min(k, len(validation))
    chances = np.empty(n)
    chances[order_of(validation)] = [comb(n - place, k - 1) / comb(n, k) for place in range(1, n + 1)]
    return float(pd.Series(chances).groupby(validation).transform("mean") @ np.asarray(effect))


def lead_over_random(
    study: "Study", method: str, k: int = 5, n: int = 300, seed: int = 0
) -> tuple[float, float, float]:
    """How much better the best of a method's first `k` layers is than that of a random order's, on average over orders.

    Both are chosen on validation and judged on the same answers: value, low and high of the 95 % interval over test
    prompts and seeds, as of `lead`. (`beats_random` is no test here: one order in six, or more, has the best of thirty
    layers among its first five, so that not even the whole grid lies above 97.5 % of orders.)
    """
    rival = partial(best_of_random, study.validation, k=k)
    return _best_less(study, method, k, rival, n, seed)


def behind_all(study: "Study", method: str, k: int = 5, n: int = 300, seed: int = 0) -> tuple[float, float, float]:
    """How much worse the best of a method's first `k` layers is than the best of all layers.

    The rest as of `lead_over_random`; of layers that are equally good on validation the mean counts.
    """
    best = study.validation == study.validation.max()
    value, low, high = _best_less(study, method, k, lambda effect: effect[best].mean(), n, seed)
    return -value, -high, -low


def _best_less(study: "Study", method: str, k: int, rival: Callable[..., float], n: int, seed: int) -> tuple:
    """The effect of the best of a method's first k layers, less a rival's on the same answers, and its interval."""
    rng, measure = np.random.default_rng(seed), f"best of top {k}"

    def gap(effect: np.ndarray, rows: np.ndarray) -> float:
        """The difference for these rates of success, mean over rows of layer scores."""
        found = [_measures(row, study.validation, effect, k, measure)[measure] for row in rows]
        return float(np.mean(found)) - rival(effect=effect)

    prompts, scores = study.test.shape[1], study.methods[method]
    drawn = [
        gap(study.test[:, rng.integers(prompts, size=prompts)].mean(1), scores[[rng.integers(len(scores))]])
        for _ in range(n)
    ]
    return gap(study.test.mean(1), scores), *map(float, np.quantile(drawn, [0.025, 0.975]))


def choice_loss(study: "Study", k: int = 5, n: int = 300, seed: int = 0) -> tuple[float, float, float]:
    """The most that choosing on validation can lose an order that has the best layer first, whatever the other k - 1
    are. Value, low and high of the 95 % interval over test prompts.

    Such an order has an nDCG@1 of 1, and where the best of its first k is read off the same answers, it loses nothing.
    """
    rng, prompts = np.random.default_rng(seed), study.test.shape[1]

    def lost(effect: np.ndarray) -> float:
        """The same for these effects: other layers mislead where they look as good on validation, or better."""
        order = np.argsort(-effect, kind="stable")
        first, others = order[0], order[1:]
        worst = others[effect[others].argsort(kind="stable")]  # the least effect first
        misleading = worst[study.validation[worst] > study.validation[first]]
        ties = worst[study.validation[worst] == study.validation[first]]
        rivals = misleading[:1] if len(misleading) else ties[: k - 1]
        return regret_at([first, *rivals], k, study.validation, effect)

    drawn = [lost(study.test[:, rng.integers(prompts, size=prompts)].mean(1)) for _ in range(n)]
    return lost(study.test.mean(1)), *map(float, np.quantile(drawn, [0.025, 0.975]))


def chance_of_best(effect: ArrayLike, k: int) -> float:
    """The share of all orders that have a layer of the largest effect among their first `k`."""
    effect = np.asarray(effect)
    others = int((effect < effect.max()).sum())
    return 1 - comb(others, k) / comb(len(effect), k)


def over_studies(
    judged: pd.DataFrame, studies: Sequence["Study"], k: int = 5, n: int = 300, seed: int = 0
) -> pd.DataFrame:
    """Means over several studies of what `judge_rankings` found in each: method, measure, value, low, high.

    `judged` holds the rows of all of them, which are of the same test prompts. An interval is that of the mean: prompts
    and seeds are drawn for all studies together. Those of the "random order" hold 95 % of the means of orders drawn
    anew for each study. Raises ValueError for studies of different numbers of prompts.
    """
    if len({s.test.shape[1] for s in studies}) != 1:
        raise ValueError("prompts are drawn for all studies together: give studies of the same test prompts.")
    means = judged.groupby(["method", "measure"])[["value", "low", "high"]].mean()
    rng = np.random.default_rng(seed)
    draws = _draws(studies[0].test.shape[1], n, rng)

    def of_study(name: str, s: "Study") -> pd.DataFrame:
        """All measures of a method in one study: [draw, measure]."""
        if name != "random order":
            return _drawn_measures(s.methods[name], s.validation, s.test, draws, k)
        effect = s.test.mean(1)
        return pd.DataFrame([_measures(rng.permutation(len(effect)), s.validation, effect, k) for _ in range(n)])

    for name in means.index.unique("method"):
        drawn = sum(of_study(name, s) for s in studies) / len(studies)
        ends = drawn.quantile([0.025, 0.975]).T  # a row a measure
        means.loc[[(name, measure) for measure in ends.index], ["low", "high"]] = ends.to_numpy()
    return means.reset_index()


DEPTHS = (1, 5, 10)  # the k of A2A's nDCG@k; it reports their mean


def _measures(
    scores: np.ndarray, validation: np.ndarray, effect: np.ndarray, k: int, only: str | None = None
) -> dict[str, float]:
    """All measures of one order of layers, or one of them."""
    return _measured(tuple(scores), tuple(validation), tuple(effect), k, only)


@lru_cache(maxsize=100_000)
def _measured(scores: tuple, validation: tuple, effect: tuple, k: int, only: str | None) -> dict[str, float]:
    """The same, once for all draws that are alike: of few prompts, most are. Do not change what it returns."""
    scores, validation, effect = map(np.array, (scores, validation, effect))
    gains, measured = rank_gains(effect), effect if effect.any() else None
    regret = regret_at(order_of(scores), k, validation, effect)
    at_depth = cache(lambda at: ndcg(scores, gains, at))
    found = {f"nDCG@{at}": lambda at=at: at_depth(at) for at in DEPTHS}
    found["mean nDCG"] = lambda: float(np.mean([at_depth(at) for at in DEPTHS]))
    found[f"nDCG@{k}, measured gains"] = lambda: 0.0 if measured is None else ndcg(scores, measured, k)
    found["Kendall's tau"] = lambda: rank_correlation(scores, effect)
    found |= {f"regret@{k}": lambda: regret, f"best of top {k}": lambda: float(effect.max() - regret)}
    return {name: make() for name, make in found.items() if only in (None, name)}


def lead(
    study: "Study", better: str, worse: str, measure: str, k: int = 5, n: int = 300, seed: int = 0
) -> tuple[float, float, float]:
    """By how much one method's measure (as `judge_rankings` names it) lies above another's on the same answers: value,
    low and high of the 95 % interval over test prompts and seeds, drawn for both together.
    """
    rng, pair = np.random.default_rng(seed), [study.methods[name] for name in (better, worse)]

    def gap(effect: np.ndarray, u: float | None = None) -> float:
        """The difference for these rates of success: of one seed, drawn by `u` in [0, 1), or of the mean over seeds."""
        one, two = (
            np.mean([_measures(row, study.validation, effect, k, measure)[measure] for row in scores])
            if u is None
            else _measures(scores[int(u * len(scores))], study.validation, effect, k, measure)[measure]
            for scores in pair
        )
        return float(one - two)

    prompts = study.test.shape[1]
    drawn = [gap(study.test[:, rng.integers(prompts, size=prompts)].mean(1), rng.random()) for _ in range(n)]
    return gap(study.test.mean(1)), *map(float, np.quantile(drawn, [0.025, 0.975]))


# --- a whole study of one model ----------------------------------------------------------------------------------


@dataclass(eq=False)
class Study:
    """What is needed to judge rankings for one task of one model, from a live run or a stored one."""

    layers: Int[np.ndarray, " layer"]
    methods: dict[str, Float[np.ndarray, "seed layer"]]  # each method's layer scores
    into: Float[np.ndarray, "pair layer"]  # In and Out of every attribution pair, of the first seed
    out: Float[np.ndarray, "pair layer"]
    validation: Float[np.ndarray, " layer"]  # share of successes at the strength chosen there
    test: Float[np.ndarray, "layer prompt"]  # successes at that strength
    first_token: Float[np.ndarray, "layer prompt"]  # the same, by the first token's refusal score where one is known


def make_study(
    graph: Graph,
    attributions: Sequence[Mapping],
    baselines: Mapping[str, Sequence],
    validation: pd.DataFrame,
    test: pd.DataFrame,
    wanted: str,
) -> Study:
    """Put a study together from parts as `make results` stores them.

    `attributions` holds, for every seed, the per-pair sums `in` and `out` of absolute scores, the same of the absolute
    mean (`in_of_mean`, `out_of_mean`), and `layer_patching`; the tables are those of `steered_verdicts`. Layers that
    were not steered are left out of the judging.
    """
    done = (successful(table, wanted) for table in (validation, test))
    return study_of(graph, attributions, baselines, *done, successful(test, wanted, "first token"))


def study_of(
    graph: Graph,
    attributions: Sequence[Mapping],
    baselines: Mapping[str, Sequence],
    on_validation: pd.DataFrame,
    on_test: pd.DataFrame,
    first_token: pd.DataFrame | None = None,
) -> Study:
    """The same from tables of successes, 0 or 1: a row a (layer, strength), a column a prompt (see `successful`).

    `layer_patching` may be left out of the attributions, and then of the methods.
    """
    best = best_strengths(on_validation)
    rows = [(layer, best[layer]) for layer in best.index]
    layers = best.index.to_numpy()
    counts = ends_of_layers(graph, graph.edges.astype(float))[:, layers]
    sums = [(np.array(a["in"])[:, layers], np.array(a["out"])[:, layers]) for a in attributions]
    methods = {name: [] for name in (*METHODS, "Total of |mean|")}
    for (into, out), a in zip(sums, attributions):
        into, out = into.sum(0), out.sum(0)
        for name, value in zip(METHODS, _forms(into, out, *counts)):
            methods[name].append(value)
        methods["Total of |mean|"].append((np.array(a["in_of_mean"]) + np.array(a["out_of_mean"]))[layers])
    patched = [np.abs(np.array(a["layer_patching"])[:, layers]).mean(0) for a in attributions if "layer_patching" in a]
    methods |= {"exact layer patching": patched} if patched else {}
    depth = layers / (graph.n_layers - 1)
    methods |= {"middle layers": [-np.abs(depth - 0.5)], "60 % of the depth": [-np.abs(depth - 0.6)]}
    methods |= {name: [np.array(row)[layers] for row in rows_] for name, rows_ in baselines.items()}
    methods["small grid"] = [on_validation.loc[rows].mean(axis=1).to_numpy()]
    return Study(
        layers,
        {name: np.stack(values) for name, values in methods.items()},
        *sums[0],
        on_validation.loc[rows].mean(axis=1).to_numpy(),
        on_test.loc[rows].to_numpy(),
        (on_test if first_token is None else first_token).loc[rows].to_numpy(),
    )


METHODS = ("In", "Out", "Total", "Ratio", "In per edge", "Out per edge", "Total per edge", "Ratio per edge")


def _forms(into, out, n_in, n_out) -> tuple[np.ndarray, ...]:
    """The eight scores of METHODS."""
    a, b = into / n_in, out / n_out
    return into, out, into + out, out / (into + EPSILON), a, b, a + b, b / (a + EPSILON)


def curve_over_k(
    study: Study, names: Sequence[str], ks: Sequence[int], draws: int = 100, seed: int = 0
) -> pd.DataFrame:
    """Test effect of the best of the first k layers (chosen on validation), by method and k; A2A's figure 2.

    A row a draw (column "draw"), each of which draws test prompts, the ranking's seed and the random order anew.
    """
    rng, rows, n = np.random.default_rng(seed), [], study.test.shape[1]
    for draw in range(draws):
        effect, u = study.test[:, rng.integers(n, size=n)].mean(1), rng.random()
        orders = {name: order_of(study.methods[name][int(u * len(study.methods[name]))]) for name in names}
        orders["random order"] = rng.permutation(len(effect))
        rows += [
            (name, k, draw, effect.max() - regret_at(order, k, study.validation, effect))
            for name, order in orders.items()
            for k in ks
        ]
    return pd.DataFrame(rows, columns=["method", "k", "draw", "effect"])


def curve_over_pairs(study: Study, counts: Sequence[int], draws: int = 20, seed: int = 0) -> pd.DataFrame:
    """In, Out, Total, Ratio from n pairs drawn with replacement: nDCG@5 (rank gains), Kendall's tau; A2A's figure 3.

    In each draw (column "draw") fewer pairs are the first ones of more, so that its own points can be subtracted.
    """
    rng, rows, effect = np.random.default_rng(seed), [], study.test.mean(1)
    gains = rank_gains(effect)
    for draw in range(draws):
        chosen = rng.integers(len(study.into), size=max(counts))
        into, out = (np.cumsum(ends[chosen], axis=0) for ends in (study.into, study.out))
        for n in counts:
            for name, form in zip(METHODS, _forms(into[n - 1], out[n - 1], 1, 1)[:4]):
                rows.append((name, n, draw, ndcg(form, gains, 5), rank_correlation(form, effect)))
    return pd.DataFrame(rows, columns=["method", "pairs", "draw", "nDCG@5", "Kendall's tau"])


def curve_summary(table: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """A curve's mean over draws and the 2.5 and 97.5 % points, by method: columns method, x, value, low, high."""
    by_point = table.groupby(["method", x], sort=False)[y]
    found = by_point.quantile([0.025, 0.975]).unstack().set_axis(["low", "high"], axis=1)
    found.insert(0, "value", by_point.mean())
    return found.rename_axis(["method", "x"]).reset_index()


def plateau(table: pd.DataFrame, x: str, y: str, method: str) -> tuple[int, float, float]:
    """The smallest x from which on a method's curve stays within 0.02 of its last value: the median over draws, and the
    2.5 and 97.5 % points. (The mean curve is smoother than any draw, and would be level sooner.)
    """
    levels = [_levels_off(curve) for _, curve in _by_draw(table, x, y, method).items()]
    value, low, high = np.quantile(levels, [0.5, 0.025, 0.975])
    return round(value), float(low), float(high)


def _by_draw(table: pd.DataFrame, x: str, y: str, method: str) -> pd.DataFrame:
    """A method's curves: a row an x, a column a draw."""
    return table[table["method"] == method].pivot(index=x, columns="draw", values=y)


def _levels_off(curve: pd.Series) -> int:
    outside = curve.index[(curve - curve.iloc[-1]).abs() > 0.02]
    return int(curve.index[curve.index > outside.max()].min() if len(outside) else curve.index[0])


def last_step(table: pd.DataFrame, x: str, y: str, method: str) -> tuple[float, float, float]:
    """How far a method's curve rises from the last x but one to the last: the mean over draws, and the 2.5 and 97.5 %
    points of the draws' own steps; nan for one x.
    """
    steps = _by_draw(table, x, y, method).diff().iloc[-1]
    return float(steps.mean()), *map(float, np.quantile(steps, [0.025, 0.975]))


def verdict_table(rows: Sequence[Mapping]) -> pd.DataFrame:
    """The table of `steered_verdicts` from the compact rows that result files hold."""
    parts = [
        pd.DataFrame({"prompt": range(len(row["verdicts"]))}).assign(
            layer=row["layer"],
            strength=row["strength"],
            verdict=[VERDICTS[letter] for letter in row["verdicts"]],
            score=row["scores"],
        )
        for row in rows
    ]
    return pd.concat(parts, ignore_index=True)
