"""steerutils: where and why steering works. The helper package of the steering book."""

from .judges import (
    answer_nll,
    bootstrap,
    is_refusal,
    judge,
    rate,
    refusal_score,
    refusal_tokens,
    repetition,
    shown,
)
from .models import ChatModel, ModelError, capture, edit, load_model, resume, self_check, tape, wrap_model
from .prompts import Batch, PromptError, encode, load_prompts, template_length
from .record import check_parameters, record, run_metadata
from .steering import (
    SteeringError,
    SteeringVector,
    generate,
    generate_grid,
    last_logits,
    load_vector,
    random_like,
    steer,
    sweep,
)
from .vectors import (
    ablating,
    caa_vectors,
    cosine,
    dim_vectors,
    pca_vectors,
    residuals,
    select,
    selection_table,
)
from .weights import WeightsError

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "ChatModel",
    "ModelError",
    "PromptError",
    "SteeringError",
    "SteeringVector",
    "WeightsError",
    "ablating",
    "answer_nll",
    "bootstrap",
    "caa_vectors",
    "capture",
    "check_parameters",
    "cosine",
    "dim_vectors",
    "edit",
    "encode",
    "generate",
    "generate_grid",
    "is_refusal",
    "judge",
    "last_logits",
    "load_model",
    "load_prompts",
    "load_vector",
    "pca_vectors",
    "random_like",
    "rate",
    "record",
    "refusal_score",
    "refusal_tokens",
    "repetition",
    "residuals",
    "resume",
    "run_metadata",
    "select",
    "selection_table",
    "self_check",
    "shown",
    "steer",
    "sweep",
    "tape",
    "template_length",
    "wrap_model",
]
