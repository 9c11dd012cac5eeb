"""Chat models with named sites: places in the residual stream where a tensor can be read or rewritten.

A `ChatModel` is a plain Hugging Face model plus the few names that steering and attribution need. Families
differ in where their norms stand; only this module knows.
"""

import copy
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from . import weights

FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"} | {
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
}
FUSED = {"qkv_proj", "query_key_value", "c_attn", "Wqkv"}  # names of projections that heads cannot be told apart in
DEFAULT_MODEL = "smollm2-135m-refusal"

# site -> which end of which module. "write" sites are what a component adds to the residual stream: in
# families with a norm after the component (Gemma) that norm's output, elsewhere the component's own.
SITES = {
    "block_input": "in",  # the residual stream at the input of block l: `layer = l` everywhere in the book
    "attention_input": "out",  # after the input norm
    "q": "out",
    "k": "out",
    "v": "out",
    "heads": "in",  # the heads' outputs side by side, [.., n_heads * d_head], just before o_proj
    "attention_output": "out",
    "attention_write": "out",
    "mlp_residual": "in",  # the residual stream between attention and MLP, before the MLP's norm
    "mlp_input": "in",  # after the norm
    "mlp_output": "out",
    "mlp_write": "out",
    "final_residual": "in",  # has no layer
}


class ModelError(ValueError):
    """A model that the package cannot work with; the message says why and what to use instead."""


@dataclass(eq=False)
class ChatModel:
    """A frozen Hugging Face chat model in eval mode, its tokenizer, and the names of its parts.

    `revision` is the fingerprint of the weights that results and vector files carry.
    """

    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str

    @cached_property
    def decoder(self) -> nn.Module:
        """The stack of blocks, without the unembedding."""
        return self.hf.get_decoder()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.decoder.layers

    @property
    def config(self):
        return self.hf.config.get_text_config()

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        return self.config.hidden_size

    @property
    def n_heads(self) -> int:
        """Query heads a block."""
        return self.config.num_attention_heads

    @property
    def n_groups(self) -> int:
        """Key/value groups a block: as many as heads where no head shares its keys and values."""
        return self.config.num_key_value_heads

    @property
    def device(self) -> torch.device:
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @property
    def has_post_norms(self) -> bool:
        """Whether a norm stands between a component's output and the residual stream (Gemma)."""
        return hasattr(self.blocks[0], "pre_feedforward_layernorm")

    @cached_property
    def nnsight(self):
        """The same model behind nnsight's tracing interface (made when first asked for)."""
        from nnsight import TransformersModel  # a second's import that only traces need

        return TransformersModel(self.hf, tokenizer=self.tokenizer, device=self.device)

    def site(self, name: str, layer: int = 0) -> tuple[nn.Module, str]:
        """The module behind a named site of block `layer`, and whether the site is its input or output ("in", "out").

        Raises ValueError for an unknown site or a layer out of range.
        """
        if name not in SITES:
            raise ValueError(f"unknown site {name!r}; the sites are: {', '.join(SITES)}.")
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"layer {layer} is out of range: {self.name} has blocks 0 to {self.n_layers - 1}.")
        block = self.blocks[layer]
        attention = block.self_attn
        modules = {
            "block_input": block,
            "attention_input": block.input_layernorm,
            "q": attention.q_proj,
            "k": attention.k_proj,
            "v": attention.v_proj,
            "heads": attention.o_proj,
            "attention_output": attention.o_proj,
            "attention_write": block.post_attention_layernorm if self.has_post_norms else attention.o_proj,
            "mlp_residual": block.pre_feedforward_layernorm if self.has_post_norms else block.post_attention_layernorm,
            "mlp_input": block.mlp,
            "mlp_output": block.mlp,
            "mlp_write": block.post_feedforward_layernorm if self.has_post_norms else block.mlp,
            "final_residual": self.decoder.norm,
        }
        return modules[name], SITES[name]

    def unembed(
        self, residual: Float[Tensor, "... d_model"], words: Int[Tensor, "... word"] | None = None
    ) -> Float[Tensor, "... word"]:
        """Logits of a final residual: the final norm, the unembedding, and the family's soft cap if it has one.

        Of the whole vocabulary, or of the `words` given by number for each place: a few of them cost next to nothing.
        """
        read, head = self.decoder.norm(residual), self.hf.get_output_embeddings()
        if words is None:
            logits = head(read)
        else:
            logits = torch.einsum("...d,...wd->...w", read, head.weight[words])
            logits = logits if head.bias is None else logits + head.bias[words]
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The number format to sum in: float32, or a wider one that is there already."""
    return torch.promote_types(dtype, torch.float32)


def widened(values: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Values in float32 where they have less: sums over a vocabulary lose hundredths of a nat in bfloat16."""
    return values.to(wide_dtype(values.dtype))


def load_model(
    name: str = DEFAULT_MODEL,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ChatModel:
    """Load a chat model by name: an embedded one, a local folder or a hub id.

    `device` is a torch device or "auto" (a GPU if there is one). Parameters are frozen, the model is in eval mode, and
    a self-check proves that its sites can be read and written. Raises WeightsError (no such weights) or ModelError
    (unsupported).
    """
    source = weights.find(name)
    if not sys.stderr.isatty():
        hf_logging.disable_progress_bar()  # a bar without a terminal is noise in logs and notebooks
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        hf = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, attn_implementation="sdpa")
        tokenizer = AutoTokenizer.from_pretrained(source.path)
    except (OSError, ValueError) as error:  # a file is missing or broken, or the family is unknown
        raise ModelError(f"transformers cannot load {name}: {error}\n{_supported()}") from error
    return wrap_model(hf.to(device), tokenizer, name=name, revision=source.revision)


FORMATS = ("float32", "bfloat16", "float16")


def in_format(model: ChatModel, dtype: str) -> ChatModel:
    """The same weights in a number format by name: the model itself where it has that format, else loaded once more.

    Raises ValueError for an unknown format.
    """
    if dtype not in FORMATS:
        raise ValueError(f"number format {dtype!r}: give one of {', '.join(FORMATS)}.")
    wanted = getattr(torch, dtype)
    return model if model.dtype == wanted else load_model(model.name, str(model.device), wanted)


def block_at(model: ChatModel, layer: int, depth: float) -> int:
    """The block `layer`, or for -1 the one at a share `depth` of the model's blocks.

    Raises ValueError for a block that the model does not have.
    """
    if not -1 <= layer < model.n_layers:
        raise ValueError(
            f"layer {layer} is out of range: {model.name} has blocks 0 to {model.n_layers - 1}, "
            f"and -1 stands for the one at {depth:.0%} of the depth."
        )
    return layer if layer >= 0 else int(depth * model.n_layers)


def wrap_model(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, revision: str) -> ChatModel:
    """Make a ChatModel of a Hugging Face model that is already in memory: freeze, set to eval mode, check.

    Raises ModelError for an unsupported family, a tokenizer without a chat template, or a failed self-check.
    """
    family = hf.config.get_text_config().model_type
    if family not in FAMILIES:
        fused = FUSED & {path.rsplit(".", 1)[-1] for path, _ in hf.named_modules()}
        why = f" (it computes queries, keys and values in one matrix, {', '.join(fused)})" if fused else ""
        raise ModelError(f"{name} is of the family {family!r}, which is not supported{why}. {_supported()}")
    if not tokenizer.chat_template:
        raise ModelError(f"{name} has no chat template: it is a base model. Use its chat or instruct version.")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    hf.eval().requires_grad_(False)
    # of a slice of columns, torch would multiply row by row and read the vocabulary once a prompt
    hf.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    model = ChatModel(hf, tokenizer, name, revision)
    self_check(model)
    return model


def _supported() -> str:
    return f"Supported families: {', '.join(FAMILIES.values())}."


# --- reading and writing sites ---------------------------------------------------------------------------


@contextmanager
def edit(model: ChatModel, edits: Iterable[tuple[str, int, Callable[[Tensor], Tensor | None]]]):
    """Run the `with` body with tensors rewritten: each edit is (site, layer, function h -> h').

    A function that returns None only reads. Edits of one site act in the order given.
    """
    if model.hf.training:
        raise ModelError(f"{model.name} is in train mode, where dropout changes every result; call model.hf.eval().")
    handles = []
    try:
        for site, layer, function in edits:
            module, end = model.site(site, layer)
            add = _on_input if end == "in" else _on_output
            handles.append(add(module, function))
        yield
    finally:
        for handle in handles:
            handle.remove()


def hooked(model: ChatModel) -> bool:
    """Whether hooks act on the model, as in `edit` and `steer` (the unembedding has one of its own)."""
    parts = set(model.hf.modules()) - {model.hf.get_output_embeddings()}
    return any(m._forward_pre_hooks or m._forward_hooks for m in parts)


def steered(model: ChatModel) -> bool:
    """Whether a `steer` block is around: its vector acts, and may count the columns of a pass."""
    return bool(getattr(model.hf, STEERED, 0))


def _on_input(module: nn.Module, function):
    def hook(_, args, kwargs):
        """Let `function` change the first input, however the module was called."""
        if args:
            changed = function(args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)
        changed = function(kwargs["hidden_states"])
        return None if changed is None else (args, kwargs | {"hidden_states": changed})

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _on_output(module: nn.Module, function):
    return module.register_forward_hook(lambda _, args, output: function(output))


@contextmanager
def capture(model: ChatModel, site: str, layers: Iterable[int] | None = None):
    """Collect a site's tensors during the `with` body: a dict, layer -> the last forward pass's tensor."""
    layers = range(model.n_layers) if layers is None else layers
    taken: dict[int, Tensor] = {}
    with edit(model, [(site, layer, lambda h, layer=layer: taken.update({layer: h.detach()})) for layer in layers]):
        yield taken


# --- running part of the model ---------------------------------------------------------------------------


@dataclass(eq=False)
class Tape:
    """A forward pass taken down block by block, so that it can be resumed at any block with another residual."""

    residuals: list[Float[Tensor, "batch pos d_model"]]  # the input of every block
    arguments: list[dict]  # what else every block was given: mask, rotary tables, positions
    final: Float[Tensor, "batch pos d_model"] | None = None  # what the last block gave, before the final norm


@torch.no_grad()
def tape(model: ChatModel, inputs: dict[str, Tensor]) -> Tape:
    """Run the blocks once and keep what each of them was given: no logits, and a cache only if `inputs` brings one."""
    taken = Tape([], [])

    def keep(_, args, kwargs):
        kwargs = dict(kwargs)
        taken.residuals.append(args[0] if args else kwargs.pop("hidden_states"))
        taken.arguments.append(kwargs)

    def end(_, __, output):
        taken.final = output[0] if isinstance(output, tuple) else output

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in model.blocks]
    handles.append(model.blocks[-1].register_forward_hook(end))
    try:
        model.decoder(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return taken


class Prefix(DynamicCache):
    """Keys and values of the first tokens, which several runs share: a run reads them and adds nothing to them."""

    def __init__(self, filled: DynamicCache):
        super().__init__()
        self.layers = filled.layers

    def update(self, key_states, value_states, layer_idx, *_, **__):
        """The prefix's keys and values of a layer followed by the new ones; nothing is stored."""
        kept, n = self.layers[layer_idx], len(key_states)  # one row serves any batch
        return tuple(
            torch.cat([old.expand(n, -1, -1, -1), new], -2)
            for old, new in ((kept.keys, key_states), (kept.values, value_states))
        )

    def repeated(self, times: int) -> "Prefix":
        """The same for every row `times` over."""
        other = Prefix(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        for layer in other.layers:
            layer.keys, layer.values = (x.repeat(times, 1, 1, 1) for x in (layer.keys, layer.values))
        return other


def repeated(taken: Tape, times: int, first: int = 0) -> Tape:
    """A tape's arguments, for blocks from `first` on, with every row `times` over; what rows share stays as it is."""
    done: dict[int, object] = {}  # most blocks are given the same tensors

    def stretch(value):
        """One argument of a block, with every row `times` over."""
        if times > 1 and id(value) not in done:
            done[id(value)] = value, _stretched(value, times, stretch)
        return done[id(value)][1] if times > 1 else value

    return Tape([], [{n: stretch(value) if layer >= first else value for n, value in given.items()}
                     for layer, given in enumerate(taken.arguments)])  # fmt: skip


def _stretched(value, times: int, stretch: Callable):
    if isinstance(value, tuple):
        return tuple(map(stretch, value))
    if isinstance(value, Prefix):
        return value.repeated(times)
    many = isinstance(value, Tensor) and value.ndim and len(value) > 1  # a first dimension of 1 serves all rows
    return value.repeat(times, *[1] * (value.ndim - 1)) if many else value


@torch.no_grad()
def prefix_of(model: ChatModel, tokens: Tensor) -> Prefix:
    """Run the first tokens of every row, [batch, pos], none of them padding, and keep their keys and values."""
    return Prefix(model.decoder(tokens, use_cache=True).past_key_values)


def resume(
    model: ChatModel, tape: Tape, layer: int, residual: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """The final residual when block `layer` is given `residual`: only blocks >= layer run."""
    for block, arguments in zip(model.blocks[layer:], tape.arguments[layer:], strict=True):
        residual = block(residual, **arguments)
        residual = residual[0] if isinstance(residual, tuple) else residual
    return residual


STEERED = "_steerutils_steered"  # the attribute of a Hugging Face model that counts the `steer` blocks around it


def ungrouped(model: ChatModel) -> ChatModel:
    """A copy of the model in which every query head has a key and value head of its own; its outputs are the same.

    For comparison with tools that know no grouped queries. It holds a second copy of all weights.
    """
    hf = copy.deepcopy(model.hf)
    hf.config.get_text_config().num_key_value_heads = model.n_heads
    for block in hf.get_decoder().layers:
        attention = block.self_attn
        shared = attention.num_key_value_groups
        for name in ("k_proj", "v_proj"):
            old = getattr(attention, name)
            new = nn.Linear(old.in_features, old.out_features * shared, bias=old.bias is not None)
            for parameter in ("weight", "bias")[: 1 + (old.bias is not None)]:
                rows = getattr(old, parameter).unflatten(0, (-1, attention.head_dim))  # [group, d_head, ..]
                copies = rows.repeat_interleave(shared, 0).flatten(0, 1)
                setattr(new, parameter, nn.Parameter(copies, requires_grad=False))
            setattr(attention, name, new)
        attention.num_key_value_groups = 1
    return ChatModel(hf, model.tokenizer, model.name, f"{model.revision} ungrouped")


# --- the self-check --------------------------------------------------------------------------------------


@torch.no_grad()
def self_check(model: ChatModel) -> None:
    """Prove on a few tokens that writing a site changes the logits, that rewriting it with itself leaves them
    bit-equal, and that embedding, heads and MLPs add up to the final residual. Raises ModelError.
    """
    n = min(6, model.config.vocab_size)
    tokens = torch.linspace(1, model.config.vocab_size - 1, n, device=model.device).long()[None]  # [1, n]
    taken, last = (
        tape(model, {"input_ids": tokens}),
        model.n_layers - 1,
    )  # the last block is the cheapest to resume

    def read(site: str, scale: float) -> Tensor:
        """What is unembedded after a rewrite; the vocabulary itself would take most of the time."""
        with edit(model, [(site, last, lambda h: h * _uneven(h, scale))]):
            return model.decoder.norm(resume(model, taken, last, taken.residuals[last]))

    plain = model.decoder(tokens, use_cache=False).last_hidden_state
    if not torch.equal(model.unembed(taken.final), model.hf(tokens, use_cache=False).logits):
        raise ModelError(f"self-check of {model.name}: its unembedding gave other logits. {_supported()}")
    for site in SITES:
        if not torch.equal(read(site, 1.0), plain):
            raise ModelError(f"self-check of {model.name}: reading site {site} changed the logits. {_supported()}")
        if torch.equal(read(site, 1.5), plain):
            raise ModelError(f"self-check of {model.name}: writing site {site} had no effect. {_supported()}")
    total, final = sum_of_sources(model, tokens)
    error = (total - final).norm() / final.norm()
    # a block rounds the stream twice; a family put together wrongly is off by far more, in half precision, too
    if not error < max(1e-4, min(0.25, model.n_layers * torch.finfo(model.dtype).eps)):
        raise ModelError(f"self-check of {model.name}: its components miss the final residual by {error:.1e} of it.")


def _uneven(h: Tensor, scale: float) -> Tensor:
    """A factor that a norm cannot undo: `scale` on the even coordinates, 1 on the odd ones."""
    factor = torch.ones(h.shape[-1], device=h.device, dtype=h.dtype)
    factor[::2] = scale
    return factor


def sum_of_sources(
    model: ChatModel, tokens: Tensor
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_model"]]:
    """Embedding + heads + MLPs of a forward pass, and the final residual that they should add up to.

    Each head is its slice of o_proj; a norm after attention acts on the heads' sum. Both [batch, pos, d_model].
    """
    parts: dict[tuple[str, int], Tensor] = {}

    def keep(site, layer):
        return site, layer, lambda h: parts.update({(site, layer): h})

    sites = [keep(site, layer) for site in ("heads", "mlp_write") for layer in range(model.n_layers)]
    with edit(model, [keep("block_input", 0), *sites, keep("final_residual", 0)]):
        model.hf(tokens, use_cache=False)
    total = widened(parts["block_input", 0]).clone()  # the model rounds its own stream; this sum should not
    for layer, block in enumerate(model.blocks):
        z = parts["heads", layer].unflatten(-1, (model.n_heads, -1))  # [batch, pos, head, d_head]
        w = block.self_attn.o_proj.weight.unflatten(-1, (model.n_heads, -1))  # [d_model, head, d_head]
        heads = torch.einsum("bphe,dhe->bphd", widened(z), widened(w)).sum(2)
        if block.self_attn.o_proj.bias is not None:
            heads = heads + block.self_attn.o_proj.bias
        total += widened(block.post_attention_layernorm(heads.to(model.dtype))) if model.has_post_norms else heads
        total += widened(parts["mlp_write", layer])
    return total, widened(parts["final_residual", 0])
