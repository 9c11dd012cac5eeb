"""Exact edge patching: what an edge does when its message is replaced and everything after it is computed again."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from .attribution import Contrast, Metric, clean_and_corrupted
from .graph import Graph
from .models import ChatModel, Prefix, Tape, edit, resume
from .prompts import batches


@torch.no_grad()
def patch_edges(
    model: ChatModel, contrast: Contrast, metric: Metric, edges: Int[np.ndarray, "edge 2"], batch_size: int = 256
) -> Float[np.ndarray, "edge batch"]:
    """metric(with this one edge corrupted) - metric(clean), for each (source, reader) index pair and example.

    The reader is given its clean residual input plus the source's corrupted - clean; all that follows is recomputed.
    `batch_size` rows (an edge and an example each) run at once. Raises ValueError for a pair that is no edge.
    """
    graph, edges = contrast.graph, np.asarray(edges)
    if len(wrong := edges[~graph.edges[edges[:, 0], edges[:, 1]]]):
        raise ValueError(f"source {wrong[0][0]} and reader {wrong[0][1]} are no edge: a source must come first.")
    deltas = source_changes(model, contrast)  # [source, batch, pos, d_model]
    n = len(contrast.clean)
    clean = metric(_logits(model, contrast, contrast.tape.residuals[-1], model.n_layers - 1))
    effects = np.zeros((len(edges), n))
    for layer in np.unique(graph.reader_layers[edges[:, 1]]):
        chosen = np.flatnonzero(graph.reader_layers[edges[:, 1]] == layer)
        for part in batches(chosen.tolist(), max(1, batch_size // n)):
            rows = [metric(row) for row in _patched(model, contrast, int(layer), deltas, edges[part])]
            effects[part] = (torch.stack(rows) - clean).cpu().numpy()
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


def _logits(model: ChatModel, contrast: Contrast, residual: Tensor, layer: int) -> Tensor:
    return model.unembed(resume(model, contrast.tape, layer, residual)[:, -contrast.keep :])


def _patched(model: ChatModel, contrast: Contrast, layer: int, deltas: Tensor, edges: np.ndarray) -> Tensor:
    """Logits [edge, batch, pos, vocab] with one edge patched a row; all edges' readers stand in block `layer`."""
    n, graph = len(contrast.clean), contrast.graph
    delta = deltas[edges[:, 0]].flatten(0, 1)  # [edge * batch, pos, d_model]
    if layer < 0:  # the unembedding
        final = resume(model, contrast.tape, model.n_layers - 1, contrast.tape.residuals[-1])
        logits = model.unembed((final.repeat(len(edges), 1, 1) + delta)[:, -contrast.keep :])
        return logits.unflatten(0, (-1, n))
    changes = _reader_edits(model, graph, layer, delta, np.repeat(edges[:, 1], n))
    taken = _repeat(contrast.tape, len(edges))
    with edit(model, changes):
        final = resume(model, taken, layer, taken.residuals[layer])
    return model.unembed(final[:, -contrast.keep :]).unflatten(0, (-1, n))


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


def _repeat(taken: Tape, times: int) -> Tape:
    """The tape with every row `times` over; what all rows share (first dimension 1) stays as it is."""

    def stretch(value):
        if isinstance(value, tuple):
            return tuple(map(stretch, value))
        if isinstance(value, Prefix):
            return value.repeated(times)
        many = isinstance(value, Tensor) and value.ndim and len(value) > 1
        return value.repeat(times, *[1] * (value.ndim - 1)) if many else value

    residuals = [h.repeat(times, 1, 1) for h in taken.residuals]
    return Tape(residuals, [{name: stretch(value) for name, value in a.items()} for a in taken.arguments])
