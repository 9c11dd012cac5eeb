"""Real float64: Hugging Face keeps norms, rotary tables and softmax in float32 even after .double()."""

import copy
from unittest import mock

import torch

from steerutils.attribution import norm_weight
from steerutils.models import ChatModel


def true_float64(model: ChatModel) -> ChatModel:
    """A float64 copy of a tiny model with float64 norms and rotary tables."""
    hf = copy.deepcopy(model.hf).double()
    for module in hf.modules():
        if type(module).__name__.endswith("RMSNorm"):
            weight = norm_weight(module, torch.float64)
            eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
            module.forward = lambda x, w=weight, eps=eps: w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        if hasattr(module, "rotary_emb"):
            module.rotary_emb.forward = _widened(module.rotary_emb.forward)
    hf.config._attn_implementation = "eager"
    return ChatModel(hf, model.tokenizer, model.name, f"{model.revision} float64")


def _widened(rotary):
    return lambda *args, **kwargs: tuple(table.double() for table in rotary(*args, **kwargs))


def float64_softmax():
    """A context in which softmax keeps float64, whatever dtype Hugging Face asks for."""
    softmax = torch.nn.functional.softmax
    return mock.patch("torch.nn.functional.softmax", lambda x, dim=-1, dtype=None, **_: softmax(x, dim))
