"""Circuits as sets of edges: against literal searches and numbers worked out by hand."""

import math
import re

import numpy as np
import pandas as pd
import pytest

from steerutils.graph import EdgeScores, Graph
from steerutils.subgraphs import (
    SIZES,
    CircuitError,
    _from_unembedding,
    circuits_by_size,
    cmd,
    complement,
    cpr,
    disattenuated,
    edge_kinds,
    greedy_circuit,
    intersection_over_union,
    overlap,
    overlap_table,
    prune,
    random_circuit,
    random_edges,
    shared_and_own,
    size_needed,
    top_circuit,
)

GRAPHS = [Graph(3, 4, 2), Graph(5, 4, 4, first=2), Graph(4, 6, 1, first=1), Graph(1, 1, 1)]
TINY = Graph(1, 1, 1)  # sources input, a0.h0, m0; readers a0.q0, a0.k0, a0.v0, m0, logits


def hears(graph, source, reader):
    """Whether a source is computed from what a reader reads, by their names."""
    kind = re.match(r"a(\d+)\.([qkv])(\d+)", reader)
    if not kind:
        return source == reader
    layer, letter, number = kind.groups()
    shared = 1 if letter == "q" else graph.n_heads // graph.n_groups
    return source in {f"a{layer}.h{h}" for h in range(int(number) * shared, (int(number) + 1) * shared)}


def literally_pruned(graph, circuit):
    """Edges on a path from the input to the logits, by following names until nothing new is found."""
    edges = [(graph.source_names[u], graph.reader_names[v]) for u, v in np.argwhere(circuit)]
    pairs = {
        (name, reader) for name in graph.source_names for reader in graph.reader_names if hears(graph, name, reader)
    }
    reached, useful, before = {"input"}, {"logits"}, None
    while before != (before := (len(reached), len(useful))):
        heard = {reader for source, reader in edges if source in reached}
        sending = {source for source, reader in edges if reader in useful}
        reached |= {source for source, reader in pairs if reader in heard}
        useful |= {reader for source, reader in pairs if source in sending}
    return {(source, reader) for source, reader in edges if source in reached and reader in useful}


def named(graph, circuit):
    return {(graph.source_names[u], graph.reader_names[v]) for u, v in np.argwhere(circuit)}


def random_scores(graph, seed=0):
    return EdgeScores(graph, np.random.default_rng(seed).normal(size=graph.edges.shape) * graph.edges)


@pytest.mark.parametrize("graph", GRAPHS)
def test_pruning_keeps_what_is_on_a_literal_path(graph):
    rng, sizes = np.random.default_rng(0), set()
    for share in (0.02, 0.05, 0.1, 0.15, 0.3) * 4:
        circuit = graph.edges & (rng.random(graph.edges.shape) < share)
        pruned = prune(graph, circuit)
        assert named(graph, pruned) == literally_pruned(graph, circuit)
        sizes.add((int(circuit.sum()), int(pruned.sum())))
    assert graph.n_layers == 1 or any(0 < after < before for before, after in sizes)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("choose", ["top", "greedy", "random"])
def test_circuits_have_the_size_asked_for_and_no_dangling_edge(graph, choose):
    scores, short = random_scores(graph), 0
    make = {"top": top_circuit, "greedy": greedy_circuit, "random": lambda s, n: random_circuit(s.graph, n, seed=3)}
    for n in {1, 2, 5, 10, graph.n_edges // 10, graph.n_edges // 2, graph.n_edges - 1, graph.n_edges} - {0}:
        if n > graph.n_edges:
            continue
        circuit = make[choose](scores, n)
        assert named(graph, circuit) == literally_pruned(graph, circuit)
        assert not (circuit & ~graph.edges).any() and circuit.sum() <= n
        short += circuit.sum() < n and n > 10
    assert not short


def test_top_edges_are_the_strongest_that_hang_together():
    graph = GRAPHS[0]
    scores = random_scores(graph, 1)
    order = np.argsort(-np.abs(scores.values), axis=None)
    for n in (10, 40, 100):
        circuit = top_circuit(scores, n)
        for k in range(1, graph.n_edges):  # as many as fit, taken in order
            mask = np.zeros(graph.edges.size, bool)
            mask[order[:k]] = True
            pruned = prune(graph, mask.reshape(graph.edges.shape))
            if pruned.sum() > n:
                break
            best = pruned
        assert not (best & ~circuit).any()
        filled = circuit & ~best  # then the strongest between nodes that are in
        sources, left = best.any(1), np.abs(scores.values) * ~circuit
        joined = [(u, v) for u, v in np.argwhere(graph.edges & (left > 0)) if sources[u] or u == 0]
        weakest = np.abs(scores.values[filled]).min() if filled.any() else math.inf
        assert all(left[u, v] <= weakest for u, v in joined if prune(graph, circuit | _only(graph, u, v))[u, v])


def _only(graph, source, reader):
    mask = np.zeros(graph.edges.shape, bool)
    mask[source, reader] = True
    return mask


def test_top_circuit_by_hand():
    values = np.zeros(TINY.edges.shape)
    values[0, 2], values[1, 4], values[0, 4], values[2, 4], values[1, 3] = 9, 5, 1, -8, 7
    scores = EdgeScores(TINY, values)
    # the strongest, input -> v, leads nowhere until h0 -> m0 -> logits are in
    assert named(TINY, top_circuit(scores, 3)) == {("input", "a0.v0"), ("a0.h0", "m0"), ("m0", "logits")}
    assert named(TINY, top_circuit(scores, 4)) == named(TINY, top_circuit(scores, 3)) | {("a0.h0", "logits")}
    assert named(TINY, top_circuit(scores, 1)) == {("input", "logits")}  # no other path is one edge long


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_greedy_search_takes_the_strongest_edge_into_what_is_in(graph):
    scores, inside, taken = random_scores(graph, 2), {"logits"}, []
    sizes = {(graph.source_names[u], graph.reader_names[v]): abs(scores.values[u, v])
             for u, v in np.argwhere(graph.edges)}  # fmt: skip
    while open_edges := [edge for edge in sizes if edge[1] in inside and edge not in taken]:
        best = max(open_edges, key=sizes.get)
        taken.append(best)
        inside |= {reader for reader in graph.reader_names if hears(graph, best[0], reader)}
    found = np.unravel_index(_from_unembedding(scores), graph.edges.shape)
    assert [(graph.source_names[u], graph.reader_names[v]) for u, v in zip(*found)] == taken


def test_random_circuits_follow_their_seed_and_complements_hold_the_rest():
    graph = GRAPHS[0]
    one, again, other = (random_circuit(graph, 40, seed) for seed in (0, 0, 1))
    assert (one == again).all() and (one != other).any()
    rest = complement(graph, one)
    assert not (rest & one).any() and ((rest | one) == graph.edges).all()


def test_sizes_are_shares_of_all_edges():
    scores = random_scores(GRAPHS[2])
    circuits = circuits_by_size(scores)
    assert list(circuits) == list(SIZES) and (circuits[1.0] == scores.graph.edges).all()
    assert circuits[0.5].sum() == round(0.5 * scores.graph.n_edges)
    assert (circuits[0.2] == top_circuit(scores, round(0.2 * scores.graph.n_edges))).all()


def test_overlap_and_intersection_over_union_by_hand():
    one, other = np.array([[True, True, True, False]]), np.array([[False, True, False, True]])
    assert overlap(one, other) == 0.5 and intersection_over_union(one, other) == 0.25
    assert overlap(one, one) == 1 and overlap(one, np.array([[True, False, False, False]])) == 1
    with pytest.raises(CircuitError, match="empty"):
        overlap(one, one & False)
    with pytest.raises(CircuitError, match="empty"):
        intersection_over_union(one & False, one & False)


def test_overlaps_in_a_table_and_none_with_a_circuit_that_was_not_found():
    one, other = np.array([[True, True, True, False]]), np.array([[False, True, False, True]])
    table = overlap_table({"one": one, "none": None}, {"other": other, "same": one})
    assert table.loc["one"].to_dict() == {"other": 0.5, "same": 1.0} and table.loc["none"].isna().all()
    pd.testing.assert_frame_equal(overlap_table({"a": one, "b": other}), overlap_table({"a": one, "b": other}).T)


def test_overlaps_are_divided_by_what_their_own_allow():
    table = pd.DataFrame([[0.9, 0.3, 0.1], [0.3, 0.4, 0.2], [0.1, 0.2, 0.0]], list("abc"), list("abc"))
    found = disattenuated(table)
    assert found.loc["a", "b"] == found.loc["b", "a"] == pytest.approx(0.3 / 0.6)
    assert found.loc["a", "a"] == pytest.approx(1) and found["c"].isna().all()


def test_shared_and_own_edges_by_hand():
    circuit, *others = (np.array([[bool(int(bit)) for bit in bits]]) for bits in ("11110", "11001", "10100"))
    shared, own = shared_and_own(circuit, others)
    assert shared.tolist() == [[True, False, False, False, False]]
    assert own.tolist() == [[False, False, False, True, False]]
    assert all((part == circuit).all() for part in shared_and_own(circuit, []))


def test_random_edges_are_some_of_the_circuits():
    circuit = random_circuit(GRAPHS[0], 40, 0)
    one, again, other = (random_edges(circuit, 15, seed) for seed in (0, 0, 1))
    assert one.sum() == 15 and not (one & ~circuit).any()
    assert (one == again).all() and (one != other).any()
    assert not random_edges(circuit, 0, 0).any() and (random_edges(circuit, 40, 0) == circuit).all()
    with pytest.raises(CircuitError, match="41 edges of a circuit that has 40"):
        random_edges(circuit, 41, 0)


def test_kinds_of_edges_by_hand():
    graph = Graph(2, 2, 1)
    table = edge_kinds(graph, graph.edges)
    # readers a block: 2 queries, 1 key, 1 value, 1 MLP; block 1 sees 1 input, 2 heads, 1 MLP before it
    assert table.loc["input"].tolist() == [4, 2, 2, 2, 1]
    assert table.loc["head"].tolist() == [4, 2, 2, 2 + 4, 4]
    assert table.loc["MLP"].tolist() == [2, 1, 1, 1, 2]
    assert table.to_numpy().sum() == graph.n_edges
    assert list(table.columns) == ["Q", "K", "V", "MLP", "unembedding"]


def test_areas_by_hand():
    assert cpr((0.0, 0.5, 1.0), (0.0, 1.0, 1.0)) == pytest.approx(0.75)
    assert cmd((0.0, 0.5, 1.0), (0.0, 1.0, 1.0)) == pytest.approx(0.25)
    assert cpr((0.0, 0.5, 1.0), (0.0, 1.5, 1.0)) == pytest.approx(0.375 + 0.625)
    assert cmd((0.0, 0.5, 1.0), (0.0, 1.5, 1.0)) == pytest.approx(0.375 + 0.125)  # too much is as wrong as too little
    assert cpr((0.2, 1.0), (0.5, 1.0)) == pytest.approx(0.6)
    assert cmd(SIZES, np.ones(10)) == 0 and cpr(SIZES, np.ones(10)) == pytest.approx(0.999)


def test_the_size_needed_is_the_smallest_that_is_enough():
    assert size_needed((0.1, 0.2, 0.5), (0.5, 0.85, 0.8)) == 0.2
    assert size_needed((0.1, 0.2), (0.5, 0.7), target=0.6) == 0.2
    assert math.isnan(size_needed((0.1, 0.2), (0.5, 0.7)))


@pytest.mark.parametrize("choose", [top_circuit, greedy_circuit])
def test_scores_per_example_or_without_any_size_choose_nothing(choose):
    scores = random_scores(GRAPHS[0])
    with pytest.raises(CircuitError, match="per example"):
        choose(EdgeScores(scores.graph, np.stack([scores.values] * 2)), 10)
    with pytest.raises(CircuitError, match="all scores are zero"):
        choose(EdgeScores(scores.graph, 0 * scores.values), 10)


@pytest.mark.parametrize("n", [0, -1, 6 + 10**6])
def test_impossible_sizes_are_refused(n):
    with pytest.raises(CircuitError, match="give 1 to"):
        top_circuit(random_scores(TINY), n)
