"""The graph of a decoder: which component writes what which component reads. Index arithmetic only, no model.

Sources write into the residual stream: the input, every head, every MLP. Readers read it: every head's query, every
key/value group's key and value, every MLP, the unembedding. An edge is a (source, reader) pair with the source
before the reader; all edges together are one matrix [source, reader].
"""

import io
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from .record import write_bytes, write_json

KINDS = ("Q", "K", "V", "MLP", "unembedding")


@dataclass(frozen=True)
class Graph:
    """Blocks `first` to `n_layers` - 1 of a decoder with `n_heads` query heads and `n_groups` key/value groups a block.

    Source 0 is the residual stream at the input of block `first`: the embedding, or a steering vector's site.
    """

    n_layers: int
    n_heads: int
    n_groups: int
    first: int = 0

    def __post_init__(self):
        if not 0 <= self.first < self.n_layers:
            raise ValueError(f"layer {self.first} is out of range: the model has blocks 0 to {self.n_layers - 1}.")
        if self.n_groups < 1 or self.n_heads % self.n_groups:
            raise ValueError(f"{self.n_heads} heads cannot share {self.n_groups} key/value groups evenly.")

    @property
    def layers(self) -> range:
        """The blocks in the graph."""
        return range(self.first, self.n_layers)

    @property
    def n_sources(self) -> int:
        return 1 + len(self.layers) * (self.n_heads + 1)

    @property
    def n_readers(self) -> int:
        return 1 + len(self.layers) * self.readers_per_layer

    @property
    def readers_per_layer(self) -> int:
        return self.n_heads + 2 * self.n_groups + 1

    @property
    def n_edges(self) -> int:
        return int(self.reach.sum())

    def heads(self, layer: int) -> slice:
        """The sources that are heads of block `layer`."""
        start = 1 + (layer - self.first) * (self.n_heads + 1)
        return slice(start, start + self.n_heads)

    def mlp(self, layer: int) -> int:
        """The source that is the MLP of block `layer`."""
        return self.heads(layer).stop

    def readers(self, layer: int, kind: str) -> slice:
        """The readers of one kind ("Q", "K", "V", "MLP") in block `layer`."""
        counts = (self.n_heads, self.n_groups, self.n_groups, 1)
        start = (layer - self.first) * self.readers_per_layer + sum(counts[: KINDS.index(kind)])
        return slice(start, start + counts[KINDS.index(kind)])

    @cached_property
    def reach(self) -> Int[np.ndarray, " reader"]:
        """How many sources, counted from the first, each reader sees."""
        before = 1 + np.arange(len(self.layers)) * (self.n_heads + 1)  # [block]
        block = np.repeat(before[:, None], self.readers_per_layer, 1)
        block[:, -1] += self.n_heads  # an MLP also sees the heads of its own block
        return np.append(block.ravel(), self.n_sources)

    @property
    def edges(self) -> Bool[np.ndarray, "source reader"]:
        """The matrix of what is an edge."""
        return np.arange(self.n_sources)[:, None] < self.reach

    @cached_property
    def source_layers(self) -> Int[np.ndarray, " source"]:
        """The block of each source; -1 for the input, which belongs to none."""
        return np.append(-1, np.repeat(self.layers, self.n_heads + 1))

    @cached_property
    def source_is_head(self) -> Bool[np.ndarray, " source"]:
        """Which sources are heads."""
        return np.append(False, np.tile(np.arange(self.n_heads + 1) < self.n_heads, len(self.layers)))

    @cached_property
    def reader_layers(self) -> Int[np.ndarray, " reader"]:
        """The block of each reader; -1 for the unembedding, which belongs to none."""
        return np.append(np.repeat(self.layers, self.readers_per_layer), -1)

    @cached_property
    def reader_kinds(self) -> np.ndarray:
        """The kind of each reader, one of KINDS."""
        counts = (self.n_heads, self.n_groups, self.n_groups, 1)
        return np.append(np.tile(np.repeat(KINDS[:4], counts), len(self.layers)), KINDS[4])

    @cached_property
    def source_names(self) -> list[str]:
        """ "input", "a0.h0" (head 0 of block 0), ..., "m0" (its MLP), ..."""
        blocks = [[*(f"a{layer}.h{h}" for h in range(self.n_heads)), f"m{layer}"] for layer in self.layers]
        return ["input", *sum(blocks, [])]

    @cached_property
    def reader_names(self) -> list[str]:
        """ "a0.q0", ..., "a0.k0", ..., "a0.v0", ..., "m0", ..., "logits"; k and v count key/value groups."""
        names, counts = [], {"q": self.n_heads, "k": self.n_groups, "v": self.n_groups}
        for layer in self.layers:
            names += [f"a{layer}.{kind}{i}" for kind, n in counts.items() for i in range(n)] + [f"m{layer}"]
        return [*names, "logits"]


def fold(
    scores: Float[np.ndarray, "*batch source ungrouped"], graph: Graph, n_groups: int
) -> Float[np.ndarray, "*batch source reader"]:
    """Signed scores with a key and a value reader for every query head, summed to `n_groups` shared readers.

    `graph` is the ungrouped one. Sum before taking absolute values, for those of a sum are not the sum of those.
    """
    columns = []
    for layer in graph.layers:
        columns.append(scores[..., graph.readers(layer, "Q")])
        for kind in "KV":
            copies = scores[..., graph.readers(layer, kind)]
            columns.append(copies.reshape(*copies.shape[:-1], n_groups, -1).sum(-1))
        columns.append(scores[..., graph.readers(layer, "MLP")])
    return np.concatenate([*columns, scores[..., -1:]], -1)


@dataclass(eq=False)
class EdgeScores:
    """Scores of a graph's edges, [source, reader], or [example, source, reader] when kept per example."""

    graph: Graph
    values: Float[np.ndarray, "*example source reader"]
    about: dict = field(default_factory=dict)  # model, revision, metric, points, reduction, number of examples

    def table(self, n: int | None = None) -> pd.DataFrame:
        """The `n` strongest edges (all without n), by size: source, reader, kind, layer of both ends, score."""
        if self.values.ndim != 2:
            raise ValueError("these scores are per example; take .values of one, or a sum, first.")
        flat = np.flatnonzero(self.graph.edges)
        order = flat[np.argsort(-np.abs(self.values.ravel()[flat]), kind="stable")[:n]]
        source, reader = np.unravel_index(order, self.values.shape)
        return pd.DataFrame(
            {
                "source": np.array(self.graph.source_names)[source],
                "reader": np.array(self.graph.reader_names)[reader],
                "kind": self.graph.reader_kinds[reader],
                "from_layer": self.graph.source_layers[source],
                "to_layer": self.graph.reader_layers[reader],
                "score": self.values.ravel()[order],
            }
        )

    def save(self, path: Path | str) -> Path:
        """Write one npz file: the matrix, the graph's shape, and what the scores are about."""
        buffer = io.BytesIO()
        words = json.dumps({"graph": asdict(self.graph), "about": self.about})
        np.savez_compressed(buffer, scores=self.values, words=words)
        return write_bytes(path, buffer.getvalue())

    def save_mib(self, path: Path | str, d_model: int) -> Path:
        """Write the JSON form of the MIB benchmark (as EAP-IG's Graph.from_json reads it): named nodes and edges.

        That form has a key and a value reader for every query head; a shared reader's score is divided evenly among
        the heads that share it, so that its sum stays.
        """
        graph, shared = self.graph, self.graph.n_heads // self.graph.n_groups
        edges = {}
        for row in self.table().itertuples():
            value = {"score": row.score, "in_graph": False}
            if row.kind in ("MLP", "unembedding"):
                edges[f"{row.source}->{row.reader}"] = value
                continue
            block, reader = row.reader.split(".")
            kind, number = reader[0], int(reader[1:])
            copies = [number] if kind == "q" else range(number * shared, (number + 1) * shared)
            for head in copies:
                edges[f"{row.source}->{block}.h{head}<{kind}>"] = value | {"score": row.score / len(copies)}
        shape = {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel_attn_mlp": False, "d_model": d_model}
        nodes = {name: {"in_graph": False} for name in [*graph.source_names, "logits"]}
        return write_json(path, {"cfg": shape, "nodes": nodes, "edges": edges})


def load_scores(path: Path | str) -> EdgeScores:
    """Read what EdgeScores.save wrote. Raises ValueError for another kind of file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            words = json.loads(str(file["words"]))
            return EdgeScores(Graph(**words["graph"]), file["scores"], words["about"])
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} holds no edge scores: {error}. Write them with scores.save(path).") from error


# --- comparing scores ------------------------------------------------------------------------------------------------


def shares_by_kind(graph: Graph, values: Float[np.ndarray, "example source reader"]) -> pd.DataFrame:
    """Share of each example's absolute scores that ends in each kind of reader: a row an example, columns KINDS."""
    sizes = np.abs(values)
    kinds = {kind: sizes[..., graph.reader_kinds == kind].sum((1, 2)) for kind in KINDS}
    return pd.DataFrame(kinds).div(sizes.sum((1, 2)), axis=0)


def shared_top(one: Float[np.ndarray, "*edges"], other: Float[np.ndarray, "*edges"], n: int = 100) -> int:
    """How many edges are among the `n` largest by absolute score in both of two arrays of scores of the same edges."""
    first, second = (set(np.argsort(-np.abs(values).ravel())[:n].tolist()) for values in (one, other))
    return len(first & second)
