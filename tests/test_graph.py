"""The graph's index arithmetic, against a literal list of edges."""

import json
import time

import numpy as np
import pytest

from steerutils.graph import EdgeScores, Graph, fold, load_scores, shared_top, shares_by_kind


def literal_edges(n_layers, n_heads, n_groups, first=0):
    """(source name, reader name) of every edge, written down block by block."""
    edges, stream = [], ["input"]
    for layer in range(first, n_layers):
        for kind, n in (("q", n_heads), ("k", n_groups), ("v", n_groups)):
            edges += [(source, f"a{layer}.{kind}{i}") for i in range(n) for source in stream]
        stream = stream + [f"a{layer}.h{h}" for h in range(n_heads)]
        edges += [(source, f"m{layer}") for source in stream]
        stream = [*stream, f"m{layer}"]
    return edges + [(source, "logits") for source in stream]


@pytest.mark.parametrize("shape", [(3, 4, 2, 0), (3, 4, 4, 0), (5, 6, 1, 2), (1, 1, 1, 0)])
def test_edges_are_those_of_a_literal_list(shape):
    graph = Graph(*shape)
    found = {(graph.source_names[u], graph.reader_names[v]) for u, v in np.argwhere(graph.edges)}
    literal = literal_edges(*shape)
    assert found == set(literal) and graph.n_edges == len(literal)


@pytest.mark.parametrize("blocks, heads, groups, edges", [(11, 8, 4, 8790), (16, 24, 8, 124441)])
def test_edge_counts_of_steering_graphs_are_the_papers(blocks, heads, groups, edges):
    assert Graph(30, heads, groups, first=30 - blocks).n_edges == edges


def test_layers_and_kinds_name_the_same_readers():
    graph = Graph(4, 6, 2, first=1)
    for layer in graph.layers:
        for kind, letter in (("Q", "q"), ("K", "k"), ("V", "v")):
            place = graph.readers(layer, kind)
            assert graph.reader_names[place] == [f"a{layer}.{letter}{i}" for i in range(place.stop - place.start)]
            assert set(graph.reader_kinds[place]) == {kind} and set(graph.reader_layers[place]) == {layer}
        assert graph.source_names[graph.mlp(layer)] == f"m{layer}" and graph.source_layers[graph.mlp(layer)] == layer


def test_a_graph_of_a_large_model_is_made_at_once():
    start = time.process_time()
    graph = Graph(32, 32, 32)
    n = graph.n_edges
    took = time.process_time() - start
    assert n == sum(3 * 32 * (1 + 33 * j) + 1 + 33 * j + 32 for j in range(32)) + 1 + 33 * 32
    assert n > 1.5e6 and took < 0.5


def test_folding_sums_the_copies_of_a_shared_reader():
    graph = Graph(2, 4, 4)
    scores = np.random.default_rng(0).normal(size=(3, graph.n_sources, graph.n_readers))
    folded, small = fold(scores, graph, 2), Graph(2, 4, 2)
    assert folded.shape == (3, small.n_sources, small.n_readers)
    k, shared = graph.readers(1, "K").start, small.readers(1, "K").start
    np.testing.assert_allclose(folded[..., shared + 1], scores[..., k + 2] + scores[..., k + 3])
    np.testing.assert_array_equal(folded[..., small.readers(1, "MLP")], scores[..., graph.readers(1, "MLP")])


def test_scores_come_back_from_their_file_and_rank_by_size(tmp_path):
    graph = Graph(2, 2, 1, first=1)
    values = np.where(graph.edges, np.random.default_rng(0).normal(size=graph.edges.shape), 0)
    scores = EdgeScores(graph, values, {"model": "toy"})
    again = load_scores(scores.save(tmp_path / "scores.npz"))
    assert again.graph == graph and again.about == {"model": "toy"}
    np.testing.assert_array_equal(again.values, values)
    table = scores.table(3)
    assert table["score"].abs().is_monotonic_decreasing and len(table) == 3
    assert table["score"].abs().iloc[0] == np.abs(values).max()


def test_mib_export_names_every_ungrouped_edge_once_and_keeps_the_sum(tmp_path):
    graph = Graph(2, 4, 2)
    values = np.where(graph.edges, np.random.default_rng(0).normal(size=graph.edges.shape), 0)
    found = json.loads(EdgeScores(graph, values).save_mib(tmp_path / "mib.json", d_model=8).read_text())
    assert len(found["edges"]) == Graph(2, 4, 4).n_edges
    assert found["cfg"] == {"n_layers": 2, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 8}
    assert set(found["nodes"]) == {*graph.source_names, "logits"}
    assert sum(edge["score"] for edge in found["edges"].values()) == pytest.approx(values.sum())
    assert "m0->a1.h3<v>" in found["edges"] and "a0.h1->m0" in found["edges"] and "input->logits" in found["edges"]
    at = values[graph.source_names.index("m0")]  # heads 0 and 1 share the first key/value group, 2 and 3 the second
    for head, group in enumerate((0, 0, 1, 1)):
        for kind in "kv":
            score = found["edges"][f"m0->a1.h{head}<{kind}>"]["score"]
            assert score == pytest.approx(at[graph.reader_names.index(f"a1.{kind}{group}")] / 2)
        assert found["edges"][f"m0->a1.h{head}<q>"]["score"] == at[graph.reader_names.index(f"a1.q{head}")]


def test_bad_shapes_and_files_say_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="out of range: the model has blocks 0 to 3"):
        Graph(4, 2, 2, first=4)
    with pytest.raises(ValueError, match="evenly"):
        Graph(4, 6, 4)
    (tmp_path / "x.npz").write_text("no")
    with pytest.raises(ValueError, match="holds no edge scores"):
        load_scores(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="per example"):
        EdgeScores(Graph(1, 1, 1), np.zeros((2, 3, 5))).table()


def test_shares_by_kind_by_hand():
    graph = Graph(2, 2, 1)
    values = np.zeros((2, graph.n_sources, graph.n_readers))
    values[0, 0, graph.readers(0, "Q")] = [1.0, -2]
    values[0, 0, graph.readers(1, "MLP")] = -3
    values[0, 1, -1] = 4
    values[1, 0, graph.readers(1, "V")] = 0.5
    shares = shares_by_kind(graph, values)
    assert shares.to_dict("records") == [
        {"Q": 0.3, "K": 0, "V": 0, "MLP": 0.3, "unembedding": 0.4},
        {"Q": 0, "K": 0, "V": 1, "MLP": 0, "unembedding": 0},
    ]


def test_shared_top_counts_edges_that_are_large_in_both_whatever_their_sign():
    one, other = np.array([[5.0, -4, 0], [1, 2, 3]]), np.array([[-9.0, 0, 8], [0, 1, -7]])
    assert [shared_top(one, other, n) for n in (1, 2, 3, 6)] == [1, 1, 2, 6]
    assert shared_top(one, -one, 2) == 2
