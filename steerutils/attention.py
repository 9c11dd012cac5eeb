"""Attention freezing: what of steering goes through attention patterns, through values, through the MLPs.

A base and a steered run go side by side over the same tokens, each with its own cache; at chosen blocks and positions
one of them is given the other's attention patterns (QK) or values (OV) (Cheng et al. 2026, section 5). Hugging Face's
`AttentionInterface` lets one function see patterns and values of every family.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from numpy.typing import ArrayLike
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache

from .attribution import _inverse_rms, norm_weight
from .judges import (
    bootstrap,
    judge,
    paired_difference,
    ratio_of_means,
    read_prompts,
    refusal_score,
    refusal_tokens,
    share_of_answers,
)
from .models import ChatModel, ModelError, _on_input, edit
from .record import kept_arrays
from .steering import (
    SharedRun,
    SteeringError,
    SteeringVector,
    _as_slice,
    _Columns,
    answers_from,
    check_vector,
    generate,
    last_logits,
    prompts_from,
    run_shared,
    steer,
    vector_key,
)

Patterns = Float[Tensor, "batch head query key"]
Values = Float[Tensor, "batch group key d_head"]
Attending = Callable[[int, Patterns, Values], tuple[Patterns, Values] | None]

PARTS = ("patterns", "values", "both")
READERS = ("values", "mlp")
# name -> (the context, its first argument, whether the base run receives)
_CONTEXTS = {
    "steered": None,
    "patterns frozen": ("freeze", "patterns", False),
    "values frozen": ("freeze", "values", False),
    "both frozen": ("freeze", "both", False),
    "svv removed": ("remove", "values", False),
    "direct MLP removed": ("remove", "mlp", False),
    "steered patterns only": ("freeze", "patterns", True),
    "steered values only": ("freeze", "values", True),
}
INTERVENTIONS = tuple(_CONTEXTS)
APART = 8  # prompts of one strength from which on they are a batch of their own: fewer take hardly longer than one

# --- seeing and changing what attention uses -------------------------------------------------------------

IMPLEMENTATION = "steerutils_eager"
_ASKED: WeakKeyDictionary[nn.Module, Attending] = WeakKeyDictionary()  # attention module -> who sees it


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    """The family's own eager attention, so soft caps and scales are its own; redone if what it uses was replaced."""
    if attention_mask is None or attention_mask.dtype == torch.bool:  # a mask made for another form: not causal here
        raise SteeringError("the run's masks were made outside this `with` body (a tape?): begin it inside.")
    eager = sys.modules[type(module).__module__].eager_attention_forward
    output, patterns = eager(module, query, key, value, attention_mask, **kwargs)
    changed = _ASKED[module](module.layer_idx, patterns, value)
    if changed is None:
        return output, patterns
    patterns, value = changed
    output = patterns @ value.repeat_interleave(module.num_key_value_groups, 1)
    return output.transpose(1, 2).contiguous(), patterns


AttentionInterface.register(IMPLEMENTATION, _attention)
# Without a mask function of the same name, transformers makes no mask: attention would see the future.
AttentionMaskInterface.register(IMPLEMENTATION, AttentionMaskInterface()["eager"])


@contextmanager
def attending(model: ChatModel, function: Attending):
    """Run the `with` body with `function(layer, patterns, values)` called in every block's attention.

    It sees the softmaxed patterns [batch, head, query, key] and the values [batch, group, key, d_head], cached ones
    included, and returns None or what to use in their place. Attention is computed in its eager form meanwhile.
    Raises ModelError in train mode, SteeringError inside another such body.
    """
    modules = [block.self_attn for block in model.blocks]
    if model.hf.training:
        raise ModelError(f"{model.name} is in train mode, where dropout changes every result; call model.hf.eval().")
    if modules[0] in _ASKED:
        raise SteeringError("attention is already frozen or read here: leave that `with` body first.")
    configs = {id(c): c for c in [model.decoder.config, *(module.config for module in modules)]}.values()
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = IMPLEMENTATION
        _ASKED.update(dict.fromkeys(modules, function))
        yield
    finally:
        for config, name in zip(configs, before):
            config._attn_implementation = name
        for module in modules:
            _ASKED.pop(module, None)


@contextmanager
def attention_patterns(model: ChatModel, layers: Iterable[int] | None = None):
    """Collect attention patterns: a dict, layer -> [batch, head, query, key] of the last forward pass in the body."""
    layers = range(model.n_layers) if layers is None else set(layers)
    taken: dict[int, Tensor] = {}

    def keep(layer: int, patterns: Tensor, values: Tensor) -> None:
        if layer in layers:
            taken[layer] = patterns.detach()

    with attending(model, keep):
        yield taken


# --- freezing --------------------------------------------------------------------------------------------


@contextmanager
def freeze(
    model: ChatModel,
    part: str,
    layers: Iterable[int] | None = None,
    positions: str | slice = "all",
    prompt_length: int | None = None,
    reverse: bool = False,
):
    """Give the steered run the attention patterns or values that the base run has on the same tokens.

    `with steer(model, vector, 1.0), freeze(model, "patterns"): generate(...)`, in either order. In every forward pass
    of the body, each decoding step included, the model as it is runs beside the steered one on the tokens of the
    steered text: without any hook of the blocks, with a cache of its own, from the first block that a hook acts in
    (below it the two are one) to the last one that it is needed for. `part` is "patterns" (QK freeze), "values" (OV
    freeze) or "both". With `reverse` it is the base run that receives the steered run's part, and its logits come out:
    the unsteered model with nothing of the steering but that. `layers` are the blocks where it happens (all).
    `positions` as in `steer`: queries whose patterns, or keys whose values, are exchanged. A pass may be resumed
    (`resume`) at the first block that a hook acts in, or below it, if all positions are meant.

    Raises SteeringError for an unknown part or positions, a text begun outside the body, a pass that begins too late,
    and, on leaving, when nothing was exchanged; ValueError for a layer out of range.
    """
    if part not in PARTS:
        raise SteeringError(f"unknown part {part!r} of attention: give {', '.join(PARTS)}.")
    layers = _checked(model, range(model.n_layers) if layers is None else layers)
    columns = _Columns(_as_slice(positions), prompt_length)
    exchange = _Exchange(model, part, layers, columns, reverse)
    with ExitStack() as stack:
        stack.enter_context(attending(model, exchange.attend))
        stack.callback(model.decoder.register_forward_pre_hook(columns.tick, with_kwargs=True).remove)
        stack.callback(exchange.remove)
        exchange.add()
        yield
    if not columns.touched:
        raise SteeringError(
            f"freezing touched nothing: no forward pass reached positions {positions!r} in the blocks given. "
            "Generate inside the `with` block, or give prompt_length when the batch holds the response too."
        )


def _checked(model: ChatModel, layers: Iterable[int]) -> set[int]:
    layers = set(layers)
    for layer in layers:
        model.site("block_input", layer)  # raises when out of range
    return layers


class _Exchange:
    """Two runs side by side, block by block: the giver's patterns and values are kept, then the receiver takes them."""

    def __init__(self, model: ChatModel, part: str, layers: set[int], columns: _Columns, reverse: bool):
        self.model, self.part, self.layers, self.columns, self.reverse = model, part, layers, columns, reverse
        self.phase = None  # "give" or "take" while a pass runs
        self.next = 0  # the block that the running pass comes to next
        self.given: dict[int, tuple[Tensor, Tensor]] = {}
        self.first = 0  # the block where the two runs part
        self.last = model.n_layers - 1 if reverse else max(layers, default=-1)  # after it the base run is not needed
        self.base = None  # the base run's residual stream
        self.cache = None  # its cache
        self.follows = None  # the steered run's cache that it belongs to
        self.handles = []

    def add(self) -> None:
        """Hook the model: at a block's input before any other hook, so that what others do there is not in it yet."""
        for layer, block in enumerate(self.model.blocks):
            enter, leave = partial(self.enter, layer), partial(self.leave, layer)
            self.handles.append(block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            self.handles.append(block.register_forward_hook(leave, with_kwargs=True))

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self.handles:
            handle.remove()

    def begin(self, layer: int, rows: int, cache: Cache | None) -> None:
        """A pass comes to its first block."""
        self.first = self._parting()
        counted, self.columns.ticked = self.columns.ticked, False
        if layer > self.first or not (counted or self.columns.wanted == slice(None)):
            raise SteeringError(
                f"a pass began at block {layer}, and blocks from {self.first} on differ: only whole forward passes can "
                "be frozen, and at all positions those that are resumed where the two runs are still one."
            )
        if cache is None or not cache.get_seq_length(layer):
            self.cache = None if cache is None else DynamicCache(config=self.model.decoder.config)
        elif cache is not self.follows:
            raise SteeringError(
                "this text's cache was begun outside the freezing body (or copied), so the base run has not seen its "
                "start: run the text from its first token inside."
            )
        else:
            self._stretch(rows)
        self.follows = cache
        self.phase = "give" if self.reverse else "take"

    def _stretch(self, rows: int) -> None:
        """Give every row the start that all rows share, which may have run in one."""
        for held in self.cache.layers[self.first : self.last + 1]:
            if not held.is_initialized or rows % len(held.keys):
                raise SteeringError(
                    "the base run has not seen the start of this text: keep hooks and rows as they are."
                )
            if rows != len(held.keys):
                held.batch_repeat_interleave(rows // len(held.keys))

    def _parting(self) -> int:
        """The first block that anybody else's hook acts in; with none at all, the first one to freeze."""
        own = {handle.id for handle in self.handles}
        acts = lambda m: (m._forward_pre_hooks.keys() | m._forward_hooks.keys()) - own  # noqa: E731
        found = (layer for layer, block in enumerate(self.model.blocks) if any(map(acts, block.modules())))
        return next(found, min(self.layers, default=0))

    def enter(self, layer: int, block: nn.Module, args, kwargs) -> None:
        """At a block's input: the base run parts from the steered one, or gives."""
        stream = args[0] if args else kwargs["hidden_states"]
        if layer != self.next or self.phase is None:
            self.begin(layer, len(stream), kwargs.get("past_key_values"))
        self.next = None  # until it leaves the block: a pass that fails there is not gone on with
        if layer == self.first:
            self.base = stream
        if not self.reverse:
            self._base_block(layer, kwargs)

    def leave(self, layer: int, block: nn.Module, args, kwargs, output):
        """After a block: in reverse the base run receives, and after the last one what it computed is the result."""
        if self.reverse:
            self._base_block(layer, kwargs)
        self.next = layer + 1
        if self.next < self.model.n_layers:
            return None
        base, self.phase, self.base, self.next = self.base, None, None, 0
        if not self.reverse:
            return None
        return (base, *output[1:]) if isinstance(output, tuple) else base

    @torch.no_grad()
    def _base_block(self, layer: int, kwargs: dict) -> None:
        """Run one block of the base run, given all that the steered run's was given but for its stream and cache."""
        if not self.phase or not self.first <= layer <= self.last:
            return
        steered, self.phase = self.phase, "take" if self.reverse else "give"
        block, kwargs = self.model.blocks[layer], {k: v for k, v in kwargs.items() if k != "hidden_states"}
        with _without_hooks(block):
            output = block(self.base, **(kwargs | {"past_key_values": self.cache}))
        self.base = output[0] if isinstance(output, tuple) else output
        self.phase = steered

    def attend(self, layer: int, patterns: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """Take what one run's attention uses, or hand the other run what was taken."""
        if self.phase is None:
            raise SteeringError("only forward passes can be frozen: a block's attention was run alone.")
        if layer not in self.layers:
            return None
        if layer < self.first:  # both runs are one here, and each has what it would take
            self.columns.selected(patterns.shape[2])
            return None
        if self.phase == "give":
            self.given[layer] = patterns, values
            return None
        given_patterns, given_values = self.given.pop(layer)
        if patterns.shape != given_patterns.shape:
            raise SteeringError("the two runs' caches differ in length: generate with the default (dynamic) cache.")
        queries, keys = patterns.shape[-2:]
        if self.part != "values":
            patterns = self._exchanged(patterns, given_patterns)
        if self.part != "patterns":  # a sliding window's cache holds the newest keys only
            values = self._exchanged(values, given_values, before=keys - queries)
        return patterns, values

    def _exchanged(self, own: Tensor, given: Tensor, before: int = 0) -> Tensor:
        """`own` with the selected queries (of patterns) or keys (of values) taken from `given`."""
        first, last = self.columns.selected(own.shape[2], before)
        return torch.cat([own[:, :, :first], given[:, :, first:last], own[:, :, last:]], 2)


@contextmanager
def _without_hooks(root: nn.Module):
    """Run the body with every forward hook of a module and its parts laid aside."""
    kept = [(m, m._forward_pre_hooks, m._forward_hooks) for m in root.modules()]
    kept = [(m, before, after) for m, before, after in kept if before or after]
    try:
        for m, before, after in kept:
            m._forward_pre_hooks, m._forward_hooks = type(before)(), type(after)()
        yield
    finally:
        for m, before, after in kept:
            m._forward_pre_hooks, m._forward_hooks = before, after


# --- removing the direct path ----------------------------------------------------------------------------


@contextmanager
def remove_direct(
    model: ChatModel,
    vector: SteeringVector,
    strength: float | Sequence[float],
    reader: str,
    layers: Iterable[int] | None = None,
    positions: str | slice = "all",
    prompt_length: int | None = None,
):
    """Let values ("values": SVV removal) or MLPs ("mlp") not read the vector itself, in the body of `steer`.

    Of what the reader is given after its norm, norm(x), the vector's own part strength * s * weight / RMS(x) is taken
    out, in the vector's block and every later one (or in `layers`); what other components made of the vector stays
    (Cheng et al. 2026, section 5). `strength` and `positions` are those of `steer`; narrower positions remove it
    there only. Raises SteeringError for an unknown reader, an ablating vector, a block below the vector's, or, on
    leaving, when no token was touched.
    """
    check_vector(model, vector)
    if reader not in READERS:
        raise SteeringError(f"unknown reader {reader!r}: give {' or '.join(READERS)}.")
    if vector.operation != "add":
        raise SteeringError("only an added vector has a direct path to remove; this one ablates.")
    layers = _checked(model, range(vector.layer, model.n_layers) if layers is None else layers)
    if below := [layer for layer in layers if layer < vector.layer]:
        raise SteeringError(f"the vector enters at block {vector.layer}: there is nothing to remove in {below}.")
    columns = _Columns(_as_slice(positions), prompt_length)
    direction = vector.direction.to(model.device)
    if np.ndim(strength):
        strength = torch.as_tensor(strength, device=model.device, dtype=torch.float32)[:, None, None]  # by row
    with ExitStack() as stack:
        stack.callback(model.decoder.register_forward_pre_hook(columns.tick, with_kwargs=True).remove)
        for layer in layers:
            _remove_at(model, layer, strength * direction, reader, columns, stack)
        yield
    if not columns.touched:
        raise SteeringError(f"removal touched no token: no forward pass reached positions {positions!r}.")


def _remove_at(model: ChatModel, layer: int, added: Tensor, reader: str, columns: _Columns, stack: ExitStack) -> None:
    """Hooks of one block: the first reads the norm's scale, the second takes the vector's part out."""
    block = model.blocks[layer]
    norm = block.input_layernorm if reader == "values" else model.site("mlp_residual", layer)[0]
    part = added.to(torch.float32) * norm_weight(norm, torch.float32)  # [d_model] or, by row, [batch, 1, d_model]
    if reader == "values":
        part = part @ block.self_attn.v_proj.weight.to(part.dtype).T
    seen = {}

    def change(h: Tensor) -> Tensor:
        first, last = columns.selected(h.shape[1])
        read = torch.zeros_like(seen["scale"])
        read[:, first:last] = seen["scale"][:, first:last]
        return (h - read * part).to(h.dtype)

    # on the norm itself: whatever else acts at the block's input, in any order, has acted by then
    stack.callback(_on_input(norm, lambda x: seen.update(scale=_inverse_rms(norm, x)[1])).remove)
    stack.enter_context(edit(model, [("v" if reader == "values" else "mlp_input", layer, change)]))


# --- the table of interventions --------------------------------------------------------------------------


@contextmanager
def intervene(
    model: ChatModel,
    vector: SteeringVector,
    strength: float | Sequence[float],
    name: str,
    layers: Iterable[int] | None = None,
    positions: str | slice = "all",
):
    """Steer at every position, under one of the `INTERVENTIONS` by name, at some blocks and positions.

    Raises SteeringError for an unknown name, and what `freeze` and `remove_direct` raise.
    """
    if name not in INTERVENTIONS:
        raise SteeringError(f"unknown intervention {name!r}: give {', '.join(INTERVENTIONS)}.")
    with ExitStack() as stack:
        stack.enter_context(steer(model, vector, strength))
        match _CONTEXTS[name]:
            case "freeze", part, reverse:
                stack.enter_context(freeze(model, part, layers, positions, reverse=reverse))
            case "remove", reader, _:
                stack.enter_context(remove_direct(model, vector, strength, reader, layers, positions))
        yield


def intervened_verdicts(
    model: ChatModel,
    prompts: Sequence[str],
    vector: SteeringVector,
    strengths: Sequence[float],
    settings: Mapping[str, Mapping],
    max_new_tokens: int = 24,
    folder: Path | str | None = None,
) -> dict[str, Shaped[np.ndarray, " prompt"]]:
    """Verdicts of `judge` on the greedy answers to all prompts, by setting.

    A setting holds arguments of `intervene` (name, layers, positions); an empty one is the model as it is. Each prompt
    has its own strength; those of one strength make a batch. Below the vector's block nothing changes, so that part
    runs once for all settings, and the first tokens that a batch shares run in one row. In a `folder` each setting's
    verdicts are kept (`kept_arrays`), but no answer. Raises what `intervene` raises.
    """
    prompts = list(prompts)
    read = cache(lambda: list(read_prompts(model, prompts)))  # once for all settings
    runs = _shared_runs(model, prompts, vector, strengths, max_new_tokens, hold_back=1)

    def judged(setting: Mapping) -> np.ndarray:
        """Verdicts on all prompts under one setting; the answers are dropped."""
        answers = np.empty(len(prompts), object)
        for rows, strength, run in runs(setting):
            with intervene(model, vector, strength, **setting) if setting else nullcontext():
                if run is None:
                    answers[rows] = generate(model, [prompts[i] for i in rows], max_new_tokens, batch_size=len(rows))
                else:
                    answers[rows] = answers_from(model, run, vector.layer, max_new_tokens)[0]
        return judge(model, prompts, answers.tolist(), read())["verdict"].to_numpy(str)  # outside: the model as it is

    return _by_setting(model, prompts, vector, strengths, settings, ["verdicts", max_new_tokens], judged, folder)


def intervened_scores(
    model: ChatModel,
    prompts: Sequence[str],
    vector: SteeringVector,
    strengths: Sequence[float],
    settings: Mapping[str, Mapping],
    folder: Path | str | None = None,
) -> dict[str, Float[np.ndarray, " prompt"]]:
    """Refusal scores of the first answer token, in nats, by setting: the rest as `intervened_verdicts`."""
    prompts, tokens = list(prompts), refusal_tokens(model.tokenizer)
    runs = _shared_runs(model, prompts, vector, strengths)

    @torch.no_grad()
    def scored(setting: Mapping) -> np.ndarray:
        """Refusal scores of all prompts under one setting."""
        scores = np.empty(len(prompts))
        for rows, strength, run in runs(setting):
            with intervene(model, vector, strength, **setting) if setting else nullcontext():
                if run is None:
                    logits = last_logits(model, [prompts[i] for i in rows], batch_size=len(rows))
                else:
                    logits = model.unembed(prompts_from(model, run, vector.layer)[0][:, -1])
            scores[rows] = refusal_score(logits, tokens).double().cpu().numpy()
        return scores

    return _by_setting(model, prompts, vector, strengths, settings, ["scores"], scored, folder)


def _shared_runs(
    model: ChatModel,
    prompts: list[str],
    vector: SteeringVector,
    strengths: Sequence[float],
    new_tokens: int = 0,
    hold_back: int = 0,
) -> Callable[[Mapping], list[tuple[Int[np.ndarray, " row"], float | list[float], SharedRun | None]]]:
    """From a setting to batches of prompts of one strength: their rows, the strength, and their unsteered run.

    Where such a batch would be small, all prompts are in one, with a strength each. The run is made once for all
    settings. There is none where a setting counts columns from the text's first token on or acts below the vector's
    block, nor where the vector does (an ablation).
    """
    strengths = np.asarray(strengths, float)
    groups = [(strength, np.flatnonzero(strengths == strength)) for strength in np.unique(strengths).tolist()]
    if few := min((len(rows) for _, rows in groups), default=0) < APART:
        groups = [(strengths.tolist(), np.arange(len(prompts)))]

    @cache
    def made(eager: bool) -> list[SharedRun]:
        """Freezing needs the masks of the eager form."""
        with attending(model, lambda *_: None) if eager else nullcontext():
            return [run_shared(model, [prompts[i] for i in rows], {vector.layer}, new_tokens, hold_back, not few)
                    for _, rows in groups]  # fmt: skip

    def of(setting: Mapping) -> list:
        """The batches of a setting, with the unsteered run in the attention form that it needs."""
        lowest = min(setting.get("layers") or [vector.layer])
        if "positions" in setting or lowest < vector.layer or vector.operation != "add":
            found = [None] * len(groups)
        else:
            found = made(bool(setting) and "freeze" in (_CONTEXTS[setting["name"]] or ()))
        return [(rows, strength, run) for (strength, rows), run in zip(groups, found)]

    return of


def _by_setting(model, prompts, vector, strengths, settings, about: list, measure, folder) -> dict[str, np.ndarray]:
    """A measure of each setting, kept under all that it depends on: without steering neither vector nor strengths."""
    found, about = {}, [model.revision, str(model.dtype), *about, prompts]
    for name, setting in settings.items():
        where = [_plain(setting.get(place)) for place in ("name", "layers", "positions")]
        steering = [vector_key(vector), list(map(float, strengths)), *where] if setting else []
        made = kept_arrays(folder, [*about, *steering], lambda setting=setting: {"found": measure(setting)})
        found[name] = made["found"]
    return found


def _plain(place):
    """A setting's value as JSON can hold it: a slice or several layers as a list."""
    if isinstance(place, slice):
        return [place.start, place.stop]
    return place if place is None or isinstance(place, str) else sorted(place)


# --- what is lost ----------------------------------------------------------------------------------------


def drops(
    base: ArrayLike, steered: ArrayLike, changed: ArrayLike, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """How much of the steering effect an intervention takes away, from the same prompts' scores in three runs.

    "absolute" is mean(steered) - mean(changed), counted in the direction of the effect; "relative" is its share of the
    effect mean(steered) - mean(base). Each with its 95 % bootstrap interval over prompts: (value, low, high). For few
    flags that interval is too short: use `paired_difference`. A resample without effect counts as no relative drop.
    Raises ValueError when steering had no effect.
    """
    base, steered, changed = (np.asarray(sample, dtype=float) for sample in (base, steered, changed))
    sign = np.sign(steered.mean() - base.mean())
    if not sign:
        raise ValueError("steering changed nothing on these prompts, so there is no effect to drop: use another set.")

    def relative(base, steered, changed) -> float:
        effect = steered.mean() - base.mean()
        return (steered.mean() - changed.mean()) / effect if effect else 0.0

    absolute = bootstrap(lambda steered, changed: sign * (steered.mean() - changed.mean()), steered, changed, seed=seed)
    return {"absolute": absolute, "relative": bootstrap(relative, base, steered, changed, seed=seed)}


def share_lost(scores: pd.DataFrame, name: str, other: str = "steered", seed: int = 0) -> tuple[float, float, float]:
    """How much more of the steering effect is lost in one setting than in another, as a share: (value, low, high).

    `scores` has a row a prompt and a column a setting, "unsteered" and "steered" among them. The share is
    mean(other - name) / mean(steered - unsteered), with its 95 % bootstrap interval over prompts.
    """
    return ratio_of_means(scores[other] - scores[name], scores["steered"] - scores["unsteered"], seed)


def difference_of_shares(
    one: pd.DataFrame, other: pd.DataFrame, name: str, seed: int = 0
) -> tuple[float, float, float]:
    """How much larger a share of one effect than of another is lost in the same setting: (value, low, high).

    `one` and `other` are two vectors' scores on the same prompts, as in `share_lost`: the difference of the two shares,
    with its 95 % bootstrap interval over prompts.
    """

    def difference(lost, whole, other_lost, other_whole) -> float:
        return lost.mean() / whole.mean() - other_lost.mean() / other_whole.mean()

    samples = [part for s in (one, other) for part in (s["steered"] - s[name], s["steered"] - s["unsteered"])]
    return bootstrap(difference, *samples, seed=seed)


LOST = dict(zip(("patterns", "values", "both", "svv", "mlp"), INTERVENTIONS[1:6]))  # column -> what takes away


def control_losses(
    scores: Mapping[str, pd.DataFrame], beside: Sequence[pd.DataFrame], least: float = 0.1, seed: int = 0
) -> pd.DataFrame:
    """What the interventions take of the first token's change for many vectors, controls say: a row a vector.

    `scores` are theirs, `beside` those of the vector that they stand beside, as in `share_lost` and on the same
    prompts: at full strength, and then at smaller ones. Columns: vector; change, the mean move of the score in nats;
    patterns_nats and values_nats, what of it the frozen half takes; enough, whether it is surely more than `least` of
    that of `beside` at full strength, to either side. Then, nan where it is not enough, the shares that are lost:
    patterns, values, both, svv, mlp; and the differences ahead (values - patterns), svv_ahead (svv - mlp), and more
    (patterns - the share that they take of `beside`, at the strength at which it moves the score about as far, since
    shares depend on that; nan where none comes within a factor of 1.5). The change and the differences have their 95 %
    bootstrap intervals over prompts beside them, in columns that end in _low and _high.
    """
    sizes = [abs((table["steered"] - table["unsteered"]).mean()) for table in beside]
    bar, rows = least * sizes[0], []
    for name, table in scores.items():
        change = bootstrap(np.mean, table["steered"] - table["unsteered"], seed=seed)
        taken = {part: (table["steered"] - table[setting]).mean() for part, setting in LOST.items()}  # nats
        intervals = {"change": change} | dict.fromkeys(("ahead", "svv_ahead", "more"), (np.nan,) * 3)
        enough = change[1] > bar or change[2] < -bar
        if enough:
            intervals["ahead"] = share_lost(table, "values frozen", "patterns frozen", seed)
            intervals["svv_ahead"] = share_lost(table, "svv removed", "direct MLP removed", seed)
            apart = np.abs(np.log(np.array(sizes) / abs(change[0])))
            if apart.min() <= np.log(1.5):
                nearest = beside[int(apart.argmin())]
                intervals["more"] = difference_of_shares(table, nearest, "patterns frozen", seed)
        row = {"vector": name, "enough": enough}
        row |= {f"{half}_nats": taken[half] for half in ("patterns", "values")}
        row |= {part: nats / change[0] if enough else np.nan for part, nats in taken.items()}
        for what, interval in intervals.items():
            row |= dict(zip((what, f"{what}_low", f"{what}_high"), interval))
        rows.append(row)
    return pd.DataFrame(rows)


def losses(flags: pd.DataFrame, scores: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """What each intervention takes of the steering effect, counted in three ways: a row an intervention.

    `flags` say whether an answer is turned round, `scores` are the first token's; both have a row a prompt and a column
    a setting. Columns: intervention (each but "steered"); points, the percentage points by which the share turned round
    drops; share, the same as a share of the effect (nan where steering turned no more round than chance might);
    first_token, the share of the score's change. Each is (value, low, high) with the interval of `paired_difference`,
    `share_of_answers` (what is left, from 1) or `share_lost`.
    """
    rows = []
    for name in INTERVENTIONS[1:]:
        points = tuple(100 * np.array(paired_difference(flags["steered"], flags[name])))
        runs = (flags[setting].to_numpy(bool) for setting in ("unsteered", "steered", name))
        value, low, high = share_of_answers(*runs) or (np.nan,) * 3
        rows.append((name, points, (1 - value, 1 - high, 1 - low), share_lost(scores, name, seed=seed)))
    return pd.DataFrame(rows, columns=["intervention", "points", "share", "first_token"])


def redundancy(flags: pd.DataFrame, scores: pd.DataFrame, seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """The interaction of the two freezes: how much more freezing patterns takes once values are frozen, too.

    Above 0, each half of attention does the other's work where that one is missing. By judge, as (value, low, high):
    "answers" from `flags`, whether an answer is turned round (a difference of rates), "first token" from `scores` (a
    share of the effect, as in `share_lost`); both have a row a prompt and a column a setting. The interval of the flags
    is a 95 % Wald interval with one more prompt up and one down, after that of `paired_difference`.
    """

    def further(of: pd.DataFrame) -> Float[np.ndarray, " prompt"]:
        return (of["values frozen"] - of["both frozen"] - (of["steered"] - of["patterns frozen"])).to_numpy(float)

    by_flag = further(flags.astype(int))
    wider = np.append(by_flag, [1, -1])
    half = 1.96 * wider.std() / np.sqrt(len(wider))
    low, high = np.clip([wider.mean() - half, wider.mean() + half], -2, 2)
    nats = ratio_of_means(further(scores), scores["steered"] - scores["unsteered"], seed)
    return {"answers": (float(by_flag.mean()), float(low), float(high)), "first token": nats}
