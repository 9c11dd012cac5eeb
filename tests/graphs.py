"""A small graph of edges with scores of both signs, for tests of its drawings."""

import numpy as np
import pandas as pd

from steerutils.graph import EdgeScores, Graph


def small_graph(n: int) -> tuple[Graph, pd.DataFrame]:
    """A graph of 3 blocks and its `n` strongest edges, among which are readers of every kind (for n >= 5)."""
    graph, rng = Graph(3, 4, 2), np.random.default_rng(0)
    scores = rng.normal(size=(graph.n_sources, graph.n_readers)) * graph.edges
    for reader in ("a0.q1", "a1.k0", "a2.v1", "m2", "logits"):
        scores[0, graph.reader_names.index(reader)] *= 10
    return graph, EdgeScores(graph, scores).table(n)
