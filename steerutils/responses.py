"""Steering as the corruption on whole responses: where the greedy tokens differ, which edges do it, how much of it a
circuit carries.

The base and the steered run read the same teacher-forced response, so no alignment is needed (Cheng et al. 2026).
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .attribution import Contrast, Metric, attribute, corrupted_final, graph_of, midpoint, steering_contrast
from .circuits import circuit_logits
from .graph import EdgeScores
from .judges import bootstrap, bootstrap_draws, judge
from .models import ChatModel, widened
from .prompts import Batch, batches, encode
from .record import kept_arrays
from .steering import SteeringVector, steered_answers, vector_key
from .subgraphs import (
    Circuit,
    CircuitError,
    circuits_by_size,
    cmd,
    complement,
    cpr,
    overlap_table,
    size_needed,
    top_circuit,
)

# --- data sets -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResponseSet:
    """Prompts with a response each, and the strength under which the steered run reads them."""

    side: str  # "harmful" or "harmless"
    run: str  # which run gave the responses: "base" or "steered"
    strength: float
    prompts: tuple[str, ...] = field(repr=False)  # kept in memory only, as are the responses
    responses: tuple[str, ...] = field(repr=False)

    @property
    def name(self) -> str:
        """ "harmful, base response" and the like."""
        return f"{self.side}, {self.run} response"

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: slice) -> "ResponseSet":
        """The set of some of its prompts."""
        return replace(self, prompts=self.prompts[rows], responses=self.responses[rows])


def response_sets(
    model: ChatModel,
    vector: SteeringVector,
    harmful: Sequence[str],
    harmless: Sequence[str],
    strength: float = 1.0,
    max_new_tokens: int = 24,
    per_side: int | None = None,
) -> list[ResponseSet]:
    """The four data sets of Cheng et al. (2026): harmful and harmless prompts, each with the base and the steered
    response, of those prompts only whose behaviour flips (the first `per_side` of them, if it is given).

    Harmful prompts are steered with -strength, from a refusal to compliance; harmless ones with +strength, from
    compliance to a refusal. Both answers must be coherent, as `judge` has it. Raises CircuitError when no prompt of a
    side flips. A control vector that flips none is measured on the sets of the vector it controls for.
    """
    sets = []
    for side, prompts, signed in (("harmful", harmful, -strength), ("harmless", harmless, strength)):
        found = _turned_round(model, vector, prompts, side, signed, max_new_tokens)
        if not len(found[0]):
            raise CircuitError(
                f"strength {signed} flips none of {len(prompts)} {side} prompts: give more prompts, a larger strength, "
                "or take the sets made with another vector."
            )
        sets += [part[:per_side] for part in found]
    return sets


def _turned_round(
    model: ChatModel, vector: SteeringVector, prompts: Sequence[str], side: str, strength: float, max_new_tokens: int
) -> list[ResponseSet]:
    """Those of a side's prompts whose behaviour flips, with the base and with the steered response."""
    found = steered_answers(model, prompts, [(vector, 0.0), (vector, strength)], max_new_tokens)
    answers = {run: texts for run, (texts, _) in zip(("base", "steered"), found, strict=True)}
    rows = _flipping(model, prompts, answers, side)
    asked = tuple(prompts[i] for i in rows)
    return [ResponseSet(side, run, strength, asked, tuple(texts[i] for i in rows)) for run, texts in answers.items()]


def enough_response_sets(
    model: ChatModel,
    vector: SteeringVector,
    ask: Callable[[int], Sequence[list[str]]],
    first: int,
    per_side: int,
    enough: int,
    strength: float = 1.0,
    max_new_tokens: int = 24,
) -> tuple[list[ResponseSet], dict[str, list[str]]]:
    """`response_sets` of as many prompts as it takes: `first` a side, then two, four and eight times as many, until
    `enough` of each side flip or there are no more.

    `ask` gives up to n harmful and n harmless prompts, those that it gave before first; each is answered once. Returns
    the sets, with up to `per_side` prompts of a side, and the prompts that were asked, by side. Raises CircuitError
    when fewer than two of a side flip, since one has no interval, and for an `ask` that gives other prompts first,
    which would count a prompt twice.
    """
    sides = {"harmful": -strength, "harmless": strength}
    turned, asked = {side: [] for side in sides}, dict.fromkeys(sides, [])
    for times in (1, 2, 4, 8):
        before, asked = asked, dict(zip(sides, ask(times * first), strict=True))
        if asked == before:  # there are no more
            break
        for side, prompts in asked.items():
            if prompts[: len(before[side])] != before[side]:
                raise CircuitError("`ask` has to give the prompts that it gave before first, in the same order.")
            new = prompts[len(before[side]) :]
            if new or not turned[side]:
                turned[side].append(_turned_round(model, vector, new, side, sides[side], max_new_tokens))
        sets = [part[:per_side] for parts in turned.values() for part in map(_joined, *parts)]
        if min(map(len, sets)) >= enough:
            break
    if min(map(len, sets), default=0) < 2:
        raise CircuitError("fewer than two prompts of a side are turned round: give another layer or strength.")
    return sets, asked


def _joined(*parts: ResponseSet) -> ResponseSet:
    """One set of several that differ in their prompts alone."""
    prompts, responses = (tuple(chain(*texts)) for texts in zip(*((part.prompts, part.responses) for part in parts)))
    return replace(parts[0], prompts=prompts, responses=responses)


def _flipping(model: ChatModel, prompts: Sequence[str], answers: Mapping[str, list[str]], side: str) -> list[int]:
    """The prompts whose answers go the way the side asks for."""
    judged = judge(model, [*prompts, *prompts], [*answers["base"], *answers["steered"]])  # every prompt runs once
    base, steered = judged["verdict"].to_numpy().reshape(2, -1)
    before, after = ("refusal", "compliance") if side == "harmful" else ("compliance", "refusal")
    return np.flatnonzero((base == before) & (steered == after)).tolist()


# --- two runs on the same tokens -------------------------------------------------------------------------------------


@dataclass(eq=False)
class SteeredRuns:
    """A batch of teacher-forced responses run twice. Column i of the logits predicts response token i."""

    contrast: Contrast
    base: Float[Tensor, "batch pos vocab"]
    steered: Float[Tensor, "batch pos vocab"]
    real: Bool[Tensor, "batch pos"]  # the columns that predict a token of the response

    @property
    def flipped(self) -> Bool[Tensor, "batch pos"]:
        """Response positions at which the greedy tokens of the two runs differ."""
        return self.real & (self.base.argmax(-1) != self.steered.argmax(-1))


@torch.no_grad()
def steered_runs(model: ChatModel, batch: Batch, vector: SteeringVector, strength: float = 1.0) -> SteeredRuns:
    """Run a batch of prompts with responses once base and once steered. Raises CircuitError without responses."""
    width = batch.input_ids.shape[1] - batch.prompt_length
    if not width:
        raise CircuitError("the batch holds no response tokens; encode prompts together with their responses.")
    contrast = steering_contrast(model, batch, vector, strength, keep=width + 1)
    finals = contrast.tape.final, corrupted_final(model, contrast)
    base, steered = (model.unembed(final[:, -contrast.keep :]) for final in finals)
    real = torch.nn.functional.pad(batch.response_mask[:, batch.prompt_length :], (0, 1))  # the last predicts no token
    return SteeredRuns(contrast, base, steered, real)


def _runs_of(
    model: ChatModel, vector: SteeringVector, responses: ResponseSet, batch_size: int | None
) -> Iterator[tuple[list[int], SteeredRuns]]:
    """A set in batches of similar length, with the row numbers of each: by default 8 at once on a CPU, 32 on a GPU."""
    batch_size = batch_size or (8 if model.device.type == "cpu" else 32)  # a GPU waits for launches, not for sums
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(responses.prompts, responses.responses)]
    order = np.argsort(lengths, kind="stable")
    for rows in batches(order.tolist(), batch_size):
        prompts, answers = ([texts[i] for i in rows] for texts in (responses.prompts, responses.responses))
        batch = encode(model.tokenizer, prompts, answers, device=model.device)
        yield rows, steered_runs(model, batch, vector, responses.strength)


# --- metrics by position ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PositionMetric:
    """A number at each response position. Called with the logits of the whole vocabulary, it reads what it needs."""

    of: Callable[[Float[Tensor, "batch pos word"]], Float[Tensor, "batch pos"]]
    words: Int[Tensor, "batch pos word"] | None = None  # at each position, those whose logits `of` takes; all if None

    def __call__(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch pos"]:
        return self.of(logits if self.words is None else logits.gather(-1, self.words))


Measure = Callable[[SteeredRuns], PositionMetric]


def flip_difference(runs: SteeredRuns) -> PositionMetric:
    """logit(steered greedy token) - logit(base greedy token) at each position, 0 where the two agree.

    The m of Cheng et al. (2026): their sum over positions is what they attribute and patch. Two logits a position are
    all it needs, so the rest of the vocabulary is never multiplied out.
    """
    greedy = torch.stack([runs.steered.argmax(-1), runs.base.argmax(-1)], -1)
    counted = runs.flipped
    return PositionMetric(lambda logits: (logits[..., 0] - logits[..., 1]) * counted, greedy)


def directional_kl(runs: SteeredRuns) -> PositionMetric:
    """KL(base || p) - KL(steered || p) in nats at each response position.

    It goes from -KL(steered || base) in the base run to KL(base || steered) in the steered one, and counts positions
    where the greedy token stays, too. Its gradient at the base run is not zero, as that of a plain KL would be. The
    paper's DirKL is a divergence with a direction; this form of it is ours.
    """
    base, steered = (widened(logits).log_softmax(-1) for logits in (runs.base, runs.steered))
    difference = steered.exp() - base.exp()
    entropies = (base.exp() * base - steered.exp() * steered).sum(-1)

    def metric(logits: Tensor) -> Tensor:
        return ((difference * widened(logits).log_softmax(-1)).sum(-1) + entropies) * runs.real

    return PositionMetric(metric)


def read_by(contrast: Contrast, metric: PositionMetric, columns: slice = slice(None)) -> tuple[Contrast, Metric]:
    """What attribution takes: the contrast of which only the metric's words are read, and the metric's sum over
    response positions (those in `columns`).
    """
    return replace(contrast, words=metric.words), lambda logits: metric.of(logits)[:, columns].sum(-1)


def _about(model: ChatModel, vector: SteeringVector, responses: ResponseSet, measure: Measure, *more) -> list:
    """All that what is measured on a set depends on, for `kept_arrays`. A measure counts by its name."""
    name = getattr(measure, "__name__", "<lambda>")  # a partial has none
    if name == "<lambda>":
        raise CircuitError("the measure has no name: make it a def, by which what is kept can be told apart.")
    about = [model.revision, str(model.dtype), *vector_key(vector), name]
    return [*about, responses.side, responses.run, responses.strength, responses.prompts, responses.responses, *more]


# --- which edges -----------------------------------------------------------------------------------------------------


def attribute_responses(
    model: ChatModel,
    vector: SteeringVector,
    sets: Sequence[ResponseSet],
    measure: Measure = flip_difference,
    points: Sequence[float] = midpoint(10),
    columns: slice = slice(None),
    batch_size: int | None = None,
    folder: Path | str | None = None,
) -> dict[str, EdgeScores]:
    """Edge scores of steering, [response, source, reader] for each data set; `pooled` sums them, with their signs.

    One backward pass serves all positions of a response at each integration point. `columns` are the response
    positions that count; the scores of disjoint ones add up to those of all. In a `folder` every finished set's scores
    are kept, so that a run that was cut off goes on after them.
    """
    graph, found = graph_of(model, vector.layer), {}
    for responses in sets:

        def scores(responses=responses) -> dict[str, np.ndarray]:
            """One set's scores, whatever batches it ran in."""
            values = np.empty((len(responses), *graph.edges.shape), np.float32)
            for rows, runs in _runs_of(model, vector, responses, batch_size):
                values[rows] = attribute(model, *read_by(runs.contrast, measure(runs), columns), points).values
            return {"values": values}

        which = [list(points), columns.start, columns.stop, columns.step]
        kept = kept_arrays(folder, _about(model, vector, responses, measure, "scores", *which), scores)
        about = {"model": model.name, "revision": model.revision, "points": list(points), "method": vector.method}
        about |= {"measure": measure.__name__, "set": responses.name}
        found[responses.name] = EdgeScores(graph, kept["values"], about)
    return found


def pooled(scores: Mapping[str, EdgeScores], rows: Int[np.ndarray, " row"] | None = None) -> EdgeScores:
    """The signed sum over responses and data sets, [source, reader]: of all responses, or of those with index `rows` in
    their set (a set with fewer gives what it has).

    Raises CircuitError for no set, sets of different graphs, or no response.
    """
    parts = list(scores.values())
    if not parts or any(part.graph != parts[0].graph for part in parts):
        raise CircuitError("scores are pooled over at least one data set, all of one model and steering layer.")
    taken = [part.values if rows is None else part.values[rows[rows < len(part.values)]] for part in parts]
    if not (n := sum(map(len, taken))):
        raise CircuitError(f"none of the responses {list(rows)} is in any data set.")
    values = np.sum([part.sum(0, dtype=np.float64) for part in taken], 0)
    return replace(parts[0], values=values, about=parts[0].about | {"set": list(scores), "n": n})


def circuit_from(
    scores: Mapping[str, EdgeScores], n: int, rows: Int[np.ndarray, " row"] | None = None
) -> Circuit | None:
    """The `top_circuit` of `n` edges by the `pooled` scores of all responses, or of those with index `rows`.

    None where there is nothing to choose by: no row that any set has, or none that steering flips a token of.
    """
    if rows is not None and not any((rows < len(part.values)).any() for part in scores.values()):
        return None
    found = pooled(scores, rows)
    return top_circuit(found, n) if found.values.any() else None


def overlap_across_halves(
    scores: Mapping[str, Mapping[str, EdgeScores]], n: int, rows: Int[np.ndarray, " row"]
) -> pd.DataFrame:
    """How alike the circuits of vectors are that are found with different prompts: overlaps, [vector, vector].

    `scores` holds by vector what `attribute_responses` gives. Of each two circuits of `n` edges one comes from the even
    numbers among `rows` and one from the odd ones: the mean of both ways. The diagonal says how well a vector's circuit
    repeats itself. nan where a half gives no circuit.
    """
    even, odd = ({name: circuit_from(parts, n, rows[rows % 2 == i]) for name, parts in scores.items()} for i in (0, 1))
    one_way = overlap_table(even, odd)
    return (one_way + one_way.T) / 2


def circuits_with_controls(
    model: ChatModel,
    vector: SteeringVector,
    controls: Mapping[str, SteeringVector],
    sets: Sequence[ResponseSet],
    sizes: Sequence[float],
    size: float,
    points: Sequence[float] = midpoint(10),
    folder: Path | str | None = None,
) -> dict[Any, Circuit]:
    """A vector's circuits of several sizes (shares of all edges), and for the one of `size` what it is compared with.

    That is "all other edges", and by its name each control vector's circuit of as many edges, found on the same texts;
    a control that flips none of their tokens has none. `points` and `folder` are those of `attribute_responses`.
    """
    scores = pooled(attribute_responses(model, vector, sets, points=points, folder=folder))
    found: dict[Any, Circuit] = {**circuits_by_size(scores, sizes)}
    n = int(found[size].sum())
    found["all other edges"] = complement(scores.graph, found[size])
    for name, control in controls.items():
        of_control = circuit_from(attribute_responses(model, control, sets, points=points, folder=folder), n)
        found |= {} if of_control is None else {name: of_control}
    return found


# --- how much of it --------------------------------------------------------------------------------------------------

EFFECT_COLUMNS = ("side", "run", "prompt", "position", "flipped", "base", "steered")


def circuit_effects(
    model: ChatModel,
    vector: SteeringVector,
    sets: Sequence[ResponseSet],
    circuits: Mapping[Any, Circuit],
    measure: Measure = flip_difference,
    batch_size: int | None = None,
    folder: Path | str | None = None,
) -> pd.DataFrame:
    """The metric in the base run, the steered run and under each circuit alone, by exact patching.

    One row for each response position, with the columns side, run, prompt (index in its set), position, flipped, base,
    steered, and one for each circuit. It holds no text. In a `folder` every finished set's rows are kept, so that a run
    that was cut off goes on after them. Raises CircuitError for a circuit of another graph, or one with the name of
    another column.
    """
    if taken := set(EFFECT_COLUMNS) & set(circuits):
        raise CircuitError(f"a circuit cannot be called {', '.join(sorted(taken))}, as a column is; rename it.")
    tables, distinct = [], {circuit.tobytes(): circuit for circuit in circuits.values()}  # equal ones run once
    place = {mask: i for i, mask in enumerate(distinct, start=2)}  # behind both runs
    columns = [0, 1, *(place[circuit.tobytes()] for circuit in circuits.values())]
    masks = hashlib.sha256(b"".join(np.packbits(circuit).tobytes() for circuit in circuits.values())).hexdigest()
    for responses in sets:

        def effects(responses=responses) -> dict[str, np.ndarray]:
            """One set's rows, a response token each: the metric in both runs and under each circuit."""
            parts = []
            for rows, runs in _runs_of(model, vector, responses, batch_size):
                metric = measure(runs)
                contrast, _ = read_by(runs.contrast, metric)
                ends = (metric(logits) for logits in (runs.base, runs.steered))
                found = (metric.of(logits) for logits in circuit_logits(model, contrast, distinct.values()))
                values = torch.stack([value[runs.real].double() for value in chain(ends, found)], 1).cpu().numpy()
                example, position = (index.cpu().numpy() for index in runs.real.nonzero(as_tuple=True))
                found = {"prompt": np.array(rows)[example], "position": position}
                found |= {"flipped": runs.flipped[runs.real].cpu().numpy()}
                parts.append(found | {"values": values[:, columns]})
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

        what = ["effects", list(map(str, circuits)), masks]
        kept = kept_arrays(folder, _about(model, vector, responses, measure, *what), effects)
        values = pd.DataFrame(kept.pop("values"), columns=["base", "steered", *circuits])
        first = pd.DataFrame({"side": responses.side, "run": responses.run, **kept})
        tables.append(pd.concat([first, values], axis=1))
    return pd.concat(tables, ignore_index=True)


def held_out_effects(
    model: ChatModel,
    vector: SteeringVector,
    sets: Sequence[ResponseSet],
    found: Sequence[Mapping[Any, Circuit]],
    folder: Path | str | None = None,
) -> pd.DataFrame:
    """`circuit_effects` on prompts that did not choose the circuits: `found` holds those from the even and those from
    the odd prompts of each set, and each are run on the other half.

    Rows as of `circuit_effects` on the whole sets, those of the even prompts first. Both halves need a circuit of each
    name.
    """
    tables = []
    for i, circuits in enumerate(reversed(found)):  # on the even prompts those from the odd ones
        table = circuit_effects(model, vector, [part[i::2] for part in sets], circuits, folder=folder)
        tables.append(table.assign(prompt=2 * table["prompt"] + i))  # its place in the whole set
    return pd.concat(tables, ignore_index=True)


def faithfulness(
    effects: pd.DataFrame,
    by: Sequence[str] = (),
    seed: int = 0,
    n: int = 1000,
    circuits: Iterable[Any] | None = None,
) -> pd.DataFrame:
    """(m(circuit) - m(base)) / (m(steered) - m(base)), sums over positions and responses before the division.

    `effects` comes from `circuit_effects`; `by` names columns of it (side, run, position) that split it, `circuits`
    those that are measured (without it all). A table with the columns of `by`, circuit, faithfulness, and low and high,
    the ends of the 95 % bootstrap interval over prompts, both responses to a prompt drawn together; prompts at which
    steering changes nothing add nothing and are left out. nan where a group has none left, or one and so no interval.
    Raises CircuitError when steering changes nothing anywhere.
    """
    if not (effects["steered"] != effects["base"]).any():
        raise CircuitError("steering changes nothing: no position flips. Give other responses or a larger strength.")
    names = [name for name in effects if name not in EFFECT_COLUMNS] if circuits is None else list(circuits)
    rows = []
    for group, part in effects.groupby(list(by)) if by else [((), effects)]:
        carried, whole = _by_prompt(part, names)
        for name, column in zip(names, carried.T):
            rows.append((*group, name, *_interval(_ratio_of_sums, column, whole, seed, n)))
    return pd.DataFrame(rows, columns=[*by, "circuit", "faithfulness", "low", "high"])


def faithfulness_gap(effects: pd.DataFrame, one: Any, other: Any, seed: int = 0) -> tuple[float, float, float]:
    """How much nearer to all of steering one circuit comes than another: the distance of the other's `faithfulness`
    from 1 less that of this one's, with its 95 % bootstrap interval over prompts, drawn for both together: (value, low,
    high).

    The difference of the two where neither carries more than all edges do: what goes beyond is as far from it as what
    is missing. nan for fewer than two prompts that steering changes.
    """
    return _compared([(effects, {"one": one, "other": other})], lambda short: short[0]["other"] - short[0]["one"], seed)


def faithfulness_difference(
    one: pd.DataFrame, other: pd.DataFrame, circuit: Any, other_circuit: Any, seed: int = 0
) -> tuple[float, float, float]:
    """How much nearer to all of its vector's steering a circuit comes than another circuit to all of its own.

    `one` and `other` are `circuit_effects` of two vectors on the same texts. The rest as of `faithfulness_gap`, on the
    prompts that both vectors change.
    """
    tables = [(one, {"circuit": circuit}), (other, {"circuit": other_circuit})]
    return _compared(tables, lambda short: short[1]["circuit"] - short[0]["circuit"], seed)


def loss_difference(
    one: pd.DataFrame, other: pd.DataFrame, own: Any, others_own: Any, circuit: Any, seed: int = 0
) -> tuple[float, float, float]:
    """How much more one vector's steering loses in a circuit, against its own circuit, than another vector's does.

    Each loss is a `faithfulness_gap`; the rest as of `faithfulness_difference`.
    """
    tables = [(one, {"own": own, "circuit": circuit}), (other, {"own": others_own, "circuit": circuit})]
    return _compared(tables, lambda short: np.subtract(*(each["circuit"] - each["own"] for each in short)), seed)


FEWEST = 10  # prompts of a side: of fewer, a bootstrap knows nothing


def _compared(tables: Sequence, statistic: Callable, seed: int) -> tuple[float, float, float]:
    """A statistic of how far circuits are from all of steering, |1 - F|, by table and name, with its interval.

    `tables` holds (effects, {name: circuit}) of one or more vectors; prompts that any of them does not change are left
    out, and the others are drawn for all together. Several vectors may have few in common: with fewer than ten of a
    side there is no interval. Every draw counts a circuit to the side of 1 on which it is in the whole sample, since
    the mean of a |1 - F| that may fall on either side is too large.
    """
    sums = []
    for effects, circuits in tables:
        found = effects.groupby(["side", "prompt"])[["base", "steered", *circuits.values()]].sum()
        found = found.sub(found["base"], axis=0)
        sums.append(found[found["steered"] != 0])
    both = sorted(set.intersection(*(set(found.index) for found in sums)))
    if len(both) < 2:
        return np.nan, np.nan, np.nan
    carried = [
        {name: (found.loc[both, circuit].to_numpy(), found.loc[both, "steered"].to_numpy())
         for name, circuit in circuits.items()}
        for found, (_, circuits) in zip(sums, tables)
    ]  # fmt: skip

    def short(rows: Int[np.ndarray, "*draw prompt"], axis: int = -1) -> list[dict]:
        """1 - F of each circuit, for some rows of prompts."""
        return [{name: 1 - part[rows].sum(axis) / whole[rows].sum(axis) for name, (part, whole) in each.items()}
                for each in carried]  # fmt: skip

    side = [{name: np.sign(value) or 1 for name, value in each.items()} for each in short(np.arange(len(both)))]

    def of_rows(rows: np.ndarray, axis: int = -1) -> float | np.ndarray:
        """The statistic, each circuit to its side."""
        return statistic([{name: side[i][name] * each[name] for name in each} for i, each in enumerate(short(rows))])

    found = bootstrap(of_rows, np.arange(len(both)), seed=seed, vectorized=True)
    few = len(tables) > 1 and min(pd.Series([place[0] for place in both]).value_counts()) < FEWEST
    return (found[0], np.nan, np.nan) if few else found


def relative_faithfulness(
    effects: pd.DataFrame, circuits: Sequence[Any], to: Any, seed: int = 0
) -> tuple[float, float, float]:
    """What circuits carry of steering, on average, over what the circuit `to` carries: (value, low, high).

    `to` "steered" stands for all edges: then it is their mean faithfulness. The circuits count as draws (of random
    vectors, or random circuits): the interval is that of `bootstrap_draws`, over prompts and circuits. Raises
    CircuitError when `to` carries nothing.
    """
    if (effects[to] == effects["base"]).all():
        raise CircuitError(f"the circuit {to} carries nothing, so others cannot be measured by it; give another.")
    carried, whole = _by_prompt(effects.assign(steered=effects[to]), list(circuits))  # [prompt, circuit], [prompt]
    found = bootstrap_draws(lambda part, whole, axis: part.mean(axis) / whole.mean(axis), carried.T, whole, seed=seed)
    return found if len(whole) > 1 else (found[0], np.nan, np.nan)


def curve_measures(
    effects: pd.DataFrame, circuits: Mapping[float, Any], target: float = 0.85, seed: int = 0
) -> pd.DataFrame:
    """What a curve of faithfulness over circuit size comes to: CPR, CMD, and the smallest size with the target.

    `circuits` gives the column of `effects` for each size, a share of all edges; all edges together, size 1, are added.
    Rows "cpr", "cmd" and "needed", columns value, low, high: 95 % bootstrap intervals over prompts, as `faithfulness`
    draws them.
    """
    sizes = [*sorted(circuits), 1.0]
    carried, whole = _by_prompt(effects, [circuits[size] for size in sizes[:-1]])

    def curve(above: np.ndarray, below: np.ndarray) -> list[float]:
        return [*(above.sum(0) / below.sum()), 1.0]

    measures = {
        "cpr": lambda *pair: cpr(sizes, curve(*pair)),
        "cmd": lambda *pair: cmd(sizes, curve(*pair)),
        "needed": lambda *pair: size_needed(sizes, curve(*pair), target),
    }
    rows = [_interval(measure, carried, whole, seed, 1000) for measure in measures.values()]
    return pd.DataFrame(rows, index=list(measures), columns=["value", "low", "high"])


def effect_summary(
    effects: pd.DataFrame, circuits: Mapping[str, Any], sizes: Sequence[float], seed: int = 0
) -> pd.DataFrame:
    """What circuits carry, and the smallest size that carries enough, in a table with the columns value, low, high.

    One row a name in `circuits`, which gives its column of `effects`: the `faithfulness` there, nan without the column.
    The row "needed" is that of `curve_measures` on the columns `sizes`, shares of all edges.
    """
    there = [name for name in circuits.values() if name in effects]
    found = faithfulness(effects, seed=seed, circuits=there).set_index("circuit").reindex(list(circuits.values()))
    found = found.set_axis(list(circuits)).set_axis(["value", "low", "high"], axis=1)
    found.loc["needed"] = curve_measures(effects, {size: size for size in sizes}, seed=seed).loc["needed"]
    return found


def _ratio_of_sums(above: np.ndarray, below: np.ndarray, axis: int = -1) -> float | np.ndarray:
    return above.sum(axis) / below.sum(axis)


def _by_prompt(
    effects: pd.DataFrame, names: Sequence[Any]
) -> tuple[Float[np.ndarray, "prompt circuit"], Float[np.ndarray, " prompt"]]:
    """What each circuit, and all of steering, changes on each prompt that steering changes at all."""
    sums = effects.groupby(["side", "prompt"])[["base", "steered", *names]].sum()
    sums = sums[sums["steered"] != sums["base"]]  # else a draw of such prompts alone has no ratio
    changes = sums.to_numpy() - sums[["base"]].to_numpy()
    return changes[:, 2:], changes[:, 1]


def _interval(
    statistic: Callable[..., float], carried: np.ndarray, whole: np.ndarray, seed: int, n: int
) -> tuple[float, float, float]:
    """A statistic of (carried, whole) with its bootstrap interval over prompts; without one for a single prompt."""
    if len(whole) < 2:
        return statistic(carried, whole) if len(whole) else np.nan, np.nan, np.nan
    if statistic is _ratio_of_sums:  # most of all intervals
        return bootstrap(statistic, carried, whole, seed=seed, n=n, vectorized=True)
    by_row = lambda rows: statistic(carried[rows], whole[rows])  # noqa: E731
    return bootstrap(by_row, np.arange(len(whole)), seed=seed, n=n)


def transfer(
    model: ChatModel,
    vectors: Mapping[str, SteeringVector],
    sets: Mapping[str, Sequence[ResponseSet]],
    circuits: Mapping[Any, Circuit],
    folder: Path | str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """How much of each vector's steering each circuit carries: a table with the columns vector, circuit, faithfulness,
    low, high.

    A vector is measured on its own sets; all must share the steering layer. Random circuits may be among the circuits.
    `folder` is that of `circuit_effects`, `seed` that of `faithfulness`.
    """
    tables = []
    for name, vector in vectors.items():
        effects = circuit_effects(model, vector, sets[name], circuits, folder=folder)
        tables.append(faithfulness(effects, seed=seed).assign(vector=name))
    return pd.concat(tables, ignore_index=True)[["vector", "circuit", "faithfulness", "low", "high"]]
