"""What steering did to traits: successes and shares by topic, changes of every trait, and intervals over topics."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from .graph import Graph
from .judges import bootstrap, rate
from .ranking import Study, activation_difference, probe_accuracy, study_of
from .studies import BY_STEERING
from .traits import TRAITS

# --- intervals over topics ---------------------------------------------------------------------------------------


def over_topics(values: ArrayLike, seed: int = 0) -> tuple[float, ...]:
    """The mean of [..., topic] and its 95 % interval, topics drawn anew: (value, low, high); of one topic, (value,).

    Values that are nan are left out.
    """
    values = np.asarray(values, float)
    by_topic = np.nanmean(values.reshape(-1, values.shape[-1]), axis=0)
    return bootstrap(np.nanmean, by_topic, seed=seed) if len(by_topic) > 1 else (float(by_topic[0]),)


def resamples(n: int, seed: int | np.random.Generator = 0) -> Int[np.ndarray, "draw example"]:
    """Indices of `n` examples: in the first row all of them, in 1000 more as many drawn with replacement.

    For statistics that need the same draws of several arrays; otherwise `bootstrap` does it all.
    """
    return np.vstack([np.arange(n), np.random.default_rng(seed).integers(n, size=(1000, n))])


def percentile_interval(values: Float[np.ndarray, " draw"]) -> tuple[float, float, float]:
    """A statistic of all examples and its 95 % percentile bootstrap interval, from its values in `resamples`' draws.

    Draws in which it is not defined (nan) are left out.
    """
    return float(values[0]), *map(float, np.nanquantile(values[1:], [0.025, 0.975]))


# --- successes and shares ----------------------------------------------------------------------------------------


def trait_successes(table: pd.DataFrame, trait: str) -> pd.DataFrame:
    """Whether coherent answers went where they were steered, 0 or 1: a row a (layer, strength), a column an answer.

    `table` is one trait's vectors in `steered_traits`, at strengths of both signs; a row holds both directions of a
    strength. A block at which nothing happens is right half of the time, or less.
    """
    towards_high = table["strength"] > 0
    done = table["coherent"] & ((table[trait] > 0.5) == towards_high)
    table = table.assign(done=done.astype(float), towards=towards_high, strength=table["strength"].abs())
    return table.pivot(index=["layer", "strength"], columns=["towards", "prompt"], values="done")


def by_topic(successes: ArrayLike) -> Float[np.ndarray, "*setting topic"]:
    """`trait_successes` with both directions' answers about a topic as one share, since topics are what is drawn."""
    found = np.asarray(successes, float)  # [..., direction x topic]
    return found.reshape(*found.shape[:-1], 2, -1).mean(-2)


def success_by_topic(answers: pd.DataFrame, trait: str, end: str) -> Float[np.ndarray, " topic"]:
    """The share of all answers about each topic that are coherent and show an end ("high" or "low") of a trait."""
    done = answers["coherent"] & ((answers[trait] > 0.5) == (end == "high"))
    return done.groupby(answers["prompt"]).mean().to_numpy(float)


def choice_by_topic(answers: pd.DataFrame, trait: str) -> Float[np.ndarray, " topic"]:
    """The share of coherent answers about each topic in which the judge picks a trait; nan where none is coherent."""
    picked = (answers["choice"] == trait).astype(float).where(answers["coherent"])
    return picked.groupby(answers["prompt"]).mean().to_numpy()


def picked_by_topic(answers: pd.DataFrame, trait: str) -> Float[np.ndarray, " topic"]:
    """The share of all answers about each topic that are coherent and in which the judge picks a trait."""
    done = answers["coherent"] & (answers["choice"] == trait)
    return done.groupby(answers["prompt"]).mean().to_numpy(float)


def share_high(answers: pd.DataFrame, trait: str, seed: int = 0) -> tuple[float, float, float]:
    """The share of coherent answers that show a trait's high end and its 95 % interval: (value, low, high).

    With one answer a topic it is the share of answers and Wilson's interval; with more the mean over topics, which are
    drawn anew. Of a single topic the interval is all of 0 to 1. nan where no answer is coherent.
    """
    kept = answers[answers["coherent"]]
    flags = kept[trait] > 0.5
    if kept["prompt"].is_unique:
        return rate(flags) if len(kept) else (np.nan, np.nan, np.nan)
    row = over_topics(flags.groupby(kept["prompt"]).mean(), seed)
    return row if len(row) == 3 else (row[0], 0.0, 1.0)  # one topic says nothing of others


def success_and_coherence(grid: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The share of coherent answers, and of these the share that went where they were steered, in every setting.

    `grid` maps a trait to its table of `steered_traits`. A row a trait, layer and strength (both signs together), the
    columns trait, layer, strength, coherent, right; right is nan where nothing is coherent.
    """
    tables = []
    for trait, table in grid.items():
        right = ((table[trait] > 0.5) == (table["strength"] > 0)).astype(float).where(table["coherent"])
        table = table.assign(trait=trait, strength=table["strength"].abs(), right=right)
        tables.append(table.groupby(["trait", "layer", "strength"], as_index=False)[["coherent", "right"]].mean())
    return pd.concat(tables, ignore_index=True)


def still_coherent(table: pd.DataFrame, reach: float) -> list[tuple[int, float]]:
    """Where a stronger push is worth a try: (layer, twice its largest strength) of every block at whose largest
    strength at least half of the answers are coherent, as long as that is at most `reach`.

    `table` is one vector a block in `steered_traits`, at strengths of both signs.
    """
    coherent = table["coherent"].groupby([table["layer"], table["strength"].abs()]).mean()
    largest = coherent.reset_index().groupby("layer").last()  # the groups are in the order of strength
    largest = largest[(largest["coherent"] >= 0.5) & (2 * largest["strength"] <= reach)]
    return [(int(layer), 2 * strength) for layer, strength in largest["strength"].items()]


def trait_study(
    graph: Graph,
    attributions: Sequence[Mapping],
    high: Float[Tensor, "statement layer d_model"],
    low: Float[Tensor, "other layer d_model"],
    on_validation: pd.DataFrame,
    on_test: pd.DataFrame,
    by_steering: Mapping[str, Float[np.ndarray, "setting topic"]],
) -> Study:
    """A `study_of` a trait, with ActDiff and a probe of the states of its two ends among the methods.

    `attributions` are those of `attribute_trait`, one a seed, whose pairs are put together; the tables are those of
    `trait_successes`; `by_steering` is what `steered_opinion_scores` gives for one setting a block that was tried, two
    methods more (`BY_STEERING`). Rankings are judged on topics, both directions of each together.
    """
    tried = on_validation.index.unique("layer").tolist()
    probed = np.zeros(graph.n_layers)
    probed[tried] = probe_accuracy(high[:, tried], low[:, tried])
    baselines = {"activation difference": [activation_difference(high, low)], "probe": [probed]}
    for name, method in BY_STEERING.items():
        row = np.zeros(graph.n_layers)
        row[tried] = by_steering[name].mean(1)
        baselines[method] = [row]
    study = study_of(graph, attributions, baselines, on_validation, on_test)
    into, out = (np.concatenate([found[side] for found in attributions])[:, tried] for side in ("in", "out"))
    test = by_topic(study.test)
    return replace(study, into=into, out=out, test=test, first_token=test)


def judged_by_choice(study: Study, trait: str, on_validation: pd.DataFrame, on_test: pd.DataFrame) -> Study:
    """The same study with the paper's question as its truth: is a coherent answer, steered up, picked as the trait's?

    Successes are answers that are coherent and picked among the three traits (column choice), at the strengths that the
    study has; the tables are one trait's in `steered_traits` on validation and on test topics.
    """
    test, validation = (_picked(table, trait) for table in (on_test, on_validation))
    validation = validation.loc[test.index].mean(axis=1).to_numpy()
    methods = study.methods | {"small grid": validation[None]}
    return replace(study, methods=methods, validation=validation, test=test.to_numpy(), first_token=test.to_numpy())


def _picked(table: pd.DataFrame, trait: str) -> pd.DataFrame:
    """Whether answers steered up are coherent and the trait's: a row a (layer, strength), a column a topic."""
    up = table[table["strength"] > 0]
    done = (up["coherent"] & (up["choice"] == trait)).astype(float)
    return up.assign(done=done).pivot(index=["layer", "strength"], columns="prompt", values="done")


# --- one trait's effect on another -------------------------------------------------------------------------------


def end_probabilities(tables: Iterable[pd.DataFrame]) -> Float[np.ndarray, "vector topic 2 judged"]:
    """The judge's probability of every trait's high end, steered up and down, nan where an answer is incoherent.

    `tables` are one vector's in `steered_traits` each, at one strength of both signs, on the same topics.
    """
    found = []
    for table in tables:
        ends = [table[(table["strength"] > 0) == up].sort_values("prompt") for up in (True, False)]
        found.append(np.stack([end[list(TRAITS)].where(end["coherent"]).to_numpy(float) for end in ends], axis=1))
    return np.stack(found)


def trait_changes(
    ends: Float[np.ndarray, "vector topic 2 judged"],
    topics: Int[np.ndarray, "draw topic"],
    vectors: Int[np.ndarray, "draw vector"] | None = None,
) -> Float[np.ndarray, "draw vector judged"]:
    """Mean P(high) over coherent answers, up less down, by draw of `resamples`; nan where none is coherent at an end.

    `ends` comes from `end_probabilities`; `topics` are drawn for all vectors together, and `vectors`, if given, too.
    """
    drawn = ends[:, topics]  # [vector, draw, topic, up or down, judged]
    known = np.isfinite(drawn)
    with np.errstate(invalid="ignore"):
        means = np.where(known, drawn, 0).sum(2) / known.sum(2)
    changes = np.moveaxis(means[:, :, 0] - means[:, :, 1], 0, 1)
    return changes if vectors is None else np.take_along_axis(changes, vectors[:, :, None], axis=1)


def own_change(changes: Float[np.ndarray, "draw trait trait"]) -> Float[np.ndarray, " draw"]:
    """The mean change of the traits that were steered; one without coherent answers at both ends counts as 0."""
    return np.nan_to_num(np.diagonal(changes, axis1=1, axis2=2)).mean(1)


def side_change(changes: Float[np.ndarray, "draw trait trait"]) -> Float[np.ndarray, " draw"]:
    """The mean absolute change of the traits that were not steered; one without coherent answers counts as 0."""
    return np.nan_to_num(np.abs(changes[:, _other(changes)])).mean(1)


def own_lead(changes: Float[np.ndarray, "draw trait trait"]) -> Float[np.ndarray, "draw trait"]:
    """The change of the trait that was steered less the largest absolute one of another; without coherent answers 0."""
    known = np.nan_to_num(changes)
    largest = np.where(_other(changes), np.abs(known), 0).max(2)
    return np.diagonal(known, axis1=1, axis2=2) - largest


def side_correlation(
    changes: Float[np.ndarray, "draw trait trait"], cosines: Float[np.ndarray, "trait trait"]
) -> Float[np.ndarray, " draw"]:
    """The correlation of the vectors' cosines with the changes of the traits that were not steered, over ordered pairs.

    0 where all changes are equal.
    """
    other = _other(changes)
    effects = np.nan_to_num(changes[:, other])
    return np.array([np.corrcoef(cosines[other], row)[0, 1] if row.std() else 0.0 for row in effects])


def _other(changes: np.ndarray) -> np.ndarray:
    """Which entries are about another trait than the steered one: [steered, judged]."""
    return ~np.eye(changes.shape[-1], dtype=bool)
