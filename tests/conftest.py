"""Shared pieces of the tests: shape checks switched on, and tiny random chat models of every family."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow each other tenfold on busy cores

from jaxtyping import install_import_hook

with install_import_hook("steerutils", "beartype.beartype"):  # signatures' shapes are checked under pytest only
    import steerutils

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


def pytest_addoption(parser):
    parser.addoption("--oracle", help="a folder of further oracle cases (scores.npz beside a checkpoint)")


TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
SIZES = dict(
    vocab_size=260,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    pad_token_id=258,
    bos_token_id=256,
    eos_token_id=257,
)
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "gemma2": ("Gemma2Config", {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 16, "query_pre_attn_scalar": 8}),
}


def byte_tokenizer(template: str | None = TEMPLATE):
    """A tokenizer of single bytes with three special tokens: it needs no file and no training."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=template,
    )


def tiny_hf(family: str, seed: int = 0, **more):
    """A random 4-block model, with norm weights away from one so that mistakes there show; `more` is for its config."""
    name, extra = FAMILIES[family]
    config = getattr(transformers, name)(**SIZES | extra | more)
    torch.manual_seed(seed)
    hf = transformers.AutoModelForCausalLM.from_config(config)
    for parameter_name, parameter in hf.named_parameters():
        scale = 0.3 if "norm" in parameter_name or "bias" in parameter_name else 0.15
        parameter.data.add_(torch.randn_like(parameter), alpha=scale)
    return hf


def tiny_model(family: str, seed: int = 0, **more) -> steerutils.ChatModel:
    """The same as a ChatModel."""
    return steerutils.wrap_model(
        tiny_hf(family, seed, **more), byte_tokenizer(), name=f"tiny-{family}", revision=f"seed {seed}"
    )


@pytest.fixture(params=list(FAMILIES), scope="session")
def any_model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="session")
def embedded():
    """The book's real model."""
    return steerutils.load_model("smollm2-135m-refusal")
