"""What attention makes of a steering vector: steering value vectors, the logit lens, and how readable they are.

With RMSNorm, what block b's attention writes in a steered run is, exactly, a part that does not read the vector s
itself plus, for every head, a number times a fixed direction, the head's steering value vector
svv = (s * g) W_V W_O with the norm's weight g (Cheng et al. 2026, section 6). Behind a norm after attention (Gemma)
that norm's weight multiplies the svv, and its scale in the steered run multiplies the number.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedTokenizerBase

from .attention import attention_patterns, drops, remove_direct
from .attribution import Contrast, Metric, _inverse_rms, logits_read, norm_weight, steering_contrast
from .judges import ratio_of_means
from .models import ChatModel, capture, edit, repeated, resume, wide_dtype, widened
from .prompts import Batch, batches
from .record import LONGEST_NAME, kept_arrays
from .steering import SteeringError, SteeringVector, check_vector, last_logits, steer, vector_key

# Fixed before any vector was looked at. A star stands for any ending.
REFUSAL_WORDS = (
    "sorry apolog* unfortunately regret* cannot unable refus* declin* deny denied denies denial reject* forbid* "
    "forbade prohibit* disallow* disapprov* inappropriate* unacceptable unethical* immoral* improper* wrong wrongful*"
).split()
DANGER_WORDS = (
    "danger* harm harms harmed harmful* harming hurt hurts hurting illegal* unlawful* illicit* crime crimes criminal* "
    "offence offences offense offenses threat* hazard* poison* toxic* weapon* gun guns explosive* bomb bombs bombing* "
    "violence violent* violat* kill kills killed killer* killing* murder* attack* assault* abuse abused abusive* "
    "abuses victim* hack hacks hacked hacker* hacking malicious* malware steal steals stealing stole stolen theft "
    "thief fraud* scam* terroris* unsafe risk risks risky warning* injur* lethal* deadly fatal* suicid* drug drugs"
).split()
WORDS = (*REFUSAL_WORDS, *DANGER_WORDS)
"""The refusal and danger words that `readable_share` counts."""


# --- steering value vectors ------------------------------------------------------------------------------


@torch.no_grad()
def steering_values(
    model: ChatModel, vector: SteeringVector, layers: Iterable[int] | None = None
) -> Float[Tensor, "layer head d_model"]:
    """The steering value vector of every head in the vector's block and all later ones (or in `layers`).

    svv = (s * g) W_V W_O, heads of a key/value group sharing W_V; times the weight of the norm after attention where
    there is one. A direction that does not depend on any input, in units of the residual stream. Raises SteeringError
    for a vector of another model, ValueError for a layer out of range.
    """
    check_vector(model, vector)
    layers = range(vector.layer, model.n_layers) if layers is None else layers
    return torch.stack([_svv(model, layer, vector.direction) for layer in layers])


@torch.no_grad()
def svv_sums(
    model: ChatModel, directions: Float[Tensor, "*some d_model"], layer: int
) -> Float[Tensor, "*some d_model"]:
    """The sum of the steering value vectors of all heads from block `layer` on, for many directions at once."""
    total = 0
    for at in range(layer, model.n_layers):
        block = model.blocks[at]
        value = _value_of(model, at, directions).flatten(-2)  # [..., head * d_head]
        written = linear(value, block.self_attn.o_proj.weight.to(value))
        total = total + (written * norm_weight(block.post_attention_layernorm, written.dtype)
                         if model.has_post_norms else written)  # fmt: skip
    return total


def _value_of(
    model: ChatModel, layer: int, direction: Float[Tensor, "*some d_model"]
) -> Float[Tensor, "*some head d_head"]:
    """(s * g) W_V of every head: what its group's value gains from s, at an RMS of 1 and without the bias."""
    norm, _ = model.site("attention_input", layer)
    weight = model.blocks[layer].self_attn.v_proj.weight
    weight = widened(weight)
    value = linear(direction.to(weight) * norm_weight(norm, weight.dtype), weight)
    return value.unflatten(-1, (model.n_groups, -1)).repeat_interleave(model.n_heads // model.n_groups, -2)


def _svv(model: ChatModel, layer: int, direction: Tensor) -> Float[Tensor, "head d_model"]:
    value, block = _value_of(model, layer, direction), model.blocks[layer]
    out = block.self_attn.o_proj.weight.unflatten(-1, (model.n_heads, -1))  # [d_model, head, d_head]
    svv = torch.einsum("he,dhe->hd", value, out.to(value))
    return svv * norm_weight(block.post_attention_layernorm, svv.dtype) if model.has_post_norms else svv


@dataclass(eq=False)
class SteeredAttention:
    """What one block's attention writes in a steered run, taken apart: rest + sum over heads of coefficient * svv."""

    rest: Float[Tensor, "batch pos d_model"]
    coefficients: Float[Tensor, "batch pos head"]
    svv: Float[Tensor, "head d_model"]

    @property
    def direct(self) -> Float[Tensor, "batch pos d_model"]:
        """The svvs' part."""
        return self.coefficients @ self.svv

    @property
    def total(self) -> Float[Tensor, "batch pos d_model"]:
        """rest + direct: exactly what attention wrote ("attention_write")."""
        return self.rest + self.direct


@torch.no_grad()
def decompose(
    model: ChatModel, batch: Batch, vector: SteeringVector, strength: float = 1.0
) -> dict[int, SteeredAttention]:
    """The exact parts of what attention writes under steering, for the vector's block and every later one.

    A head's coefficient at position n is strength * sum over keys k of pattern[n, k] / RMS(x_k), x the steered
    residual stream at the block's input (Cheng et al. 2026, eq. of section 6). `rest` is the same heads reading
    x - strength * s at the steered run's patterns and scales, value and output biases included. Columns of padding mean
    nothing.
    """
    seen = _steered_run(model, batch, vector, strength)
    return {one.layer: _parts(model, vector, one, strength) for one in seen}


@dataclass(eq=False)
class _Seen:
    """What one block's attention read and used in a steered run."""

    layer: int
    inputs: Float[Tensor, "batch pos d_model"]
    scale: Float[Tensor, "batch pos 1"]  # 1 / RMS of the inputs
    patterns: Float[Tensor, "batch head pos pos"]
    output: Float[Tensor, "batch pos d_model"]  # of o_proj


def _steered_run(model: ChatModel, batch: Batch, vector: SteeringVector, strength: float) -> list[_Seen]:
    layers = range(vector.layer, model.n_layers)
    with (  # the base run inside too: its masks serve the steered one
        attention_patterns(model, layers) as patterns,
        capture(model, "block_input", layers) as inputs,
        capture(model, "attention_output", layers) as outputs,
    ):
        contrast = steering_contrast(model, batch, vector, strength)
        resume(model, contrast.tape, vector.layer, contrast.corrupted)
    seen = []
    for layer in layers:
        scale = _inverse_rms(model.site("attention_input", layer)[0], inputs[layer])[1]
        seen.append(_Seen(layer, inputs[layer], scale, patterns[layer], outputs[layer]))
    return seen


def _read(
    patterns: Float[Tensor, "batch head pos pos"], scale: Float[Tensor, "batch pos 1"], strength: float
) -> Float[Tensor, "batch pos head"]:
    """strength * sum over keys of pattern / RMS: how much of the steered positions' 1 / RMS each head gathers."""
    gathered = patterns.to(scale) @ scale[:, None]  # [batch, head, pos, 1]
    return strength * gathered[..., 0].transpose(1, 2)


def _parts(model: ChatModel, vector: SteeringVector, seen: _Seen, strength: float) -> SteeredAttention:
    block = model.blocks[seen.layer]
    weight = norm_weight(block.input_layernorm, seen.scale.dtype)
    unsteered = seen.inputs - strength * vector.direction.to(seen.scale)  # padding too, which no real token reads
    unsteered = (unsteered * seen.scale * weight).to(seen.inputs.dtype)
    values = linear(unsteered, block.self_attn.v_proj.weight, block.self_attn.v_proj.bias)
    values = values.unflatten(-1, (model.n_groups, -1)).repeat_interleave(model.n_heads // model.n_groups, 2)
    z = torch.einsum("bhqk,bkhe->bqhe", seen.patterns, values).flatten(-2)
    rest = linear(z, block.self_attn.o_proj.weight, block.self_attn.o_proj.bias)
    coefficients = _read(seen.patterns, seen.scale, strength)
    if model.has_post_norms:
        norm = block.post_attention_layernorm
        after = _inverse_rms(norm, seen.output)[1]
        rest, coefficients = rest * after * norm_weight(norm, after.dtype), coefficients * after
    svv = _svv(model, seen.layer, vector.direction)
    return SteeredAttention(rest.to(svv.dtype), coefficients.to(svv.dtype), svv)


# --- what steering changes in attention ------------------------------------------------------------------


@dataclass(eq=False)
class AttentionRuns:
    """The base and the steered run of a batch, as attention sees them, from the vector's block on.

    `inputs` (of the blocks) and `written` (by their attention) are by run ("base", "steered") and block: [batch, pos,
    d_model]; `parts` are those of `decompose`.
    """

    batch: Batch
    vector: SteeringVector
    strength: float
    parts: dict[int, SteeredAttention]
    inputs: dict[str, dict[int, Tensor]]
    written: dict[str, dict[int, Tensor]]


@torch.no_grad()
def attention_runs(model: ChatModel, batch: Batch, vector: SteeringVector, strength: float = 1.0) -> AttentionRuns:
    """Run a batch without and with steering, for `attention_changes` and `change_by_source`."""
    parts = decompose(model, batch, vector, strength)
    inputs, written = {}, {}
    for run, factor in (("base", 0.0), ("steered", strength)):
        with (
            steer(model, vector, factor),
            capture(model, "block_input", parts) as inputs[run],
            capture(model, "attention_write", parts) as written[run],
        ):
            model.hf(**batch.inputs(), use_cache=False)
    return AttentionRuns(batch, vector, strength, parts, inputs, written)


@torch.no_grad()
def attention_changes(runs: AttentionRuns) -> pd.DataFrame:
    """What steering changes in what attention writes at the last position: a row a block (the vector's and later) and
    prompt.

    Columns: block, prompt; norms: change (of what the steered run writes less what the base run writes), direct (of the
    svvs' part, see `decompose`), rest (of the change less that part); cosine, of direct part and change; along, the
    change of the block's input along the vector, (steered - base) . s / (strength * s . s), 1 in the vector's block.
    """
    inputs, written, tables = runs.inputs, runs.written, []
    for block, part in runs.parts.items():
        change = (written["steered"][block] - written["base"][block])[:, -1]  # [prompt, d_model]
        direct = part.direct[:, -1]
        moved = (inputs["steered"][block] - inputs["base"][block])[:, -1]
        added = runs.strength * runs.vector.direction.to(moved)
        pieces = {"change": change, "direct": direct, "rest": change - direct}
        columns = {name: piece.norm(dim=-1).tolist() for name, piece in pieces.items()}
        columns["cosine"] = torch.cosine_similarity(direct, change).tolist()
        columns["along"] = (moved @ added / (added @ added)).tolist()
        tables.append(pd.DataFrame({"block": block, "prompt": range(len(runs.batch)), **columns}))
    return pd.concat(tables, ignore_index=True)


@torch.no_grad()
def change_by_source(model: ChatModel, runs: AttentionRuns) -> pd.DataFrame:
    """Where the change of what attention writes in the vector's own block comes from, at the last position: a row a
    prompt.

    "direct" is the svvs' part; "norm", what the longer stream's RMS makes of all that is not the vector, at the base
    run's patterns; "pattern", what the steered run's patterns make of that. Each is its dot product with the change;
    the three add up to "whole", the change's with itself. With a norm after attention, whose scale changes too, only
    "direct" and "whole" are given.
    """
    layer = runs.vector.layer
    part, base = runs.parts[layer], runs.written["base"][layer]
    split = {"direct": part.direct}
    if not model.has_post_norms:
        bias = model.blocks[layer].self_attn.v_proj.bias
        bias = 0.0 if bias is None else bias
        norm, _ = model.site("attention_input", layer)
        steered, unsteered = (_inverse_rms(norm, runs.inputs[run][layer])[1] for run in ("steered", "base"))
        ratio = steered / unsteered
        shrink = [("v", layer, lambda v: (bias + (v - bias) * ratio).to(v.dtype))]
        with edit(model, shrink), capture(model, "attention_write", [layer]) as seen:
            model.hf(**runs.batch.inputs(), use_cache=False)
        split |= {"norm": seen[layer] - base, "pattern": part.rest - seen[layer]}
    split["whole"] = change = runs.written["steered"][layer] - base
    dots = {name: (of[:, -1] * change[:, -1]).sum(-1).double() for name, of in split.items()}
    return pd.DataFrame({name: dot.numpy(force=True) for name, dot in dots.items()})


# --- how much of the effect each svv carries -------------------------------------------------------------


@torch.no_grad()
def svv_effects(
    model: ChatModel,
    batch: Batch,
    vector: SteeringVector,
    metric: Metric,
    strength: float = 1.0,
    folder: Path | str | None = None,
) -> tuple[Float[np.ndarray, "batch layer head"], Float[np.ndarray, " batch"]]:
    """metric(steered) - metric(steered without this head's svv), exactly, and metric(steered) - metric(base).

    One head at a time loses its svv at every position, at the steered run's patterns and scales, and all that follows
    is computed again. The first divided by the second is the share of the steering effect that goes through that
    head's svv; shares need not add up to what they do together (`remove_direct`). Layers begin with the vector's.
    `metric` maps logits of the last column to one number an example. One partial pass a head; in a `folder` every
    finished layer is kept, so that a run that was cut off goes on after it (a folder is for one metric).
    """
    reads = {
        seen.layer: _read(seen.patterns, seen.scale, strength) for seen in _steered_run(model, batch, vector, strength)
    }
    contrast = steering_contrast(model, batch, vector, strength)

    def value(layer: int, residual: Tensor) -> Tensor:
        return metric(logits_read(model, contrast, resume(model, contrast.tape, layer, residual)))

    with capture(model, "block_input", reads) as inputs:
        steered = value(vector.layer, contrast.corrupted)

    def of_heads(layer: int) -> dict[str, np.ndarray]:
        """The effects of one layer's heads, [batch, head]."""
        gained, effects = _value_of(model, layer, vector.direction), []
        for head in range(model.n_heads):
            one = torch.zeros_like(gained)
            one[head] = gained[head]
            part = (reads[layer][..., None] * one).flatten(-2)  # [batch, pos, head * d_head]
            with edit(model, [("heads", layer, lambda z, part=part: (z - part).to(z.dtype))]):
                effects.append((steered - value(layer, inputs[layer])).double().cpu().numpy())
        return {"effects": np.stack(effects, 1)}

    about = [model.revision, str(model.dtype), *vector_key(vector), strength, batch.input_ids.tolist()]
    kept = [kept_arrays(folder, [*about, layer], partial(of_heads, layer)) for layer in reads]
    whole = steered - value(vector.layer, contrast.clean)
    return np.stack([found["effects"] for found in kept], 1), whole.double().cpu().numpy()


def svv_attribution(
    model: ChatModel, batch: Batch, vector: SteeringVector, metric: Metric, strength: float = 1.0
) -> Float[np.ndarray, "batch layer head"]:
    """`svv_effects` to first order, from one backward pass: the head's svv part . the gradient in the steered run."""
    return svv_attributions(model, batch, [vector], metric, strength)[0]


def svv_attributions(
    model: ChatModel,
    batch: Batch,
    vectors: Sequence[SteeringVector],
    metric: Metric,
    strength: float = 1.0,
    together: int = 16,
) -> Float[np.ndarray, "vector batch layer head"]:
    """`svv_attribution` of many vectors of one block, `together` of them in each pass over the batch.

    Raises ValueError for no vectors, or for vectors of several blocks.
    """
    if len({vector.layer for vector in vectors}) != 1:
        raise ValueError("svv_attributions wants at least one vector, and all of one block.")
    layers, found = list(range(vectors[0].layer, model.n_layers)), []
    with attention_patterns(model, layers) as patterns:
        contrast = steering_contrast(model, batch, vectors[0], strength)
        real = batch.attention_mask[..., None].to(contrast.clean.dtype)  # padding stays as it is
        for some in batches(list(vectors), together):
            for vector in some:
                check_vector(model, vector)
            directions = torch.stack([vector.direction.to(contrast.clean) for vector in some])
            start = (contrast.clean + strength * real * directions[:, None, None]).flatten(0, 1)
            inputs, gradients = _head_gradients(model, contrast, metric, start, len(some))
            effects = []
            for layer in layers:
                scale = _inverse_rms(model.site("attention_input", layer)[0], inputs[layer])[1]
                read = _read(patterns[layer], scale, strength)
                read = read.unflatten(0, (len(some), -1))  # [vector, batch, pos, head]
                value = _value_of(model, layer, directions)  # [vector, head, d_head]
                gradient = gradients[layer].unflatten(-1, (model.n_heads, -1)).unflatten(0, (len(some), -1))
                effects.append(torch.einsum("vbph,vhe,vbphe->vbh", read, value, gradient.to(value)))
            found.append(torch.stack(effects, 2).detach().double().cpu().numpy())
    return np.concatenate(found)


def _head_gradients(
    model: ChatModel, contrast: Contrast, metric: Metric, start: Float[Tensor, "rows pos d_model"], times: int
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """By block: its input, and the metric's gradient at its heads' outputs before o_proj, in the runs that begin with
    `start`, the contrast's batch `times` over.
    """
    first, kept = contrast.graph.first, {}
    layers = range(first, model.n_layers)
    reads = [("heads", layer, lambda z, layer=layer: kept.update({layer: z})) for layer in layers]
    with torch.enable_grad(), edit(model, reads), capture(model, "block_input", layers) as inputs:
        final = resume(model, repeated(contrast.tape, times, first), first, start.detach().requires_grad_())
        logits = logits_read(model, contrast, final.unflatten(0, (times, -1)))  # [vector, batch, 1, word]
        value = sum(metric(row).sum() for row in logits)
    gradients = torch.autograd.grad(value, list(kept.values()))
    return {layer: h.detach() for layer, h in inputs.items()}, dict(zip(kept, gradients))


def svv_shares(
    effects: Float[np.ndarray, "prompt layer head"], whole: Float[np.ndarray, " prompt"], seed: int = 0
) -> Float[np.ndarray, "layer head 3"]:
    """Every head's share of the steering effect, from `svv_effects`, with its 95 % bootstrap interval over prompts.

    The last axis is (value, low, high). A share is a ratio of means, stable where one prompt hardly moves, and all
    heads are resampled together.
    """
    n = len(whole)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), 1000)  # [resample, prompt]
    drawn = np.tensordot(weights, effects, 1) / (weights @ whole)[:, None, None]
    return np.stack([effects.mean(0) / whole.mean(), *np.quantile(drawn, [0.025, 0.975], axis=0)], -1)


def largest_share(
    effects: Float[np.ndarray, "prompt layer head"], whole: Float[np.ndarray, " prompt"], seed: int = 0
) -> tuple[int, int, tuple[float, float, float]]:
    """The head with the largest share of the steering effect, and that share: (row of layers, head, share).

    It is chosen on every other prompt, and its share (value, low, high) is that on the others: on the prompts that
    chose it, the share would be flattered.
    """
    chosen = effects[::2].mean(0) / whole[::2].mean()
    row, head = np.unravel_index(chosen.argmax(), chosen.shape)
    return int(row), int(head), ratio_of_means(effects[1::2, row, head], whole[1::2], seed)


@torch.no_grad()
def share_of_all(
    model: ChatModel,
    prompts: Sequence[str],
    vector: SteeringVector,
    metric: Metric,
    strength: float = 1.0,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The share of the steering effect that all svvs together carry: what is lost when no value reads the vector
    (`remove_direct`), as (value, low, high) with the interval of `drops`.

    `metric` maps logits of the last column to one number an example.
    """

    def scores() -> np.ndarray:
        return widened(metric(last_logits(model, prompts)[:, None])).numpy(force=True)

    base = scores()
    with steer(model, vector, strength):
        steered = scores()
        with remove_direct(model, vector, strength, "values"):
            return drops(base, steered, scores(), seed=seed)["relative"]


# --- reading directions ----------------------------------------------------------------------------------


@torch.no_grad()
def lens(model: ChatModel, directions: Float[Tensor, "*some d_model"]) -> Float[Tensor, "*some vocab"]:
    """The logit lens: final norm, then unembedding, of directions of the residual stream. Their length is lost."""
    return model.unembed(directions.to(model.device, model.dtype))


def top_tokens(model: ChatModel, direction: Float[Tensor, " d_model"], k: int = 20) -> list[str]:
    """The k tokens that the logit lens puts highest, best first. For a head that works against the effect, give the
    direction's negative.
    """
    ids = lens(model, direction).topk(k).indices.tolist()
    return [model.tokenizer.decode([token]) for token in ids]


def head_words(
    model: ChatModel, directions: Float[Tensor, "layer head d_model"], spells: Bool[np.ndarray, " vocab"], k: int = 20
) -> tuple[list[list[list[str]]], Bool[np.ndarray, "layer head k"]]:
    """The k tokens that the logit lens puts highest for each head, best first, and which of them are on a list.

    `spells` says which tokens are on it, as `word_tokens` does.
    """
    best = lens(model, directions).topk(k).indices.numpy(force=True)  # [layer, head, k]
    return [[[model.tokenizer.decode([t]) for t in head] for head in row] for row in best], spells[best]


def word_rows(
    model: ChatModel,
    named: Mapping[tuple[str, str], Float[Tensor, " d_model"]],
    spells: Bool[np.ndarray, " vocab"],
    k: int = 10,
) -> pd.DataFrame:
    """The first k tokens of directions, for `record_rows`: a row a direction, which goes by (method, what is read).

    Columns: method, read, listed (of each token 1 or 0, in one text: whether `spells` has it), and the tokens, best
    first, "1" to str(k), cut where they are longer than a row may be.
    """
    lists, listed = head_words(model, torch.stack(list(named.values()))[None], spells, k)
    rows = [
        (*name, "".join(str(int(hit)) for hit in hits), *(word[:LONGEST_NAME] for word in words))
        for name, words, hits in zip(named, lists[0], listed[0])
    ]
    return pd.DataFrame(rows, columns=["method", "read", "listed", *map(str, range(1, k + 1))])


def most_effective(effects: Float[np.ndarray, "layer head"], n: int) -> list[tuple[int, int]]:
    """The n heads with the largest absolute effect, largest first: (row of layers, head)."""
    order = np.argsort(-np.abs(effects), axis=None, kind="stable")[:n]
    return [(int(row), int(head)) for row, head in zip(*np.unravel_index(order, effects.shape))]


def strongest_svvs(
    values: Float[Tensor, "vector layer head d_model"], effects: Float[np.ndarray, "vector layer head"], n: int
) -> Float[Tensor, "vector n d_model"]:
    """Each vector's n steering value vectors with the largest absolute effect, largest first."""
    order = np.argsort(-np.abs(effects).reshape(len(effects), -1), axis=1, kind="stable")[:, :n]
    return values.flatten(1, 2)[np.arange(len(order))[:, None], order]


def by_head(values: Mapping) -> tuple[Float[np.ndarray, "layer head"], int]:
    """Numbers under the names of heads ("block 18, head 3"), others left aside, as an array and its first block."""
    found = {}
    for name, value in values.items():
        if place := re.fullmatch(r"block (\d+), head (\d+)", str(name)):
            found[int(place[1]), int(place[2])] = value
    table = pd.Series(found).unstack().sort_index().sort_index(axis=1)
    return table.to_numpy(float), int(table.index[0])


def turned(
    directions: Float[Tensor, "*some d_model"], effects: Float[Tensor, "*some"] | Float[np.ndarray, "*some"]
) -> Float[Tensor, "*some d_model"]:
    """Directions, each with its sign changed where its effect is negative: all work the same way then."""
    signs = torch.where(torch.as_tensor(effects) < 0, -1.0, 1.0)
    return signs.to(directions)[..., None] * directions


def token_direction(model: ChatModel, tokens: ArrayLike) -> Float[Tensor, " d_model"]:
    """The mean unembedding row of some tokens, given by their ids, less that of the whole vocabulary."""
    weight = model.hf.get_output_embeddings().weight.detach()  # [vocab, d_model]
    some = weight[torch.as_tensor(tokens, device=weight.device)]
    return some.float().mean(0) - weight.mean(0, dtype=torch.float)


def word_tokens(tokenizer: PreTrainedTokenizerBase, n: int, words: Sequence[str] = WORDS) -> Bool[np.ndarray, " vocab"]:
    """Which of the first n token ids spell one of the words (a star: any ending), whatever their case and spaces."""
    pattern = re.compile("|".join(re.escape(word).replace(r"\*", "[a-z]*") for word in words))
    spelled = tokenizer.convert_ids_to_tokens(list(range(min(n, len(tokenizer)))))
    found = [bool(pattern.fullmatch((token or "").lower().lstrip("ġ▁_ "))) for token in spelled]
    return np.array(found + [False] * (n - len(found)))


def readable_share(
    model: ChatModel, directions: Float[Tensor, "*some d_model"], words: Sequence[str] = WORDS, k: int = 20
) -> Float[np.ndarray, "*some"]:
    """Share of refusal and danger words among the k tokens that the logit lens puts highest, for each direction.

    Raises SteeringError when no token of this model spells one of the words.
    """
    spells = word_tokens(model.tokenizer, model.config.vocab_size, words)
    if not spells.any():
        raise SteeringError(f"no token of {model.name} spells any of the {len(words)} words: give words of its own.")
    rows = directions.reshape(-1, directions.shape[-1])
    shares = [spells[lens(model, chunk).topk(k).indices.cpu().numpy()].mean(-1) for chunk in rows.split(256)]
    return np.concatenate(shares).reshape(directions.shape[:-1])


@torch.no_grad()
def word_score(
    model: ChatModel, directions: Float[Tensor, "*some d_model"], words: Sequence[str] = WORDS
) -> Float[np.ndarray, "*some"]:
    """How far the logit lens lifts the listed words: mean logit above the vocabulary's, in standard deviations of it.

    Unlike `readable_share` it sees all words of the list, also below the first k. Logits are taken before the
    family's soft cap if it has one. Mean and deviation follow from the unembedding's own mean and covariance, so that
    no logit is formed: give many directions at once. Raises SteeringError when no token spells one of the words.
    """
    weight = model.hf.get_output_embeddings().weight  # [vocab, d_model]
    spells = word_tokens(model.tokenizer, len(weight), words)
    if not spells.any():
        raise SteeringError(f"no token of {model.name} spells any of the {len(words)} words: give words of its own.")
    centred = widened(weight) - weight.mean(0, dtype=wide_dtype(weight.dtype))
    covariance = centred.T @ centred / len(centred)
    above = centred[torch.as_tensor(spells, device=weight.device)].mean(0)
    read = model.decoder.norm(directions.to(model.device, model.dtype)).to(centred)
    return (read @ above / ((read @ covariance) * read).sum(-1).sqrt()).cpu().numpy()


def random_directions(model: ChatModel, n: int, seed: int = 0) -> Float[Tensor, "n d_model"]:
    """Directions drawn uniformly, of length 1: the null that knows nothing of the model but its width."""
    noise = torch.randn(n, model.d_model, generator=torch.Generator().manual_seed(seed))
    return noise / noise.norm(dim=-1, keepdim=True)


def against_null(
    values: float | np.floating | Float[np.ndarray, "*some"], null: Float[np.ndarray, "n *some"]
) -> float | Float[np.ndarray, "*some"]:
    """p of each value among those of n null directions: (1 + number of null values >= it) / (1 + n), never 0.

    For an svv, a fair null is the same head's svv of random vectors: what this head's W_V W_O makes of anything. Raises
    ValueError for an empty null.
    """
    if not len(null):
        raise ValueError("no null values to compare with: draw some, random_directions(model, 1000).")
    return (1 + (null >= values).sum(0)) / (1 + len(null))


def most_as_good(n: int, bar: float = 0.05) -> int:
    """How many of n null directions may read as well, at most, where p (see `against_null`) is below a bar.

    -1 stands for a null that is too small: nothing can have such a p.
    """
    return int(((1 + np.arange(n)) / (1 + n) < bar).sum()) - 1


def beyond_null(p: float, better: float, bar: float) -> bool | None:
    """A verdict from a p of `against_null`: True below the bar; False where nearly all of the null does `better`.

    `better` is a share of the null, and nearly all is more than 1 less the bar. Else None: a value in the midst of the
    null is no better than chance, which is no evidence that it is worse.
    """
    return True if p < bar else False if better > 1 - bar else None


def readings(
    measures: Mapping[str, Callable[[Tensor], np.ndarray]],
    names: Iterable[str],
    places: Mapping[str, tuple[Tensor, Tensor]],
    bar: float = 0.05,
) -> pd.DataFrame:
    """How well vectors can be read in several places, each beside its own null: a row a measure, place and vector.

    `measures` map directions to a number each, as `word_score` does. `places` map what is read to the directions of the
    vectors with these `names`, in their order, and to those of null vectors: [vector or draw, ..., d_model], of which
    the mean over the axes between is taken. Columns: method (the name), measure, place, value, z, p (of
    `against_null`), better (the share of the null above the value), null_low, null_mean (the null's least and mean),
    and null_high: what p < `bar` must exceed, infinite where no value would do. z is the distance from the null's mean
    in standard deviations of the null; a null of (nearly) equal numbers has no such scale, and z is nan.
    """
    tables = []
    for measure, read in measures.items():
        for place, (of_vectors, of_null) in places.items():
            found, null = (_mean_reading(read, some) for some in (of_vectors, of_null))
            named = pd.DataFrame({"method": list(names), "measure": measure, "place": place})
            tables.append(named.assign(**_beside(found, null, bar)))
    return pd.concat(tables, ignore_index=True)


def _mean_reading(read: Callable[[Tensor], np.ndarray], directions: Tensor) -> Float[np.ndarray, " n"]:
    return read(directions).reshape(len(directions), -1).mean(1).astype(float)


def _standardised(values: Float[np.ndarray, " some"], null: Float[np.ndarray, " n"]) -> Float[np.ndarray, " some"]:
    """Distances from the null's mean in its standard deviations; nan where nearly all of the null is one number."""
    ties = np.unique(null, return_counts=True)[1].max() / len(null)
    return (values - null.mean()) / (null.std() if ties < 0.95 else np.nan)


def _beside(found: Float[np.ndarray, " vector"], null: Float[np.ndarray, " n"], bar: float) -> dict[str, ArrayLike]:
    """The numbers of `readings` for one measure and place, by column."""
    fewest = most_as_good(len(null), bar) + 1
    return {
        "value": found,
        "z": _standardised(found, null),
        "p": [against_null(value, null) for value in found],
        "better": [(null > value).mean() for value in found],
        "null_low": null.min(),
        "null_mean": null.mean(),
        "null_high": np.sort(null)[-fewest] if fewest else np.inf,
    }


def reading_gaps(
    read: Callable[[Tensor], np.ndarray],
    one: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
    coverage: float = 0.95,
) -> Float[np.ndarray, "vector 3"]:
    """How much better each vector reads in one place than in another: z - z, paired, as (value, low, high).

    `one` and `other` are places as `readings` takes them, and z is that of `readings`. Their nulls must come from **the
    same** random vectors in the same order, each of which has such a difference too: the interval holds the true
    differences for which the observed one is no further out than `coverage` of theirs. nan where a null has no spread.
    Raises ValueError for nulls that cannot be pairs.
    """
    (found_one, null_one), (found_other, null_other) = ([_mean_reading(read, of) for of in place]
                                                       for place in (one, other))  # fmt: skip
    if len(null_one) != len(null_other):
        raise ValueError(f"nulls of {len(null_one)} and {len(null_other)} draws: read the same vectors in both places.")
    chance = _standardised(null_one, null_one) - _standardised(null_other, null_other)  # [draw], of mean 0
    gap = _standardised(found_one, null_one) - _standardised(found_other, null_other)  # [vector]
    least, most = np.quantile(chance, [(1 - coverage) / 2, (1 + coverage) / 2])
    return np.stack([gap, gap - most, gap - least], -1)


def cosines_of_random_pairs(
    cosine: float, drawn: Float[Tensor, "draw d_model"], mapped: Float[Tensor, "draw out"]
) -> Float[np.ndarray, " draw"]:
    """Cosines after a linear map of random pairs of vectors that had the given cosine before it.

    `drawn` are random vectors, `mapped` what the map makes of them. Each is paired with a mixture of itself and the one
    before it, whose image is the mixture of theirs. A null for two vectors that are more alike after the map than
    before, as any map may draw vectors together.
    """
    length = drawn.double().norm(dim=-1, keepdim=True)
    start, mapped = drawn.double() / length, mapped.double() / length.to(mapped.device)
    overlap = (start * start.roll(1, 0)).sum(1, keepdim=True).to(mapped)  # with its partner, not quite 0
    aside = (mapped.roll(1, 0) - overlap * mapped) / (1 - overlap**2).sqrt()  # the partner's image, as if it were 0
    second = cosine * mapped + max(0.0, 1 - cosine**2) ** 0.5 * aside
    return torch.cosine_similarity(mapped, second, dim=1).numpy(force=True)
