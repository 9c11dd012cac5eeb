"""Steering: a vector with its meaning, applying it, generating under it, and sweeping it over layers."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import Cache, DynamicCache

from .models import STEERED, ChatModel, Tape, edit, hooked, prefix_of, repeated, resume, steered, tape, widened
from .prompts import Batch, PromptError, batches, encode, not_empty, padded_after, shared_first
from .record import write_bytes

# Columns relative to the end of the prompt: column -1 is the prompt's last token, column 0 the first new one.
POSITIONS = {"all": slice(None), "prompt": slice(None, 0), "generated": slice(0, None)}
OPERATIONS = ("add", "ablate")


class SteeringError(ValueError):
    """A steering vector or setting that does not fit; the message says what to do."""


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction in the residual stream and all that one must know to use it.

    `layer` is the block at whose **input** the vector is added. `direction` has its natural norm (for DIM, that
    of the mean difference), so a strength of 1 adds the direction as it was found.
    """

    direction: Float[Tensor, " d_model"]
    layer: int
    method: str
    model: str
    revision: str
    operation: str = "add"
    sign: str = "positive strength induces refusal"
    read_at: str = "last prompt token"
    site: str = "block_input"

    @property
    def norm(self) -> float:
        """Euclidean length of the direction, in units of the residual stream."""
        return self.direction.norm().item()

    def at(self, layer: int) -> "SteeringVector":
        """The same direction, applied at another block's input."""
        return replace(self, layer=layer)

    def save(self, path: Path | str) -> Path:
        """Write a safetensors file whose metadata say what the vector means; the old file stays until it is whole."""
        words = {f.name: str(getattr(self, f.name)) for f in fields(self) if f.name != "direction"}
        words |= {
            "norm": repr(self.norm),
            "dtype": str(self.direction.dtype),
            "format": "steerutils vector 1",
        }
        return write_bytes(path, save({"direction": self.direction.detach().cpu().contiguous()}, metadata=words))


def load_vector(path: Path | str, model: ChatModel) -> SteeringVector:
    """Read a saved vector for `model`.

    Raises SteeringError when the file is no vector file, was made on another model or revision, or has another width.
    """
    try:
        with safe_open(path, "pt") as file:
            words, direction = dict(file.metadata() or {}), file.get_tensor("direction")
    except Exception as error:  # safetensors raises its own error types and OSError
        raise SteeringError(
            f"{path} is not a steering vector file: {error}. Save one with vector.save(path)."
        ) from error
    known = {f.name for f in fields(SteeringVector)} - {"direction"}
    if missing := known - set(words):
        raise SteeringError(
            f"{path} does not say its {', '.join(sorted(missing))}; make it anew with vector.save(path)."
        )
    words = {name: words[name] for name in known}
    vector = SteeringVector(direction=direction, **(words | {"layer": int(words["layer"])}))
    check_vector(model, vector)
    return vector


def vector_key(vector: SteeringVector) -> list:
    """All of a vector that decides what it does to a run, for `kept_arrays`.

    Usual values of operation and site are left out, so that what was kept before there were others is still found.
    """
    key, unusual = [vector.layer, vector.direction.tolist()], (vector.operation, vector.site)
    return key if unusual == ("add", "block_input") else [*key, *unusual]


def check_vector(model: ChatModel, vector: SteeringVector) -> None:
    """Raise SteeringError when the vector was not made for this model, or asks for something unknown."""
    short = [name.rstrip("/").split("/")[-1] for name in (vector.model, model.name)]  # its folder may have moved
    if short[0] != short[1] or vector.revision != model.revision:
        raise SteeringError(
            f"the vector was made on {vector.model} ({vector.revision}), not on {model.name} ({model.revision}): "
            "directions of one model mean nothing in another. Make it anew on this model."
        )
    if vector.direction.shape != (model.d_model,):
        raise SteeringError(
            f"the vector has shape {tuple(vector.direction.shape)}; {model.name} needs ({model.d_model},)."
        )
    if vector.operation not in OPERATIONS:
        raise SteeringError(f"unknown operation {vector.operation!r}; the operations are {', '.join(OPERATIONS)}.")
    if not torch.isfinite(vector.direction).all() or vector.norm == 0:
        raise SteeringError("the vector is zero or not finite; look at the prompts it was made from.")
    model.site(vector.site, vector.layer)


# --- applying a vector -----------------------------------------------------------------------------------


def add(h: Tensor, direction: Tensor, strength: Tensor | float) -> Tensor:
    """h + strength * direction; a strength per row is [batch, 1, 1]."""
    return h + (strength * direction).to(h.dtype)


def ablate(h: Tensor, direction: Tensor, strength: Tensor | float) -> Tensor:
    """Take out the component along the direction: h - strength * r (r . h), r of unit length (Arditi et al. 2024)."""
    broad = widened(h)  # in bfloat16 twice as much of the component would stay
    r = direction.to(broad) / direction.to(broad).norm()
    return (broad - strength * (broad @ r).unsqueeze(-1) * r).to(h.dtype)


@contextmanager
def steer(
    model: ChatModel,
    vector: SteeringVector,
    strength: float | Sequence[float] = 1.0,
    positions: str | slice = "all",
    prompt_length: int | None = None,
):
    """Steer every forward pass and generation in the `with` body.

    `strength` is one number or one per row of the batch. `positions` is "all", "prompt", "generated", or a
    slice of columns counted from the end of the prompt: `slice(-1, None)` begins at the last prompt token. The
    prompt is what the first pass without a cache sees, unless `prompt_length` says otherwise (for
    teacher-forced responses). An added vector acts at its layer's input; an ablated one at every block's input
    and at all that attention and MLPs write. Raises SteeringError for a vector of another model, and, on
    leaving, when no token was touched.
    """
    check_vector(model, vector)
    columns = _Columns(_as_slice(positions), prompt_length)
    direction = vector.direction.to(model.device, model.dtype)
    if np.ndim(strength):  # in float32, so that a row's strength is not rounded where another's is not
        strength = torch.as_tensor(strength, device=model.device, dtype=torch.float32)[:, None, None]
    operation = {"add": add, "ablate": ablate}[vector.operation]

    def change(h):
        """Add or ablate at the selected columns of [batch, pos, d_model]; None where none is selected."""
        if np.ndim(strength) and len(strength) != len(h):
            raise SteeringError(
                f"{len(strength)} strengths for a batch of {len(h)} rows: give one number, or one a row, and a "
                "batch_size that keeps all rows in one batch."
            )
        first, last = columns.selected(h.shape[1])
        if first >= last:
            return None
        if last - first == h.shape[1]:
            return operation(h, direction, strength)
        return torch.cat([h[:, :first], operation(h[:, first:last], direction, strength), h[:, last:]], 1)

    places = [(vector.site, vector.layer)]
    if vector.operation == "ablate":
        sites = ("block_input", "attention_write", "mlp_write")
        places = [(site, layer) for layer in range(model.n_layers) for site in sites]
    clock = model.decoder.register_forward_pre_hook(columns.tick, with_kwargs=True)
    setattr(model.hf, STEERED, getattr(model.hf, STEERED, 0) + 1)
    try:
        with edit(model, [(site, layer, change) for site, layer in places]):
            yield
    finally:
        setattr(model.hf, STEERED, getattr(model.hf, STEERED) - 1)
        clock.remove()
    if not columns.touched:
        raise SteeringError(
            f"steering touched no token: no forward pass reached positions {positions!r}. Generate inside the "
            "`with` block, or give prompt_length when the batch holds the response too."
        )


def _as_slice(positions: str | slice) -> slice:
    if isinstance(positions, slice):
        return positions
    if positions not in POSITIONS:
        raise SteeringError(f"unknown positions {positions!r}: give {', '.join(POSITIONS)} or a slice.")
    return POSITIONS[positions]


class _Columns:
    """Which columns of the running forward pass are selected; with a cache, a pass sees only the newest."""

    def __init__(self, wanted: slice, prompt_length: int | None):
        self.wanted, self.given, self.prompt = wanted, prompt_length, prompt_length
        self.start, self.touched, self.ticked = 0, 0, False

    def tick(self, _, args, kwargs) -> None:
        """Before each forward pass of the decoder: how far it is into the text."""
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        cache = kwargs.get("past_key_values")
        cached = cache.get_seq_length() if cache is not None else 0
        if not cached:
            self.prompt = tokens.shape[1] if self.given is None else self.given
        self.start, self.ticked = cached - (self.prompt or 0), True

    def selected(self, width: int, before: int = 0) -> tuple[int, int]:
        """First and one-past-last selected of `width` columns, the first `before` of them earlier than the pass."""
        start = self.start - before
        low = 0 if self.wanted.start is None else self.wanted.start - start
        high = width if self.wanted.stop is None else self.wanted.stop - start
        first = max(0, low)
        last = max(first, min(width, high))  # a negative end would count from the other side
        self.touched += last - first
        return first, last


# --- generating ------------------------------------------------------------------------------------------


def rows_at_once(model: ChatModel) -> int:
    """How many answers are generated side by side: on a GPU many take hardly longer than a few.

    On a processor 128 take nine tenths of the time of twice 64, and more would share less below the steered blocks.
    """
    return 1024 if model.device.type == "cuda" else 128


@torch.no_grad()
def generate(
    model: ChatModel, prompts: Sequence[str], max_new_tokens: int = 24, batch_size: int | None = None
) -> list[str]:
    """Greedy answers to chat prompts, without special tokens (inside `steer`, steered ones)."""
    chunks = batches(list(prompts), batch_size or rows_at_once(model))
    return [answer for chunk in chunks for answer in _greedy(model, chunk, max_new_tokens)]


def _greedy(model: ChatModel, prompts: list[str], max_new_tokens: int) -> list[str]:
    return _go_on(model, encode(model.tokenizer, prompts, device=model.device), max_new_tokens)[0]


def _go_on(model: ChatModel, batch: Batch, max_new_tokens: int, cache: Cache | None = None) -> tuple[list[str], Tensor]:
    """Greedy answers to prompts, whose first tokens a cache may hold, and the logits of the answers' first tokens."""
    kept = []

    def take(_, args, output):
        """Keep the logits of the first pass alone."""
        if not kept:
            kept.append(output.logits[:, -1].clone())

    hook = model.hf.register_forward_hook(take)
    try:
        tokens = model.hf.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            num_beams=1,  # some models' own defaults are no longer greedy
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=model.tokenizer.pad_token_id,
        )
    finally:
        hook.remove()
    return model.tokenizer.batch_decode(tokens[:, batch.prompt_length :], skip_special_tokens=True), kept[0]


@torch.no_grad()
def steered_answers(
    model: ChatModel,
    prompts: Sequence[str],
    settings: Sequence[tuple[SteeringVector, float]],
    max_new_tokens: int = 24,
    batch_size: int | None = None,
) -> Iterator[tuple[list[str], Float[Tensor, "prompt vocab"]]]:
    """Under one (vector, strength) after another: greedy answers to all prompts, and the logits of their first tokens.

    Vectors are added at all positions. Below a vector's block nothing changes, so there the prompts run once for all
    settings, and the first tokens that all prompts share (the chat template's) run in one row. Kept in memory until the
    end: the prompts' keys and values, and their residual streams at the settings' blocks. Call it outside `steer`,
    which would act twice. Unless `batch_size` is given, a GPU takes more rows at once. Raises SteeringError for an
    ablation or inside `steer`, PromptError for no prompts.
    """
    _unsteered(model)
    for vector, _ in settings:
        check_vector(model, vector)
        if vector.operation != "add":
            raise SteeringError("answers over a grid share the blocks below the vector, which an ablation changes; "
                                "use generate inside steer.")  # fmt: skip
    if not len(prompts):
        raise PromptError("no prompts to answer: the list is empty after filtering.")
    layers = {vector.layer for vector, _ in settings}
    batch_size = batch_size or rows_at_once(model)
    runs = [run_shared(model, chunk, layers, max_new_tokens, 1) for chunk in batches(list(prompts), batch_size)]
    for group in batches(list(settings), max(1, batch_size // len(prompts))):
        around, done = partial(_steer_rows, model, group), []
        for run in runs:
            texts, logits = answers_from(model, run, _lowest(group), max_new_tokens, len(group), around)
            done.append(list(zip(batches(texts, len(run.batch)), logits.split(len(run.batch)), strict=True)))
        for parts in zip(*done, strict=True):  # of one setting, by batch of prompts
            yield [text for texts, _ in parts for text in texts], torch.cat([logits for _, logits in parts])


@dataclass(eq=False)
class SharedRun:
    """An unsteered pass over prompts: their shared first tokens once, in one row, then the rest of every prompt."""

    batch: Batch
    start: Tape | None  # nothing where the prompts share no first token
    rest: Tape
    filled: Cache  # keys and values of both, in every row


def run_shared(
    model: ChatModel, prompts: list[str], layers: set[int], new_tokens: int = 0, hold_back: int = 0, share: bool = True
) -> SharedRun:
    """Run prompts as the model is, but for the last `hold_back` tokens, with which generation begins.

    Of the residual streams only those at `layers` are kept. Without `share` no first token is shared: every row has all
    of its tokens, so that rows may be steered by different strengths.
    """
    batch = encode(model.tokenizer, prompts, device=model.device)
    shared = shared_first(batch, hold_back + 1) if share and _fits_window(model, batch, new_tokens) else 0
    batch = padded_after(batch, shared)
    inputs = batch.inputs()
    cache, start = DynamicCache(config=model.config), None
    if shared:
        start = tape(model, {"input_ids": batch.input_ids[:1, :shared], "past_key_values": cache})
        cache.batch_repeat_interleave(len(batch))
    end = batch.input_ids.shape[1] - hold_back
    inputs = {name: value[:, shared:end] for name, value in inputs.items()}
    inputs["attention_mask"] = batch.attention_mask[:, :end]
    rest = tape(model, inputs | {"past_key_values": cache})
    for part in filter(None, (start, rest)):
        part.residuals = [h if layer in layers else None for layer, h in enumerate(part.residuals)]
    return SharedRun(batch, start, rest, cache)


@contextmanager
def _steer_rows(model: ChatModel, group: list[tuple[SteeringVector, float]], rows: int):
    """Steer the first `rows` rows by the first setting, the next ones by the second, and so on."""
    with ExitStack() as stack:
        for i, (vector, strength) in enumerate(group):
            each = [strength if row // rows == i else 0.0 for row in range(rows * len(group))]
            stack.enter_context(steer(model, vector, strength if len(group) == 1 else each))
        yield


def _lowest(group: list[tuple[SteeringVector, float]]) -> int:
    return min(vector.layer for vector, _ in group)


def prompts_from(
    model: ChatModel, run: SharedRun, lowest: int, times: int = 1, around: Callable = nullcontext
) -> tuple[Float[Tensor, "row pos d_model"], Cache]:
    """The prompts `times` over, changed by hooks of blocks >= `lowest`: the final residual of their rest, and the
    cache.

    Only those blocks run, and of the shared first tokens only one row each time; the cache holds no other blocks.
    `around(rows)` is entered around each of the two passes, given how many rows it has each time.
    """
    cache = DynamicCache(config=model.config)
    for part in filter(None, (run.start, run.rest)):
        again = repeated(part, times, lowest)
        again.arguments = [given | {"past_key_values": cache} for given in again.arguments]
        residual = part.residuals[lowest]  # [prompt, pos, d_model]
        with around(len(residual)):
            final = resume(model, again, lowest, residual.repeat(times, 1, 1))
        if part is run.start:
            for layer in cache.layers[lowest:]:
                layer.batch_repeat_interleave(len(run.batch))
    return final, cache


def answers_from(
    model: ChatModel, run: SharedRun, lowest: int, n: int, times: int = 1, around: Callable = nullcontext
) -> tuple[list[str], Float[Tensor, "row vocab"]]:
    """Greedy answers to prompts, as `prompts_from` has them, and the logits of their first tokens."""
    _, cache = prompts_from(model, run, lowest, times, around)
    batch = run.batch
    every = Batch(*(x.repeat(times, 1) for x in (batch.input_ids, batch.attention_mask)), batch.prompt_length)
    cache.layers[:lowest] = [copy.copy(layer) for layer in run.filled.layers[:lowest]]
    for layer in cache.layers[:lowest]:
        layer.keys, layer.values = (x.repeat(times, 1, 1, 1) for x in (layer.keys, layer.values))
    with around(len(batch)):
        return _go_on(model, every, n, cache)


def generate_grid(
    model: ChatModel,
    prompts: Sequence[str],
    settings: Sequence[tuple[SteeringVector, float]],
    max_new_tokens: int = 24,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """The answers of `steered_answers` as a table, under its conditions.

    Columns: setting (index into `settings`), layer, strength, prompt (index), answer.
    """
    by_layer = sorted(range(len(settings)), key=lambda s: settings[s][0].layer)  # neighbours share more blocks
    found = steered_answers(model, prompts, [settings[s] for s in by_layer], max_new_tokens, batch_size)
    rows = [
        (s, settings[s][0].layer, settings[s][1], prompt, text)
        for s, (texts, _) in zip(by_layer, found)
        for prompt, text in enumerate(texts)
    ]
    table = pd.DataFrame(rows, columns=["setting", "layer", "strength", "prompt", "answer"])
    return table.sort_values(["setting", "prompt"], ignore_index=True)


# --- forward scores --------------------------------------------------------------------------------------


@torch.no_grad()
def last_logits(model: ChatModel, prompts: Sequence[str], batch_size: int = 32) -> Float[Tensor, "prompt vocab"]:
    """Logits of the first answer token of each prompt (inside `steer`, steered ones).

    Raises PromptError for no prompts.
    """
    rows = []
    for chunk in batches(not_empty(prompts), batch_size):
        batch = encode(model.tokenizer, chunk, device=model.device)
        rows.append(model.hf(**batch.inputs(), use_cache=False, logits_to_keep=1).logits[:, -1])
    return torch.cat(rows)


@torch.no_grad()
def prompt_inputs(model: ChatModel, batch: Batch, last: int = 1) -> dict:
    """Arguments of a pass over prompts that is read at its `last` columns: the first tokens that all share have run.

    They run in one row. Where hooks act on the model, in `steer` or `edit`, they may count columns, and the whole
    prompts are passed.
    """
    shared = 0 if hooked(model) or not _fits_window(model, batch) else shared_first(batch, last)
    if not shared:
        return batch.inputs()
    batch = padded_after(batch, shared)
    inputs = {name: value[:, shared:] for name, value in batch.inputs().items()}
    prefix = prefix_of(model, batch.input_ids[:1, :shared])
    return inputs | {"attention_mask": batch.attention_mask, "past_key_values": prefix}


def _unsteered(model: ChatModel) -> None:
    """Raise SteeringError inside `steer`, whose vector would act beside the ones that are tried."""
    if steered(model):
        raise SteeringError("this steers by itself: call it outside the `with steer(...)` block.")


def _fits_window(model: ChatModel, batch: Batch, new_tokens: int = 0) -> bool:
    """Whether a sliding window, which counts columns, may have padding between tokens: it sees the whole text."""
    window = getattr(model.config, "sliding_window", None) or math.inf
    return batch.input_ids.shape[1] + new_tokens <= window


@torch.no_grad()
def sweep(
    model: ChatModel,
    vectors: Sequence[SteeringVector],
    prompts: Sequence[str],
    strengths: Sequence[float],
    score: Callable[[Float[Tensor, "prompt vocab"]], Float[Tensor, " prompt"]],
    batch_size: int = 32,
) -> pd.DataFrame:
    """Score the first answer token of every prompt under every vector and strength, added at all positions.

    Below a vector's layer nothing changes, so that part runs once for all, and the first tokens that all prompts share
    (the chat template's) run in one row: over all layers this takes a third to half of the time of separate runs. Call
    it outside `steer`, which would act twice. A table with the columns layer, strength, prompt (index), score. Raises
    PromptError for no prompts, SteeringError for no vectors, an ablating one, or inside `steer`.
    """
    _unsteered(model)
    if not len(vectors) or not len(strengths):
        raise SteeringError("nothing to sweep: give at least one vector and one strength.")
    for vector in vectors:
        check_vector(model, vector)
        if vector.operation != "add":
            raise SteeringError("sweep shares the blocks below the vector, which an ablation changes; use steer.")
    pieces = []
    for number, chunk in enumerate(batches(not_empty(prompts), batch_size)):
        for layer, strength, logits in _swept_logits(model, vectors, strengths, chunk):
            index = np.arange(len(chunk)) + number * batch_size
            scores = score(logits).double().cpu().numpy()
            pieces.append(pd.DataFrame({"layer": layer, "strength": strength, "prompt": index, "score": scores}))
    return pd.concat(pieces, ignore_index=True)


def _swept_logits(model, vectors, strengths, prompts) -> Iterator[tuple[int, float, Tensor]]:
    run = run_shared(model, prompts, {vector.layer for vector in vectors})
    for vector in vectors:
        for strength in strengths:
            with steer(model, vector, strength):
                final, _ = prompts_from(model, run, vector.layer)
            yield vector.layer, strength, model.unembed(final[:, -1])


def random_like(vector: SteeringVector, seed: int) -> SteeringVector:
    """A control: a random direction of the same norm at the same place."""
    noise = torch.randn(vector.direction.shape, generator=torch.Generator().manual_seed(seed))
    direction = noise / noise.norm() * vector.norm
    return replace(vector, direction=direction, method=f"random {seed}", sign="none")


def relative_strength(model: ChatModel, vector: SteeringVector, prompts: Sequence[str]) -> float:
    """The vector's norm over the mean norm of the residual stream where it is added (0 to about 1: a nudge)."""
    taken = tape(model, encode(model.tokenizer, list(prompts), device=model.device).inputs())
    typical = taken.residuals[vector.layer][:, -1].norm(dim=-1).mean().item()
    return vector.norm / typical if typical else math.inf
