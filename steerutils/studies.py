"""Stored full-size rankings (`make results`): their parts, how far they can be trusted, their costs, other models'."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import ArrayLike

from .ranking import METHODS, Study, _forms, rank_correlation, verdict_table
from .record import result_name, stored_results

BY_STEERING = {"absolute": "steering as the contrast", "signed": "the metric's shift"}  # as stored: as a method
PATCHING = "exact layer patching"


# --- the parts of a study ----------------------------------------------------------------------------------------


def stored_ranking(model_name: str, revision: str) -> dict:
    """The stored full-size ranking of a model, by its name and revision.

    Raises ValueError where there is none, or only that of another model of the same name.
    """
    stored = stored_results(result_name("ranking", model_name))
    if stored["revision"] != revision:
        raise ValueError(f"The stored ranking is of {stored['revision']}, not of this {revision}: the live one counts.")
    return stored


def stored_parts(
    stored: Mapping, task: str, sign: float
) -> tuple[list[dict], dict[str, list], pd.DataFrame, pd.DataFrame]:
    """What `make_study` takes, of a stored ranking: attributions, baselines, and the grid on validation and on test.

    Where the run has attribution with steering itself as the contrast, two methods (`BY_STEERING`) stand beside the
    baselines: the sums over the edges that leave the steering node, absolute and plain. The plain one is turned to the
    side that the task steers to by the vectors' `sign`.
    """
    values = stored["values"]
    attributions = [values[f"attribution-{i}"] for i in range(stored["settings"]["seeds"])]
    found, own = values[task].get("steering contrast"), {}
    if found:
        for name, method in BY_STEERING.items():
            row = np.zeros(np.shape(attributions[0]["in"])[1])  # [layer], also those that were not steered
            row[found["layers"]] = np.mean(found[name], 1) * (sign if name == "signed" else 1)
            own[method] = [row]
    return attributions, values["baselines"] | own, *(verdict_table(values[task][s]) for s in ("validation", "test"))


def taus_with(study: Study, effect: ArrayLike, names: Sequence[str]) -> pd.Series:
    """Kendall's tau of methods' scores with an effect of the study's layers, by name: the mean over seeds."""
    return pd.Series({name: np.mean([rank_correlation(row, effect) for row in study.methods[name]]) for name in names})


# --- what a grid leaves open -------------------------------------------------------------------------------------


def strengths_tried(settings: Mapping) -> str:
    """A run's strengths in words: those tried in every layer ("strengths"), and the "reach" of doubling, if any."""
    sizes = settings["strengths"]
    reach = settings.get("reach", max(sizes))
    doubled = f", then doubled while at most half of a block's answers fall apart, up to {reach:g}"
    return ", ".join(f"{strength:g}" for strength in sizes) + (doubled if reach > max(sizes) else "")


def not_exhausted(study: Study, validation: pd.DataFrame) -> list[int]:
    """Layers where a stronger push could do more: fewer than nine in ten validation prompts were turned, while most
    answers still held together at the largest strength tried. `validation` is the table of `steered_verdicts`.
    """
    size = validation["strength"].abs()
    most = validation[size == size.groupby(validation["layer"]).transform("max")]
    whole = (most["verdict"] != "incoherent").groupby(most["layer"]).mean()
    return [int(layer) for layer, share in zip(study.layers, study.validation) if share < 0.9 and whole[layer] > 0.5]


def number_format(stored: Mapping, wanted: Mapping[str, str]) -> str:
    """The number format of a stored ranking's answers; if it is not float32, with how far the two agree, in words.

    `wanted` is the verdict that each task steers to.
    """
    kind = stored["settings"].get("grid_dtype", "float32")
    if kind == "float32":
        return kind
    agreed = agreement_of_formats({task: stored["values"][task]["float32 check"] for task in wanted}, wanted, kind)
    return (
        f"{kind}, {agreed['fast']:.1f} times as fast as float32 (of {agreed['answers']} answers in both formats "
        f"{agreed['same verdict']:.0%} have the same verdict; a block's rate differs by {agreed['mean']:.2f} on "
        f"average, {agreed['largest']:.2f} at most)"
    )


def agreement_of_formats(checks: Mapping[str, Mapping], wanted: Mapping[str, str], kind: str) -> dict[str, int | float]:
    """How far a grid answered in another number format agrees with float32, from what `make results` stores by task.

    "answers" compared, the share with the "same verdict", the "mean" and the "largest" difference of a block's rate of
    the verdict `wanted` by task ("refusal", "compliance"), and how many times as "fast" the other format was.
    """
    same, apart, seconds = [], [], {kind: 0.0, "float32": 0.0}
    for task, check in checks.items():
        for exact, here in zip(*(check[of]["rows"] for of in ("float32", kind))):
            letters = [np.array(list(row["verdicts"])) for row in (exact, here)]  # [prompt] each
            same += (letters[0] == letters[1]).tolist()
            apart.append(abs(np.subtract(*[np.mean(row == wanted[task][0]) for row in letters])))
        seconds = {of: seconds[of] + check[of]["seconds"] for of in seconds}
    return {"answers": len(same), "same verdict": float(np.mean(same)), "mean": float(np.mean(apart)),
            "largest": float(max(apart)), "fast": seconds["float32"] / seconds[kind]}  # fmt: skip


# --- costs ---------------------------------------------------------------------------------------------------------


def search_cost(n_layers: int, n_prompts: int, n_pairs: int, k: int = 5) -> dict[str, int | float]:
    """Forward passes as A2A counts them (section 4.1): the whole grid, A2A, and the share saved.

    A backward pass counts as two forward ones, so that a pair costs 3 passes at each of five points.
    """
    grid, ranked = n_layers * n_prompts, 3 * 5 * n_pairs + k * n_prompts
    return {"grid": grid, "a2a": ranked, "saved": 1 - ranked / grid}


def ranking_costs(stored: Mapping, task: str) -> pd.DataFrame:
    """What each order of blocks costs by itself, for one task of a stored ranking: a method, or several made in one go,
    a row; columns "prompts passed through" (a backward pass counts as two forward ones) and "seconds" (nan: not timed).
    """
    run, values, seconds = stored["settings"], stored["values"][task], stored["seconds"]
    n_settings, n_layers = len(values["validation"]), len(values["test"])  # (layer, strength); layers steered
    attributed = 3 * run["points"]  # passes a pair
    patched = 2 + np.shape(stored["values"]["attribution-0"]["in"])[1] // 2  # both runs, half of the layers on average
    ranked = np.mean([seconds[f"attribution-{i}"] for i in range(run["seeds"])])
    small, large = seconds[f"{task}-validation"], seconds[f"{task}-validation"] + seconds[f"{task}-test"]
    shares, few = len(values["all blocks"]["validation"]), run["steered_prompts"]
    rows = {
        "In, Out, Total, Ratio": (attributed * run["pairs"], ranked),
        PATCHING: (run["patched_pairs"] * patched, np.nan),
        "activation difference, probe": (2 * run["train"], seconds["baselines"]),
        "middle layers, 60 % of the depth": (0, 0),
        "small grid": (n_settings * run["validation"], small),
        "steering as the contrast": (attributed * n_layers * few, seconds.get(f"{task}-steering contrast", np.nan)),
        "the metric's shift": (n_layers * few, np.nan),
        "all blocks at once": (shares * run["validation"], seconds[f"{task}-all blocks"]),
        "the whole grid": (n_settings * run["validation"] + n_layers * run["test"], large),
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["prompts passed through", "seconds"], dtype=float)


# --- the graph alone, between models -----------------------------------------------------------------------------


def stored_scores(
    values: Mapping, pairs: ArrayLike | slice = slice(None), patched: ArrayLike | slice = slice(None)
) -> dict[str, Float[np.ndarray, " layer"]]:
    """Layer scores of a stored ranking or graph (its "values"), by method: In, Out, Total, Ratio and exact layer
    patching by the first seed, over some of its pairs (of those that were patched); the baselines' means over seeds.
    """
    part = values["attribution-0"]
    sums = (np.array(part[side])[pairs].mean(0) for side in ("in", "out"))
    found = dict(zip(METHODS[:4], _forms(*sums, 1, 1)))
    found[PATCHING] = np.abs(part["layer_patching"])[patched].mean(0)
    return found | {name: np.mean(rows, 0) for name, rows in values["baselines"].items()}


def depth_and_patching_taus(values: Mapping, rng: np.random.Generator) -> pd.DataFrame:
    """Kendall's tau of each of a model's `stored_scores` with depth and with exact layer patching.

    Columns: score, against, value, low, high. The interval is over pairs, drawn anew 100 times, and nan for what has no
    pairs: the baselines, and In to Ratio when every edge is scored 1 ("depth, every edge scored 1"), for comparison.
    """
    part = values["attribution-0"]
    sizes = len(part["in"]), len(part["layer_patching"])
    draws = [_taus(stored_scores(values, *(rng.integers(n, size=n) for n in sizes))) for _ in range(100)]
    low, high = (pd.DataFrame(draws).quantile(end) for end in (0.025, 0.975))
    table = pd.DataFrame({"value": _taus(stored_scores(values)), "low": low, "high": high}).drop((PATCHING, "patching"))
    table.loc[list(values["baselines"]), ["low", "high"]] = np.nan
    counts = zip(METHODS[:4], _forms(*(np.array(part[f"edges_{side}"]) for side in ("in", "out")), 1, 1))
    for name, row in counts:
        table.loc[(name, "depth, every edge scored 1"), "value"] = rank_correlation(row, np.arange(len(row)))
    return table.rename_axis(["score", "against"]).reset_index()


def _taus(found: Mapping[str, np.ndarray]) -> pd.Series:
    """Kendall's tau of every score with depth and with exact layer patching, by (score, against)."""
    aims = {"depth": np.arange(len(found["In"])), "patching": found[PATCHING]}
    return pd.Series({(name, aim): rank_correlation(row, aims[aim]) for name, row in found.items() for aim in aims})


def separation(
    negative: Float[np.ndarray, " example"], positive: Float[np.ndarray, " other"], rng: np.random.Generator
) -> dict[str, tuple[float, float, float]]:
    """How far a score tells two sides apart, as (value, low, high): the "difference" of the means, in the score's unit,
    and the "auc", the share of couples of one of each in which the positive one is higher (chance: 0.5).

    95 % intervals by 200 bootstrap draws from each side.
    """

    def measures(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
        return b.mean() - a.mean(), (b[:, None] > a).mean()

    drawn = [measures(*(rng.choice(side, len(side)) for side in (negative, positive))) for _ in range(200)]
    ends = np.quantile(drawn, [0.025, 0.975], axis=0)  # [end, measure]
    whole = measures(negative, positive)
    return {name: (float(whole[i]), *map(float, ends[:, i])) for i, name in enumerate(("difference", "auc"))}
