"""Exact edge patching: what one edge, or a whole circuit, does when everything after it is computed again."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from .attribution import Contrast, Metric, clean_and_corrupted, clean_residuals, logits_read
from .graph import Graph
from .models import ChatModel, edit, repeated, resume, widened
from .prompts import batches
from .subgraphs import Circuit, checked

ROWS = 256  # rows (an edge and an example each) that run at once when single edges are patched

# --- one edge --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def patch_edges(
    model: ChatModel, contrast: Contrast, metric: Metric, edges: Int[np.ndarray, "edge 2"]
) -> Float[np.ndarray, "edge batch"]:
    """metric(with this one edge corrupted) - metric(clean), for each (source, reader) index pair and example.

    The reader is given its clean residual input plus the source's corrupted - clean; all that follows is recomputed.
    `ROWS` rows (an edge and an example each) run at once. Raises ValueError for a pair that is no edge.
    """
    graph, edges = contrast.graph, np.asarray(edges)
    if len(wrong := edges[~graph.edges[edges[:, 0], edges[:, 1]]]):
        raise ValueError(f"source {wrong[0][0]} and reader {wrong[0][1]} are no edge: a source must come first.")
    deltas = source_changes(model, contrast)  # [source, batch, pos, d_model]
    n = len(contrast.clean)
    residuals = clean_residuals(model, contrast)
    clean = metric(logits_read(model, contrast, residuals[model.n_layers]))
    effects = np.zeros((len(edges), n))
    for layer in np.unique(graph.reader_layers[edges[:, 1]]):
        chosen = np.flatnonzero(graph.reader_layers[edges[:, 1]] == layer)
        for part in batches(chosen.tolist(), max(1, ROWS // n)):
            at = residuals[int(layer) if layer >= 0 else model.n_layers]  # -1 is the unembedding's
            rows = [metric(row) for row in _patched(model, contrast, int(layer), at, deltas, edges[part])]
            effects[part] = widened(torch.stack(rows) - clean).cpu().numpy()
    return effects


def source_changes(model: ChatModel, contrast: Contrast) -> Float[Tensor, "source batch pos d_model"]:
    """What each source writes into the residual stream in the corrupted run, less what it writes in the clean one.

    A head behind a post-norm (Gemma) shares that norm with its block's other heads: its change is that of the norm's
    output when it alone is corrupted.
    """
    clean, corrupted = clean_and_corrupted(model, contrast)
    counted = 1.0 if contrast.positions is None else contrast.positions[..., None].to(contrast.clean)
    changes = [contrast.difference[None]]
    for layer in contrast.graph.layers:
        block = model.blocks[layer]
        z = (corrupted.heads[layer] - clean.heads[layer]).unflatten(-1, (model.n_heads, -1))
        weight = block.self_attn.o_proj.weight.unflatten(-1, (model.n_heads, -1))
        heads = torch.einsum("bphe,dhe->hbpd", z, weight)
        if model.has_post_norms:
            together = block.self_attn.o_proj.forward(clean.heads[layer])
            norm = block.post_attention_layernorm
            heads = norm(together + heads) - norm(together)
        changes += [heads, (corrupted.mlps[layer] - clean.mlps[layer])[None]]
    return torch.cat(changes) * counted


def _patched(
    model: ChatModel, contrast: Contrast, layer: int, clean: Tensor, deltas: Tensor, edges: np.ndarray
) -> Tensor:
    """Logits [edge, batch, pos, vocab] with one edge patched a row; all edges' readers see `clean` in block `layer`."""
    n, graph = len(contrast.clean), contrast.graph
    delta = deltas[edges[:, 0]].flatten(0, 1)  # [edge * batch, pos, d_model]
    if layer < 0:  # the unembedding
        return logits_read(model, contrast, (clean.repeat(len(edges), 1, 1) + delta).unflatten(0, (-1, n)))
    changes = _reader_edits(model, graph, layer, delta, np.repeat(edges[:, 1], n))
    taken = repeated(contrast.tape, len(edges))
    with edit(model, changes):
        final = resume(model, taken, layer, clean.repeat(len(edges), 1, 1))
    return logits_read(model, contrast, final.unflatten(0, (-1, n)))


def _reader_edits(model: ChatModel, graph: Graph, layer: int, delta: Tensor, readers: np.ndarray) -> list:
    """Edits that let each row's reader, and nothing else, read the residual stream plus delta."""
    block, edits, seen = model.blocks[layer], [], {}
    for kind, site in (("Q", "q"), ("K", "k"), ("V", "v")):
        place = graph.readers(layer, kind)
        mine = torch.tensor(readers[:, None] == np.arange(place.start, place.stop), device=delta.device)  # [row, head]
        module = getattr(block.self_attn, f"{site}_proj")

        def change(h, mine=mine, module=module):
            read = block.input_layernorm.forward(seen["x"] + delta)
            patched = linear(read, module.weight, module.bias).unflatten(-1, (mine.shape[1], -1))
            return torch.where(mine[:, None, :, None], patched, h.unflatten(-1, (mine.shape[1], -1))).flatten(-2)

        edits.append((site, layer, change))
    norm, _ = model.site("mlp_residual", layer)
    is_mlp = torch.tensor(readers == graph.readers(layer, "MLP").start, device=delta.device)[:, None, None]

    def change_mlp(h):
        return torch.where(is_mlp, norm.forward(seen["middle"] + delta), h)

    return [
        ("block_input", layer, lambda h: seen.update(x=h)),
        *edits,
        ("mlp_residual", layer, lambda h: seen.update(middle=h)),
        ("mlp_input", layer, change_mlp),
    ]


# --- a whole circuit -------------------------------------------------------------------------------------------------


@torch.no_grad()
def circuit_logits(
    model: ChatModel, contrast: Contrast, circuits: Iterable[Circuit]
) -> Iterator[Float[Tensor, "batch keep word"]]:
    """Logits of a run for each circuit, in which only that circuit's edges carry what the corruption changes.

    They are those that the contrast's metric sees, of its words if it names any. Every reader reads the clean run's
    residual stream, plus, for each edge of the circuit that ends there, what its source writes in this very run less
    what it wrote in the clean one; the source "input" writes the corrupted input.
    So edges outside keep their clean values, and all that follows is recomputed. All edges give the corrupted run, none
    the clean one. Heads behind a post-norm (Gemma) enter it together: a reader reads the norm of the clean heads with
    those of its circuit replaced. What is shared by circuits is computed once, so give all of them in one call.

    Memory: (1 + sources) * batch * pos * d_model numbers for the sources' changes, and the readers of one block.
    Raises CircuitError for a mask of another graph or with True where no edge is.
    """
    base, graph = _base_run(model, contrast), contrast.graph
    batch, width, d = base.final.shape
    rows = base.final.new_empty(batch, width, 1 + graph.n_sources, d)  # sources inside: twice as fast
    for circuit in circuits:
        yield _run_circuit(model, contrast, base, rows, checked(graph, circuit))


@dataclass(eq=False)
class _Base:
    """The clean run, by layer: what circuits' changes are added to and counted from."""

    starts: dict[int, Float[Tensor, "batch pos d_model"]]  # the residual stream before the block
    heads: dict[int, Float[Tensor, "batch pos heads"]]  # before o_proj
    attention: dict[int, Float[Tensor, "batch pos d_model"]]  # after o_proj, before a post-norm
    middles: dict[int, Float[Tensor, "batch pos d_model"]]  # the residual stream before the MLP
    mlps: dict[int, Float[Tensor, "batch pos d_model"]]
    final: Float[Tensor, "batch pos d_model"]
    counted: Tensor | float  # [batch, pos, 1]: where sources count


def _base_run(model: ChatModel, contrast: Contrast) -> _Base:
    sites = {name: {} for name in ("block_input", "heads", "attention_output", "mlp_residual", "mlp_write")}
    keep = [
        (site, layer, lambda h, kept=kept, layer=layer: kept.update({layer: h}))
        for site, kept in sites.items()
        for layer in contrast.graph.layers
    ]
    with edit(model, keep):
        final = resume(model, contrast.tape, contrast.graph.first, contrast.clean)
    counted = 1.0 if contrast.positions is None else contrast.positions[..., None].to(final)
    return _Base(*sites.values(), final, counted)


def _run_circuit(model: ChatModel, contrast: Contrast, base: _Base, rows: Tensor, circuit: Circuit) -> Tensor:
    """`rows` is room for what `_read` adds up: at 0 the clean residual stream, then every source's change."""
    gates = torch.tensor(circuit, device=rows.device)
    rows[:, :, 1] = contrast.difference * base.counted
    edits = [e for layer in contrast.graph.layers for e in _circuit_edits(model, contrast, base, rows, gates, layer)]
    with edit(model, edits):  # what flows through the blocks themselves is never read
        resume(model, contrast.tape, contrast.graph.first, contrast.clean)
    final = _read(model, contrast.graph, base, rows, gates[:, -1:], base.final)[:, :, 0]
    return logits_read(model, contrast, final)


def _circuit_edits(model: ChatModel, contrast: Contrast, base: _Base, rows: Tensor, gates: Tensor, layer: int) -> list:
    """Edits that let the readers of a block read what the circuit says, and keep what its sources change."""
    block, graph, read = model.blocks[layer], contrast.graph, {}
    readers, mlp = slice(graph.readers(layer, "Q").start, graph.readers(layer, "V").stop), graph.mlp(layer)
    mlp_norm, _ = model.site("mlp_residual", layer)

    def read_attention(_):
        residuals = _read(model, graph, base, rows, gates[: graph.heads(layer).start, readers], base.starts[layer])
        parts = block.input_layernorm.forward(residuals).split([model.n_heads, model.n_groups, model.n_groups], 2)
        read.update({name: _project(getattr(block.self_attn, f"{name}_proj"), x) for name, x in zip("qkv", parts)})

    def read_mlp(_):
        column = graph.readers(layer, "MLP")
        return mlp_norm.forward(_read(model, graph, base, rows, gates[:mlp, column], base.middles[layer])[:, :, 0])

    def send_heads(z):
        z = ((z - base.heads[layer]) * base.counted).unflatten(-1, (model.n_heads, -1))  # [batch, pos, head, d_head]
        weight = block.self_attn.o_proj.weight.unflatten(-1, (model.n_heads, -1))
        rows[:, :, 1:][:, :, graph.heads(layer)] = torch.einsum("bphe,dhe->bphd", z, weight)

    def send_mlp(h):
        rows[:, :, 1 + mlp] = (h - base.mlps[layer]) * base.counted

    return [
        ("block_input", layer, read_attention),
        *((name, layer, lambda _, name=name: read.pop(name)) for name in "qkv"),
        ("heads", layer, send_heads),
        ("mlp_input", layer, read_mlp),
        ("mlp_write", layer, send_mlp),
    ]


def _read(model: ChatModel, graph: Graph, base: _Base, rows: Tensor, gates: Tensor, at: Tensor) -> Tensor:
    """What readers that see `at` in the clean run read in this one, [batch, pos, reader, d_model].

    `gates` [source, reader] says which of the sources so far reach each of them.
    """
    n = len(gates)
    rows[:, :, 0] = at
    weights = torch.cat([gates.new_ones(1, gates.shape[1]), gates]).to(at.dtype)
    if model.has_post_norms:  # heads are added through their norm below
        weights[1:] *= torch.tensor(~graph.source_is_head[:n, None], device=at.device)
    found = weights.T @ rows[:, :, : 1 + n]
    if model.has_post_norms:
        for layer in graph.layers:
            mine = gates[graph.heads(layer)]  # empty for blocks to come
            if mine.any():
                _add_heads(model, base, layer, rows[:, :, 1:][:, :, graph.heads(layer)], mine, found)
    return found


def _add_heads(model: ChatModel, base: _Base, layer: int, changes: Tensor, gates: Tensor, found: Tensor) -> None:
    """Add to what readers found what the heads of one block change behind its post-norm (in place)."""
    norm, clean = model.blocks[layer].post_attention_layernorm, base.attention[layer]
    some = gates.any(0)
    mixed = clean[:, :, None] + gates[:, some].T.to(clean.dtype) @ changes
    found[:, :, some] += norm.forward(mixed) - norm.forward(clean)[:, :, None]


def _project(module: nn.Linear, x: Float[Tensor, "batch pos reader d_model"]) -> Float[Tensor, "batch pos projected"]:
    """A projection in which every reader has an input of its own."""
    weight = module.weight.unflatten(0, (x.shape[2], -1))  # [reader, d_head, d_model]
    out = torch.einsum("bprd,red->bpre", x, weight).flatten(2)
    return out if module.bias is None else out + module.bias
