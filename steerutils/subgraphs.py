"""Circuits as sets of a graph's edges: choosing them, pruning them to paths, comparing them. No model.

A circuit is a boolean matrix [source, reader].
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from .graph import KINDS, EdgeScores, Graph

Circuit = Bool[np.ndarray, "source reader"]
SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Circuit sizes as shares of all edges, those of the MIB benchmark."""


class CircuitError(ValueError):
    """A circuit, or a set of responses, that nothing can be measured on; the message says what to do."""


def checked(graph: Graph, circuit: Circuit) -> Circuit:
    """The circuit, if it is one of this graph. Raises CircuitError."""
    circuit = np.asarray(circuit)
    if circuit.shape != graph.edges.shape:
        raise CircuitError(
            f"the circuit is a matrix {circuit.shape} but the graph has {graph.edges.shape} sources and readers: it "
            "was made for another model or another steering layer."
        )
    if (circuit & ~graph.edges).any():
        raise CircuitError(
            "the circuit holds pairs that are no edges (a source must come first); cut it: & graph.edges."
        )
    return circuit


# --- choosing a circuit ----------------------------------------------------------------------------------------------


def top_circuit(scores: EdgeScores, n: int) -> Circuit:
    """The edges with the largest absolute scores that hang together: `n` of them, each on a path from source "input" to
    the unembedding.

    Edges are taken in order of size, and those on no path are left out, until `n` remain (Cheng et al. 2026); where the
    next edge would complete a path too long, the strongest edges between nodes already in fill up. Fewer than `n` only
    if no such edges are left. Raises CircuitError for `n` outside 1 to the number of edges, and for scores
    that are per example or all zero.
    """
    return _connected(scores.graph, _by_size(scores), n)


def greedy_circuit(scores: EdgeScores, n: int) -> Circuit:
    """Like `top_circuit`, but edges are taken from the unembedding back: always the strongest edge into a node that is
    in already (the greedy search of Hanna et al. 2024).
    """
    return _connected(scores.graph, _from_unembedding(scores), n)


def random_circuit(graph: Graph, n: int, seed: int) -> Circuit:
    """A control: `n` random edges that hang together as those of the other circuits do."""
    return _connected(graph, np.random.default_rng(seed).permutation(np.flatnonzero(graph.edges)), n)


def random_edges(circuit: Circuit, n: int, seed: int) -> Circuit:
    """`n` random edges of a circuit, which need not hang together. Raises CircuitError if it has fewer."""
    there = np.flatnonzero(circuit)
    if n > len(there):
        raise CircuitError(f"{n} edges of a circuit that has {len(there)}: give a smaller number.")
    drawn = np.zeros_like(circuit)
    drawn.flat[np.random.default_rng(seed).choice(there, n, replace=False)] = True
    return drawn


def circuits_by_size(scores: EdgeScores, sizes: Sequence[float] = SIZES) -> dict[float, Circuit]:
    """The `top_circuit` of several sizes, given as shares of all edges and rounded to whole edges (1 at least)."""
    return {size: top_circuit(scores, max(1, round(size * scores.graph.n_edges))) for size in sizes}


def complement(graph: Graph, circuit: Circuit) -> Circuit:
    """All edges that are not in the circuit."""
    return graph.edges & ~checked(graph, circuit)


def prune(graph: Graph, circuit: Circuit) -> Circuit:
    """The edges of a circuit that are on a path from source "input" to the unembedding.

    A path goes into a head by its query, or its group's key or value, and out of it by what the head writes.
    """
    reached, useful = _ends_of_paths(graph, circuit)
    return circuit & reached[:, None] & useful


def _ends_of_paths(graph: Graph, circuit: Circuit) -> tuple[Bool[np.ndarray, " source"], Bool[np.ndarray, " reader"]]:
    """Which sources hear from source "input" through the circuit, and which readers are heard at the unembedding."""
    shared = graph.n_heads // graph.n_groups
    reached, useful = np.zeros(graph.n_sources, bool), np.zeros(graph.n_readers, bool)
    reached[0] = useful[-1] = True
    for layer in graph.layers:
        q, k, v, mlp = (reached @ circuit[:, graph.readers(layer, kind)] for kind in KINDS[:4])
        reached[graph.heads(layer)] = q | np.repeat(k | v, shared)
        reached[graph.mlp(layer)] = (reached @ circuit[:, graph.readers(layer, "MLP")])[0]
    for layer in reversed(graph.layers):
        useful[graph.readers(layer, "MLP")] = (circuit[graph.mlp(layer)] & useful).any()
        heads = circuit[graph.heads(layer)] @ useful
        useful[graph.readers(layer, "Q")] = heads
        for kind in "KV":
            useful[graph.readers(layer, kind)] = heads.reshape(-1, shared).any(1)
    return reached, useful


def _connected(graph: Graph, order: Int[np.ndarray, " edge"], n: int) -> Circuit:
    """The first edges of an order (flat indices) that make a pruned circuit of at most `n`, topped up to `n`."""
    if not 1 <= n <= graph.n_edges:
        raise CircuitError(f"a circuit of {n} edges: give 1 to {graph.n_edges}, the edges of this graph.")
    few, many = 0, len(order)  # pruned sizes grow with the number taken
    while few < many:
        middle = (few + many + 1) // 2
        few, many = (middle, many) if prune(graph, _mask(graph, order[:middle])).sum() <= n else (few, middle - 1)
    circuit = prune(graph, _mask(graph, order[:few]))
    reached, useful = _ends_of_paths(graph, circuit)
    fitting = (graph.edges & ~circuit & reached[:, None] & useful).ravel()
    rest = order[fitting[order]][: n - circuit.sum()]
    return circuit | _mask(graph, rest)


def _mask(graph: Graph, flat: Int[np.ndarray, " edge"]) -> Circuit:
    mask = np.zeros(graph.edges.shape, bool)
    mask.ravel()[flat] = True
    return mask


def _sizes(scores: EdgeScores) -> Float[np.ndarray, "source reader"]:
    if scores.values.ndim != 2:
        raise CircuitError("these scores are per example; choose a circuit from their sum.")
    if not scores.values.any():
        raise CircuitError("all scores are zero, so no edge is stronger than another: did any position flip?")
    return np.abs(scores.values)


def _by_size(scores: EdgeScores) -> Int[np.ndarray, " edge"]:
    flat = np.flatnonzero(scores.graph.edges)
    return flat[np.argsort(-_sizes(scores).ravel()[flat], kind="stable")]


def _from_unembedding(scores: EdgeScores) -> Int[np.ndarray, " edge"]:
    graph, sizes, order, seen, heap = scores.graph, _sizes(scores), [], set(), []

    def enter(readers: Sequence[int]) -> None:
        for reader in set(readers) - seen:
            for source in range(graph.reach[reader]):
                heapq.heappush(heap, (-sizes[source, reader], source, reader))
        seen.update(readers)

    enter([graph.n_readers - 1])
    while heap:
        _, source, reader = heapq.heappop(heap)
        order.append(source * graph.n_readers + reader)
        enter(_readers_of(graph, source))
    return np.array(order)


def _readers_of(graph: Graph, source: int) -> list[int]:
    """The readers through which a source hears: a head's query and its group's key and value; an MLP's one."""
    layer = int(graph.source_layers[source])
    if layer < 0:
        return []
    if source == graph.mlp(layer):
        return [graph.readers(layer, "MLP").start]
    head = source - graph.heads(layer).start
    group = head // (graph.n_heads // graph.n_groups)
    return [graph.readers(layer, kind).start + i for kind, i in (("Q", head), ("K", group), ("V", group))]


# --- comparing circuits ----------------------------------------------------------------------------------------------


def overlap(one: Circuit, other: Circuit) -> float:
    """Overlap coefficient: shared edges over those of the smaller circuit (1 if one holds the other)."""
    return float((one & other).sum() / _at_least_one(int(min(one.sum(), other.sum()))))


def overlap_table(
    circuits: Mapping[str, Circuit | None], others: Mapping[str, Circuit | None] | None = None
) -> pd.DataFrame:
    """The `overlap` of each circuit (rows) with each of the others (columns), or of the circuits among themselves; nan
    where one of the two could not be found (None).
    """
    others = circuits if others is None else others
    rows = [[np.nan if a is None or b is None else overlap(a, b) for b in others.values()] for a in circuits.values()]
    return pd.DataFrame(rows, list(circuits), list(others), dtype=float)


def disattenuated(overlaps: pd.DataFrame) -> pd.DataFrame:
    """Overlaps of circuits from different prompts, as shares of what is possible for circuits that repeat themselves no
    better: o_ab / sqrt(o_aa o_bb).

    Spearman's (1904) correction of a correlation for attenuation, here a rule of thumb: by chance a share comes out
    above 1. `overlaps` is square, with each circuit's own overlap on the diagonal; nan where that is 0.
    """
    own = np.diag(overlaps)
    possible = np.sqrt(np.outer(own, own))
    return overlaps / np.where(possible == 0, np.nan, possible)


def shared_and_own(circuit: Circuit, others: Sequence[Circuit]) -> tuple[Circuit, Circuit]:
    """The edges of a circuit that are in all of the others, and those that are in none of them."""
    shared = np.logical_and.reduce([circuit, *others])
    return shared, circuit & ~np.logical_or.reduce([np.zeros_like(circuit), *others])


def intersection_over_union(one: Circuit, other: Circuit) -> float:
    """Shared edges over edges in either circuit."""
    return float((one & other).sum() / _at_least_one(int((one | other).sum())))


def _at_least_one(n: int) -> int:
    if not n:
        raise CircuitError("an empty circuit shares nothing with any other; take more edges.")
    return n


def edge_kinds(graph: Graph, circuit: Circuit) -> pd.DataFrame:
    """How many edges of a circuit go from each kind of source (rows) to each kind of reader (columns)."""
    rows = {
        "input": np.arange(graph.n_sources) == 0,
        "head": graph.source_is_head,
        "MLP": ~graph.source_is_head & (graph.source_layers >= 0),
    }
    circuit = checked(graph, circuit)
    counts = {kind: [int(circuit[row][:, graph.reader_kinds == kind].sum()) for row in rows.values()] for kind in KINDS}
    return pd.DataFrame(counts, index=pd.Index(rows, name="source"))


def cpr(sizes: Iterable[float], faithfulness: Iterable[float]) -> float:
    """Area under faithfulness over circuit size (shares of all edges, growing), by trapezoids: MIB's CPR."""
    return float(np.trapezoid(list(faithfulness), list(sizes)))


def cmd(sizes: Iterable[float], faithfulness: Iterable[float]) -> float:
    """Area between faithfulness and 1 over circuit size, by trapezoids between the sizes: MIB's CMD; 0 is best."""
    return float(np.trapezoid([abs(1 - value) for value in faithfulness], list(sizes)))


def size_needed(sizes: Iterable[float], faithfulness: Iterable[float], target: float = 0.85) -> float:
    """The smallest measured size with at least the target faithfulness; nan if none has it."""
    return min((size for size, value in zip(sizes, faithfulness) if value >= target), default=float("nan"))
