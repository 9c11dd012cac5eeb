"""Edge attribution: EAP and EAP-IG on plain Hugging Face models, grouped queries and post-norms included.

The score of an edge is (corrupted - clean source) . (gradient of the metric at the reader's residual input, before
its norm), summed over positions: an estimate of metric(this edge corrupted) - metric(clean). EAP takes the gradient
at the clean run (Syed et al. 2023); EAP-IG averages it over runs between the two (Hanna et al. 2024).

What makes it cheap: no head has its own copy of the residual stream. The gradient at one head's query, before the
norm, is J^T W_h^T dq_h with the norm's Jacobian J = diag(g) (I - x x^T / (d r^2)) / r for RMS r and weight g, so the
narrow dq_h / r can be summed over the runs, and one contraction at the end serves them all.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from .graph import EdgeScores, Graph
from .models import ChatModel, Tape, edit, hooked, prefix_of, resume, steered, tape, wide_dtype, widened
from .prompts import AlignedPairs, Batch, align_pairs, batches
from .record import say, write_bytes
from .steering import SteeringError, SteeringVector, add, check_vector

Metric = Callable[[Float[Tensor, "batch pos vocab"]], Float[Tensor, " batch"]]


class AttributionError(ValueError):
    """Runs, a metric or settings that cannot be attributed; the message says what to do."""


class _NotFinite(AttributionError):
    """Values of some examples that are not finite: their places in the batch, or the numbers they go by outside."""

    def __init__(self, what: str, examples: list[int], look_at: str):
        super().__init__(f"{what} of example {_join(examples)} is not finite; look at its {look_at}.")
        self.what, self.examples, self.look_at = what, examples, look_at

    def renamed(self, numbers: Sequence[int]) -> "_NotFinite":
        """The same error, with each place in the batch replaced by its number."""
        return _NotFinite(self.what, [numbers[i] for i in self.examples], self.look_at)


def left(m: int) -> tuple[float, ...]:
    """EAP-IG's usual points: fractions of the clean run 0, 1/m, ..., (m-1)/m. The first is the corrupted run."""
    return tuple(k / m for k in range(_positive(m)))


def midpoint(m: int) -> tuple[float, ...]:
    """Fractions of the clean run 1/2m, 3/2m, ...: more exact than `left`, for one more forward pass."""
    return tuple((k + 0.5) / m for k in range(_positive(m)))


EAP = (1.0,)
"""The points of plain EAP: the clean run alone."""


def _positive(m: int) -> int:
    if m < 1:
        raise AttributionError(f"{m} integration points: at least 1 is needed (5 is usual).")
    return m


# --- two runs to compare -----------------------------------------------------------------------------------


@dataclass(eq=False)
class _Run:
    """What the components of a run wrote, by layer: heads before o_proj [batch, pos, heads], MLPs [batch, pos, d]."""

    heads: dict[int, Tensor]
    mlps: dict[int, Tensor]


@dataclass(eq=False)
class Contrast:
    """Two runs through the same blocks that differ in the residual stream at the input of block `graph.first`.

    Columns begin with the first one that differs: what both runs share before it is kept as keys and values only.
    """

    graph: Graph
    tape: Tape  # of the clean run, without its residual streams: they are large, and `clean_residuals` makes them
    clean: Float[Tensor, "batch pos d_model"]
    corrupted: Float[Tensor, "batch pos d_model"]
    keep: int = 1  # the metric sees the logits of that many last columns
    words: Int[Tensor, "batch keep word"] | None = None  # and of these words there; of the whole vocabulary if None
    positions: Bool[Tensor, "batch pos"] | None = None  # where sources count; everywhere if None
    clean_run: _Run | None = None  # what the components wrote while the tape was taken, if that was kept
    corrupted_run: _Run | None = None  # and in `corrupted_final`

    @property
    def difference(self) -> Float[Tensor, "batch pos d_model"]:
        """corrupted - clean where the two runs begin: what the source "input" sends."""
        return self.corrupted - self.clean


def logits_read(
    model: ChatModel, contrast: Contrast, final: Float[Tensor, "*rows pos d_model"]
) -> Float[Tensor, "*rows keep word"]:
    """The logits of a final residual that a contrast's metric sees."""
    return model.unembed(final[..., -contrast.keep :, :], contrast.words)


def graph_of(model: ChatModel, first: int = 0) -> Graph:
    """The graph of a model's blocks from `first` on."""
    return Graph(model.n_layers, model.n_heads, model.n_groups, first)


def pair_contrast(model: ChatModel, clean: Sequence[str], corrupted: Sequence[str], positions: str = "all") -> Contrast:
    """Contrast of chat prompts that differ in one span of equal length, read at the last prompt token.

    `positions` says where sources count: "all", "span" (where the texts differ) or "last" (the last token).
    Raises PromptError, with both token lists, when the spans of a pair have different lengths.
    """
    pairs = align_pairs(model.tokenizer, list(clean), list(corrupted), model.device)
    where = {"all": None, "span": pairs.span, "last": _last_column(pairs)}
    if positions not in where:
        raise AttributionError(f"unknown positions {positions!r}: give {', '.join(where)}.")
    return token_contrast(model, pairs.clean, pairs.corrupted, positions=where[positions])


def _last_column(pairs: AlignedPairs) -> Bool[Tensor, "batch pos"]:
    last = torch.zeros_like(pairs.span)
    last[:, -1] = True
    return last


def token_contrast(
    model: ChatModel,
    clean: Batch,
    corrupted: Batch,
    keep: int = 1,
    positions: Bool[Tensor, "batch pos"] | None = None,
) -> Contrast:
    """Contrast of two batches of tokens, column by column. Raises AttributionError when their paddings differ."""
    if not torch.equal(clean.attention_mask, corrupted.attention_mask):
        raise AttributionError(
            f"clean {list(clean.input_ids.shape)} and corrupted {list(corrupted.input_ids.shape)} tokens differ in "
            "length or padding, so their columns mean different positions; align_pairs makes ones that fit."
        )
    shared = 0 if steered(model) else _shared_columns(clean, corrupted, keep)
    inputs, other = clean.inputs(), corrupted.inputs()
    if shared:  # a causal model runs equal first tokens once for both
        prefix = prefix_of(model, clean.input_ids[:, :shared])
        for side in (inputs, other):
            side |= {name: side[name][:, shared:] for name in ("input_ids", "position_ids")}
            side |= {"past_key_values": prefix}
        positions = None if positions is None else positions[:, shared:]
    taken, run = _taped(model, inputs, graph_of(model))
    clean = taken.residuals[0]
    taken.residuals.clear()
    return Contrast(graph_of(model), taken, clean, _embedding(model, other), keep, positions=positions, clean_run=run)


def _taped(model: ChatModel, inputs: dict, graph: Graph) -> tuple[Tape, _Run]:
    """The tape of a run and what its components wrote, in one pass."""
    kept: dict = {}
    with edit(model, _keep(kept, ("heads", "mlp_write"), graph.layers)):
        taken = tape(model, inputs)
    return taken, _run_of(kept, graph.layers)


def _shared_columns(clean: Batch, corrupted: Batch, keep: int) -> int:
    """How many first columns hold the same real tokens in both batches, in every row; the last `keep` do not count."""
    same = (clean.input_ids == corrupted.input_ids) & clean.attention_mask.bool()
    different = (~same.all(0)).nonzero()
    width = clean.input_ids.shape[1]
    return min(int(different[0]) if len(different) else width, width - keep)


def _embedding(model: ChatModel, inputs: dict) -> Float[Tensor, "batch pos d_model"]:
    """The input of block 0 (with the family's scale, where it has one), without running the block."""

    class Reached(Exception):
        pass

    kept = []

    def stop(h):
        kept.append(h.detach())
        raise Reached

    try:
        with torch.no_grad(), edit(model, [("block_input", 0, stop)]):
            model.decoder(**inputs, use_cache=False)
    except Reached:
        pass
    return kept[0]


def steering_contrast(
    model: ChatModel,
    batch: Batch,
    vector: SteeringVector,
    strength: float = 1.0,
    keep: int = 1,
) -> Contrast:
    """Contrast of a base and a steered run on the same tokens: no alignment needed (Cheng et al. 2026).

    The base run is the clean one, the steered run the corrupted one; the graph begins at the vector's block, and its
    source "input" is the steering node. `keep` columns are read: for teacher-forced responses, one more than the
    response is long, so that the first is the one that predicts the first response token. Raises SteeringError for a
    vector of another model, or one that is not added to a block's input.
    """
    check_vector(model, vector)
    if (vector.operation, vector.site) != ("add", "block_input"):
        raise SteeringError(
            f"the vector acts by {vector.operation!r} at {vector.site!r}; as a contrast, steering is a vector that is "
            "added to a block's input (operation='add', site='block_input')."
        )
    graph = graph_of(model, vector.layer)
    taken, base, run = _base_of(model, batch, graph)
    real = batch.attention_mask[..., None].to(base.dtype)  # padding stays as it is
    steered = add(base, vector.direction.to(base), strength * real)
    return Contrast(graph, taken, base, steered, keep, clean_run=run)


BASES_KEPT = 16  # batches whose run below a vector's block is remembered, the latest ones
_bases: WeakKeyDictionary[ChatModel, dict] = WeakKeyDictionary()


def _base_of(model: ChatModel, batch: Batch, graph: Graph) -> tuple[Tape, Float[Tensor, "batch pos d_model"], _Run]:
    """The base run of a batch: its tape without residual streams, the one where the graph begins, and what was written.

    Below the graph nothing depends on vectors, metrics or circuits, which many calls in a row try on the same batches:
    there a batch runs once, unless hooks act on the model.
    """
    known, key = _bases.setdefault(model, {}), None if hooked(model) else _state(model, batch, graph)
    if key in known:
        start, arguments = known[key] = known.pop(key)  # the latest comes last
        taken = Tape([], arguments)
        taken.final, run = _forward(model, Contrast(graph, taken, start, start), start)
        return taken, start, run
    taken, run = _taped(model, batch.inputs(), graph)
    start = taken.residuals[graph.first]
    taken.residuals.clear()
    if key is not None:
        known[key] = start, taken.arguments
    for old in list(known)[:-BASES_KEPT]:
        del known[old]
    return taken, start, run


def _state(model: ChatModel, batch: Batch, graph: Graph) -> tuple:
    """All that a batch's run below the graph depends on: tokens, mask, block, and weights as they are now."""
    weights = tuple((weight.data_ptr(), weight._version) for weight in model.hf.parameters())
    tokens = (part.cpu().numpy().tobytes() for part in (batch.input_ids, batch.attention_mask))
    return graph.first, tuple(batch.input_ids.shape), *tokens, weights, model.config._attn_implementation


# --- metrics -------------------------------------------------------------------------------------------------


def logit_difference(good: Int[Tensor, " batch"], bad: Int[Tensor, " batch"]) -> Metric:
    """logit(good) - logit(bad) of the next token, one pair of tokens an example."""

    def metric(logits):
        rows = torch.arange(len(logits), device=logits.device)
        return logits[rows, -1, good] - logits[rows, -1, bad]

    return metric


def divergence_from(reference: Float[Tensor, "batch pos vocab"]) -> Metric:
    """KL(reference || logits) in nats, averaged over the columns the metric sees."""
    target = widened(reference.detach()).log_softmax(-1)
    return lambda logits: (target.exp() * (target - widened(logits).log_softmax(-1))).sum(-1).mean(-1)


def response_log_probability(batch: Batch) -> Metric:
    """log p(response | prompt) in nats, of teacher-forced responses; read with keep = response length + 1.

    A pair of responses y+ / y- is two sequences, each with its own contrast and passes: attribute both and subtract,
    at twice the cost.
    """
    width = batch.input_ids.shape[1] - batch.prompt_length
    targets, real = batch.input_ids[:, -width:], batch.response_mask[:, -width:]

    def metric(logits):
        scores = widened(logits[:, -width - 1 : -1]).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        return (scores * real).sum(-1)

    return metric


# --- attribution -----------------------------------------------------------------------------------------------


def attribute(
    model: ChatModel,
    contrast: Contrast,
    metric: Metric,
    points: Sequence[float] = left(5),
    along: str = "inputs",
) -> EdgeScores:
    """Scores of every edge for every example of a contrast, [batch, source, reader].

    `points` are the fractions of the clean run at which gradients are taken: `EAP`, `left(m)` or `midpoint(m)`.
    `along` "inputs" moves the input and lets everything downstream follow; "activations" moves one component's
    output at a time, at (2 blocks + 1) times the passes. `metric` maps logits [batch, keep, vocab] to one number an
    example. Raises AttributionError for no points or one outside 0 to 1, a metric of another shape, or a value that is
    not finite.
    """
    if not len(points):
        raise AttributionError("no integration points: give EAP, left(m) or midpoint(m).")
    if not all(0 <= point <= 1 for point in points):
        raise AttributionError(f"points {list(points)}: they are fractions of the clean run, from 0 to 1.")
    if along not in ("inputs", "activations"):
        raise AttributionError(f"unknown path {along!r}: give 'inputs' or 'activations'.")
    if model.hf.training:
        raise AttributionError(f"{model.name} is in train mode, where dropout changes every result: model.hf.eval().")
    run = {"inputs": _along_inputs, "activations": _along_activations}[along]
    scores = run(model, contrast, metric, points) / len(points)  # [batch, source, reader]
    scores.masked_fill_(~torch.from_numpy(contrast.graph.edges).to(scores.device), 0.0)
    _check_finite("a score", scores, "tokens")
    about = {"model": model.name, "revision": model.revision, "points": list(points), "along": along}
    return EdgeScores(contrast.graph, scores.cpu().numpy(), about)


def _join(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


@dataclass(eq=False)
class _Gradients:
    """Gradients of the metric at the readers, by layer, summed over runs.

    With x the residual stream, r its RMS and g the weight of the norm before attention, the gradient at reader h is
    g * (W_h^T narrow_h) - sum over runs of x * scalar_h. The last term is different in every run: `_Pull` holds it.
    """

    narrow: dict[int, Float[Tensor, "batch pos projected"]] = field(default_factory=dict)  # dq_h / r of q, k, v
    mlps: dict[int, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict)
    final: Float[Tensor, "batch pos d_model"] | float = 0.0


@dataclass(eq=False)
class _Pull:
    """What the norms before attention take off along the residual stream, in one run, by layer."""

    residuals: dict[int, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict)
    scalars: dict[int, Float[Tensor, "batch pos reader"]] = field(default_factory=dict)
    attention_outputs: dict[int, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict)  # with post-norms


RUNS_TOGETHER = 2  # runs whose residual streams are held before they go into the scores: memory against time
BLOCKS_TOGETHER = 4  # blocks whose readers meet the messages in one product: reading the messages is what takes time


def _along_inputs(model: ChatModel, contrast: Contrast, metric: Metric, points: Sequence[float]) -> Tensor:
    """Sum over points of the scores, [batch, source, reader]: the input is moved, the rest follows."""
    first, scores, sums, pulls = contrast.graph.first, _zeros(contrast), _Gradients(), []
    sent = None if 0.0 in points else _messages(model, contrast, _corrupted_run(model, contrast))
    left_over = len(points)
    for point in sorted(points):  # a pass from the corrupted end, where there is one, gives the messages too
        residual = contrast.clean if point == 1.0 else contrast.corrupted - point * contrast.difference
        pull, run = _backward(model, contrast, metric, first, residual, sums, keep_run=sent is None)
        sent = sent or _messages(model, contrast, run)
        pulls.append(pull)
        left_over -= 1
        del run, pull
        whole = model.has_post_norms or not left_over  # after a post-norm, messages are different in every run
        if whole or len(pulls) == RUNS_TOGETHER:
            _contract(model, contrast, sent, sums if whole else None, pulls, scores)
            pulls, sums = [], _Gradients() if whole else sums
    return scores


def _along_activations(model: ChatModel, contrast: Contrast, metric: Metric, points: Sequence[float]) -> Tensor:
    """Sum over points of the scores, [batch, source, reader]: one component's output is moved at a time."""
    graph, scores = contrast.graph, _zeros(contrast)
    clean, corrupted = clean_and_corrupted(model, contrast)
    sent = _messages(model, contrast, corrupted, clean)
    residuals = clean_residuals(model, contrast)

    def add(layer: int, residual: Tensor, rows: slice, edits: Sequence = ()) -> None:
        sums = _Gradients()
        pull, _ = _backward(model, contrast, metric, layer, residual, sums, edits)
        _contract(model, contrast, sent, sums, [pull], scores, rows)

    for share in (1 - point for point in points):
        add(graph.first, contrast.clean + share * contrast.difference, slice(0, 1))
        for layer in graph.layers:
            weight = model.blocks[layer].self_attn.o_proj.weight
            moved = share * linear(corrupted.heads[layer] - clean.heads[layer], weight)
            shift = [("attention_output", layer, lambda h, moved=moved: h + moved)]
            add(layer, residuals[layer], graph.heads(layer), shift)
            after = residuals[layer + 1] + share * (corrupted.mlps[layer] - clean.mlps[layer])
            add(layer + 1, after, slice(graph.mlp(layer), graph.mlp(layer) + 1))
    return scores


@torch.no_grad()
def clean_residuals(model: ChatModel, contrast: Contrast) -> dict[int, Float[Tensor, "batch pos d_model"]]:
    """The clean run's residual stream at the input of every block of the graph, and under `n_layers` the final one."""
    kept = {}
    with edit(model, _keep(kept, ("block_input",), contrast.graph.layers)):
        final = resume(model, contrast.tape, contrast.graph.first, contrast.clean)
    return {layer: h for (_, layer), h in kept.items()} | {model.n_layers: final}


def _zeros(contrast: Contrast) -> Float[Tensor, "batch source reader"]:
    shape = len(contrast.clean), contrast.graph.n_sources, contrast.graph.n_readers
    return torch.zeros(shape, dtype=wide_dtype(contrast.clean.dtype), device=contrast.clean.device)


def corrupted_final(model: ChatModel, contrast: Contrast) -> Float[Tensor, "batch pos d_model"]:
    """The corrupted run's final residual. What its components wrote is kept for an attribution that follows."""
    final, contrast.corrupted_run = _forward(model, contrast, contrast.corrupted)
    return final


def clean_and_corrupted(model: ChatModel, contrast: Contrast) -> tuple[_Run, _Run]:
    """What the components of both runs wrote."""
    return _clean_run(model, contrast), _corrupted_run(model, contrast)


def _clean_run(model: ChatModel, contrast: Contrast) -> _Run:
    """What the components of the clean run wrote. The contrast hands it out once and keeps no copy: it is large."""
    run, contrast.clean_run = contrast.clean_run, None
    return run or _forward(model, contrast, contrast.clean)[1]


def _corrupted_run(model: ChatModel, contrast: Contrast) -> _Run:
    """The same of the corrupted run."""
    run, contrast.corrupted_run = contrast.corrupted_run, None
    return run or _forward(model, contrast, contrast.corrupted)[1]


# --- one run -----------------------------------------------------------------------------------------------------


def _keep(kept: dict, sites: Sequence[str], layers: Iterable[int]) -> list:
    """Edits that only put a site's tensors into `kept`."""
    places = [(site, layer) for layer in layers for site in sites]
    return [(*place, lambda h, place=place: kept.update({place: h.detach()})) for place in places]


@torch.no_grad()
def _forward(model: ChatModel, contrast: Contrast, residual: Tensor) -> tuple[Tensor, _Run]:
    """The final residual of a run from the contrast's first block on, and what its components wrote."""
    kept, layers = {}, contrast.graph.layers
    with edit(model, _keep(kept, ("heads", "mlp_write"), layers)):
        final = resume(model, contrast.tape, contrast.graph.first, residual)
    return final, _run_of(kept, layers)


def _run_of(kept: dict, layers: Iterable[int]) -> _Run:
    heads, mlps = ({layer: kept.pop((site, layer)) for layer in layers} for site in ("heads", "mlp_write"))
    return _Run(heads, mlps)


def _backward(
    model: ChatModel,
    contrast: Contrast,
    metric: Metric,
    layer: int,
    residual: Tensor,
    sums: _Gradients,
    edits: Sequence = (),
    keep_run: bool = False,
) -> tuple[_Pull, _Run | None]:
    """Run blocks >= layer from `residual`, then the metric backwards; the gradients at every reader there are added to
    `sums` as the backward pass reaches them, so that no more than one block's stand beside the sums.
    """
    kept, arrived, pull, layers = {}, {}, _Pull(), range(layer, model.n_layers)

    def receive(site: str, i: int, gradient: Tensor) -> None:
        """Add what arrived at a block's readers to the sums, as soon as all that it needs is there."""
        arrived[site] = gradient
        if site == "mlp_input":
            norm = model.site("mlp_residual", i)[0]
            _add(sums.mlps, i, _pulled_back(norm, kept.pop(("mlp_residual", i)), arrived.pop(site)))
        elif {"q", "k", "v"} <= arrived.keys():
            at = [kept.pop((name, i)) for name in ("block_input", "q", "k", "v")]
            _through_norm(model, sums, pull, i, *at, *[arrived.pop(name) for name in ("q", "k", "v")])

    def read(site: str, i: int):
        def function(h: Tensor) -> None:
            h.register_hook(lambda gradient: receive(site, i, gradient))

        return site, i, function

    sites = ["q", "k", "v", "block_input", "mlp_residual"]
    sites += ["heads", "mlp_write"] * keep_run + ["attention_output"] * model.has_post_norms
    readers = [read(site, i) for i in layers for site in ("q", "k", "v", "mlp_input")]
    with torch.enable_grad(), edit(model, [*edits, *_keep(kept, sites, layers), *readers]):
        start = residual.detach().requires_grad_()
        final = resume(model, contrast.tape, layer, start)
        value = metric(logits_read(model, contrast, final))
    _check_metric(value, len(residual))
    run = _run_of(kept, layers) if keep_run else None
    _, last = torch.autograd.grad(value.sum(), [start, final])
    sums.final = sums.final + widened(last)
    if model.has_post_norms:
        pull.attention_outputs = {i: kept["attention_output", i] for i in layers}
    return pull, run


def _add(sums: dict[int, Tensor], layer: int, value: Tensor) -> None:
    sums[layer] = sums[layer].add_(value) if layer in sums else value


def _check_metric(value: Tensor, batch: int) -> None:
    if value.shape != (batch,):
        raise AttributionError(
            f"the metric gave shape {tuple(value.shape)} for {batch} examples; it must give one number an example."
        )
    _check_finite("the metric", value, "tokens and logits")


def _check_finite(what: str, values: Float[Tensor, "batch *rest"], look_at: str) -> None:
    bad = (~torch.isfinite(values)).flatten(1).any(1) if values.ndim > 1 else ~torch.isfinite(values)
    if bad.any():
        raise _NotFinite(what, bad.nonzero().flatten().tolist(), look_at)


def _through_norm(model: ChatModel, sums: _Gradients, pull: _Pull, layer: int, x, q, k, v, dq, dk, dv) -> None:
    """From the gradients at a block's queries, keys and values to what `_Gradients` and `_Pull` hold of them."""
    block = model.blocks[layer]
    attention, scalars = block.self_attn, []
    wide, inverse = _inverse_rms(block.input_layernorm, x)  # [batch, pos, d_model], [batch, pos, 1]
    for name, value, gradient in (("q", q, dq), ("k", k, dk), ("v", v, dv)):
        bias = getattr(attention, f"{name}_proj").bias
        projected = value if bias is None else value - bias
        products = (projected.to(wide.dtype) * gradient).unflatten(-1, (-1, attention.head_dim))
        scalars.append(products.sum(-1) * inverse.square() / model.d_model)  # [batch, pos, head]
    _add(sums.narrow, layer, torch.cat([dq, dk, dv], -1) * inverse)
    pull.residuals[layer], pull.scalars[layer] = wide, torch.cat(scalars, -1)


def _pulled_back(norm: nn.Module, at: Tensor, gradient: Tensor) -> Tensor:
    """The transposed Jacobian of a norm at a point, applied to a gradient after it: the gradient before it."""
    x, inverse = _inverse_rms(norm, at)
    scaled = norm_weight(norm, x.dtype) * gradient * inverse
    return scaled - x * (scaled * x).mean(-1, keepdim=True) * inverse.square()


def _inverse_rms(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """x in float32 at least, and 1 / RMS(x) as the norm takes it."""
    x = widened(x)
    return x, torch.rsqrt(x.square().mean(-1, keepdim=True) + _epsilon(norm))


def _epsilon(norm: nn.Module) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def norm_weight(norm: nn.Module, dtype: torch.dtype) -> Float[Tensor, " d_model"]:
    """What a norm multiplies x / RMS(x) by: its weight, or 1 + weight in Gemma's."""
    weight = norm.weight.detach().to(dtype)
    return 1 + weight if type(norm).__name__.startswith("Gemma") else weight


# --- the contraction -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Messages:
    """corrupted - clean of every source, by layer, zero where positions do not count."""

    given: Float[Tensor, "batch pos d_model"]
    heads: dict[int, Float[Tensor, "batch pos heads"]]
    mlps: dict[int, Float[Tensor, "batch pos d_model"]]
    start: int  # the first column where anything differs: a causal model has nothing to send before


def _messages(model: ChatModel, contrast: Contrast, corrupted: _Run, clean: _Run | None = None) -> _Messages:
    clean = clean or _clean_run(model, contrast)
    dtype = wide_dtype(model.dtype)
    counted = 1.0 if contrast.positions is None else contrast.positions[..., None].to(dtype)
    given = contrast.difference.to(dtype) * counted
    heads = {i: (corrupted.heads[i] - h).to(dtype) * counted for i, h in clean.heads.items()}
    mlps = {i: (corrupted.mlps[i] - h).to(dtype) * counted for i, h in clean.mlps.items()}
    columns = (contrast.difference != 0).any(-1).any(0).nonzero()
    return _Messages(given, heads, mlps, int(columns[0]) if len(columns) else given.shape[1] - 1)


def _contract(
    model: ChatModel,
    contrast: Contrast,
    sent: _Messages,
    sums: _Gradients | None,
    pulls: list[_Pull],
    scores: Tensor,
    rows: slice = slice(0, None),
) -> None:
    """Add messages . gradients to the scores of the sources in `rows` (in place).

    The gradients are the `sums`, if they are given, less what the norms took off in each of the runs `pulls`.
    """
    graph = contrast.graph
    rows = slice(rows.start, graph.n_sources if rows.stop is None else rows.stop)
    given = sent.given[:, sent.start :]
    messages = given.new_empty(rows.stop - rows.start, *given.shape[1:])  # [source, pos, d_model]
    for example in range(len(scores)):  # the messages of a batch would take more memory than all the rest
        _sources(model, graph, sent, pulls[-1], rows, example, messages)
        for pull in pulls:
            _subtract(graph, messages, pull, sent.start, example, scores[example, rows])
        if sums is None:
            continue
        flat = messages.flatten(1)  # [source, pos * d_model]
        for layers in batches(sorted(sums.narrow), BLOCKS_TOGETHER):
            seen = min(rows.stop, graph.mlp(layers[-1])) - rows.start  # some of the blocks see fewer: no edges
            if seen > 0:
                read = torch.cat([_readers(model, sums, i, sent.start, example) for i in layers])
                columns = slice(graph.readers(layers[0], "Q").start, graph.readers(layers[-1], "MLP").stop)
                scores[example, rows.start : rows.start + seen, columns] += flat[:seen] @ read.T
        scores[example, rows, -1] += flat @ sums.final[example, sent.start :].flatten()


def _subtract(graph: Graph, messages: Tensor, pull: _Pull, start: int, example: int, scores: Tensor) -> None:
    """Subtract (messages . x) scalar, the norms' part of the gradients in one run, from the scores (in place)."""
    if not pull.residuals:
        return
    layers = sorted(pull.residuals)
    x = torch.stack([pull.residuals[i][example, start:] for i in layers], 1)  # [pos, layer, d_model]
    scalars = torch.stack([pull.scalars[i][example, start:] for i in layers])  # [layer, pos, reader]
    along = messages.movedim(1, 0) @ x.transpose(1, 2)  # [pos, source, layer]
    by_layer = scores[:, :-1].unflatten(-1, (len(graph.layers), -1))  # the last reader of a layer is its MLP
    by_layer[:, layers[0] - graph.first :, :-1] -= (along.permute(2, 1, 0) @ scalars).movedim(0, 1)


def _sources(
    model: ChatModel,
    graph: Graph,
    sent: _Messages,
    pull: _Pull,
    rows: slice,
    example: int,
    out: Float[Tensor, "source pos d_model"],
) -> None:
    """Write what the sources in `rows` send in one example, in the residual stream, into `out`."""
    place = example, slice(sent.start, None)
    if rows.start == 0:
        out[0] = sent.given[place]
    for layer in graph.layers:
        heads, mlp = graph.heads(layer), graph.mlp(layer)
        if rows.start <= heads.start and heads.stop <= rows.stop:
            z = sent.heads[layer][place].unflatten(-1, (model.n_heads, -1)).movedim(1, 0)  # [head, pos, d_head]
            w = model.blocks[layer].self_attn.o_proj.weight.to(z.dtype).unflatten(-1, (model.n_heads, -1))
            message = out[heads.start - rows.start : heads.stop - rows.start]
            torch.bmm(z, w.permute(1, 2, 0), out=message)
            if model.has_post_norms:
                at = pull.attention_outputs[layer][place]
                message[:] = _norm_jacobian(model.blocks[layer].post_attention_layernorm, at, message)
        if rows.start <= mlp < rows.stop:
            out[mlp - rows.start] = sent.mlps[layer][place]


def _norm_jacobian(norm: nn.Module, at: Tensor, direction: Tensor) -> Tensor:
    """The norm's Jacobian at a point, applied to directions [.., pos, d_model] (it is symmetric up to the weight)."""
    x, inverse = _inverse_rms(norm, at)
    along = (direction * x).mean(-1, keepdim=True) * inverse.square()
    return norm_weight(norm, x.dtype) * inverse * (direction - x * along)


def _readers(
    model: ChatModel, sums: _Gradients, layer: int, start: int, example: int
) -> Float[Tensor, "reader pos_and_d_model"]:
    """Summed gradients at the readers of a block before their norm, but for what `_subtract` takes off."""
    block, place = model.blocks[layer], (example, slice(start, None))
    projections = [getattr(block.self_attn, f"{name}_proj").weight for name in ("q", "k", "v")]
    parts = sums.narrow[layer][place].split([len(weight) for weight in projections], -1)
    d_head, heads = block.self_attn.head_dim, []
    for part, weight in zip(parts, projections):
        narrow = part.unflatten(-1, (-1, d_head)).movedim(1, 0)  # [reader, pos, d_head]
        heads.append(narrow @ weight.to(narrow.dtype).unflatten(0, (-1, d_head)))
    out = torch.cat([*heads, sums.mlps[layer][place][None]])  # [reader, pos, d_model]
    out[:-1] *= norm_weight(block.input_layernorm, out.dtype)
    return out.flatten(1)


# --- many examples ---------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Attribution:
    """Scores of many examples: their signed sum, the sum of their absolute values, and what was kept of each.

    The sum of absolute values per example is what A2A's Algorithm 1 adds up; the signed sum lets examples cancel.
    """

    signed: EdgeScores
    absolute: EdgeScores
    each: np.ndarray | None = None
    n_examples: int = 0


def attribute_pairs(
    model: ChatModel,
    pairs: Sequence[tuple[str, str]],
    metric: Metric,
    points: Sequence[float] = left(5),
    each: Callable[[Graph, np.ndarray], np.ndarray] | None = None,
    path: Path | str | None = None,
    budget: int = 2 * 2**30,
) -> Attribution:
    """Attribute many (clean, corrupted) pairs of chat prompts of equal length, in batches that fit the budget.

    `each` maps the graph and the scores of a batch [batch, source, reader] to what is kept of every example, in the
    order of `pairs`. With a `path`, the sums are written there (npz) after every batch, and an interrupted run goes
    on with the examples that it lacks, under another budget too. `budget` is in bytes; a batch that shrinks to fit is
    announced. Errors name a pair by its index in `pairs`. Raises PromptError for pairs that do not align,
    AttributionError for a file of another run or values that are not finite.
    """
    if not len(pairs):
        raise AttributionError("no pairs to attribute: the list is empty after filtering.")
    aligned = align_pairs(model.tokenizer, *map(list, zip(*pairs)))  # all of them, so that errors come first
    lengths = aligned.clean.attention_mask.sum(1).numpy()
    about = {"model": model.name, "revision": model.revision, "points": list(points)}
    about |= {} if model.dtype == torch.float32 else {"dtype": str(model.dtype)}  # older files are of float32
    about |= {"pairs": hashlib.sha256(json.dumps(list(pairs)).encode()).hexdigest()[:16]}
    about |= {"metric": _name(metric), "each": each and _name(each)}
    state = _State.read(path, about, graph_of(model), np.zeros(0) if path is None else _probe(model, metric))
    done = set(state.order)
    for length in np.unique(lengths):
        rows = [i for i in np.flatnonzero(lengths == length).tolist() if i not in done]
        for job in batches(rows, batch_within(model, int(length), budget)) if rows else []:
            contrast = pair_contrast(model, *zip(*[pairs[i] for i in job]))
            try:
                state.add(job, attribute(model, contrast, metric, points), each)
            except _NotFinite as error:
                raise error.renamed(job) from None
            state.write(path, about)
    scores = [
        EdgeScores(graph_of(model), values, about | {"n": len(pairs)}) for values in (state.signed, state.absolute)
    ]
    kept = np.concatenate(state.kept)[np.argsort(state.order)] if state.kept else None
    return Attribution(*scores, kept, len(pairs))


def _name(function: Callable) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


def _probe(model: ChatModel, metric: Metric) -> Float[np.ndarray, " row"]:
    """The metric of one row of made-up logits: metrics of one name may still differ in their tokens."""
    logits = torch.linspace(0, 100, model.config.vocab_size, dtype=torch.float64).sin().to(model.device, model.dtype)
    return metric(logits[None, None]).detach().double().cpu().numpy().reshape(-1)


@dataclass(eq=False)
class _State:
    """Sums so far, the examples that are in them, in the order they were done, and what was kept of each."""

    signed: np.ndarray
    absolute: np.ndarray
    order: list[int]
    kept: list[np.ndarray]
    probe: np.ndarray  # of the metric

    @classmethod
    def read(cls, path: Path | str | None, about: dict, graph: Graph, probe: np.ndarray) -> "_State":
        """What an interrupted run left in the file, or the beginning. Raises AttributionError for another run's."""
        if path is None or not Path(path).exists():
            shape = graph.n_sources, graph.n_readers
            return cls(np.zeros(shape), np.zeros(shape), [], [], probe)
        with np.load(path, allow_pickle=False) as file:
            known, wanted = json.loads(str(file["about"])), json.loads(json.dumps(about))
            other = [name for name in sorted({*known, *wanted}) if known.get(name) != wanted.get(name)]
            if not other and not _same(file["probe"], probe):
                other = ["metric"]
            if other:
                raise AttributionError(f"{path} holds another run: other {', '.join(other)}. Give another path.")
            kept, order = [file["kept"]] if "kept" in file else [], file["order"].tolist()
            say(f"going on after {len(order)} examples ({path})")
            return cls(file["signed"], file["absolute"], order, kept, probe)

    def add(self, job: list[int], scores: EdgeScores, each) -> None:
        """Add the scores of a batch of examples."""
        if each is not None:
            self.kept.append(np.asarray(each(scores.graph, scores.values)))
        self.signed += scores.values.sum(0, dtype=np.float64)
        self.absolute += np.abs(scores.values).sum(0, dtype=np.float64)
        self.order += job

    def write(self, path: Path | str | None, about: dict) -> None:
        """Store the sums so far, if there is a path."""
        if path is None:
            return
        buffer, kept = io.BytesIO(), {"kept": np.concatenate(self.kept)} if self.kept else {}
        sums = {"signed": self.signed, "absolute": self.absolute, "order": self.order, "probe": self.probe}
        np.savez(buffer, about=json.dumps(about), **sums, **kept)
        write_bytes(path, buffer.getvalue())


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two probes are the same but for the rounding of another machine."""
    return one.shape == other.shape and np.allclose(one, other, rtol=1e-3, atol=1e-3, equal_nan=True)


def batch_within(model: ChatModel, n_tokens: int, budget: int, wanted: int = 8) -> int:
    """How many examples of `n_tokens` fit a budget of bytes: `wanted`, or fewer, which is announced.

    Raises AttributionError when not even one fits.
    """
    fits = [n for n in range(1, wanted + 1) if bytes_of_batch(model, n_tokens, n) <= budget]
    if not fits:
        raise AttributionError(
            f"one example of {n_tokens} tokens needs about {bytes_of_batch(model, n_tokens, 1) / 2**20:.0f} MiB and "
            f"the budget is {budget / 2**20:.0f} MiB: raise the budget or shorten the prompts."
        )
    if fits[-1] < wanted:
        say(f"batches of {fits[-1]} instead of {wanted}: {n_tokens} tokens an example within {budget / 2**20:.0f} MiB")
    return fits[-1]


def bytes_of_batch(model: ChatModel, n_tokens: int, n: int) -> int:
    """Estimate of the memory that `attribute` takes at its peak for `n` examples, besides the model.

    What is held of all examples throughout (what the runs sent, gradients summed over points, residual streams), and
    beside it either the activations kept for the backward pass or the messages of one example: whichever is larger.
    """
    graph, d, inner = graph_of(model), model.d_model, model.config.intermediate_size
    queries, keys = (count * model.blocks[0].self_attn.head_dim for count in (model.n_heads, model.n_groups))
    narrow, wide = (torch.finfo(dtype).bits // 8 for dtype in (model.dtype, wide_dtype(model.dtype)))
    eager = model.config._attn_implementation == "eager"
    norms = (4 if model.has_post_norms else 2) * d
    attention = 5 * queries + 2 * keys + 2 * model.n_heads * n_tokens * eager
    activations = model.n_layers * n_tokens * (norms * wide + (attention + 3 * inner) * narrow)
    held = model.n_layers * n_tokens * (3 * d + 2 * queries + 2 * keys) * wide
    scores = 2 * graph.n_sources * graph.n_readers * wide + 4 * model.config.vocab_size * narrow
    readers = 2 * BLOCKS_TOGETHER * graph.readers_per_layer  # and their copy side by side
    messages = (graph.n_sources + readers) * n_tokens * d * wide
    return n * (held + scores) + max(n * activations, messages)
