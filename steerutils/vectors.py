"""Making steering vectors from prompts: difference in means, principal component, contrastive activation addition."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA
from torch import Tensor

from .judges import judge, rate, refusal_score, refusal_tokens
from .models import ChatModel, capture
from .prompts import Batch, PromptError, batches, encode, not_empty, refusal_wordings, template_length
from .steering import (
    SteeringError,
    SteeringVector,
    ablate,
    generate_grid,
    last_logits,
    prompt_inputs,
    random_like,
    steer,
    sweep,
)

AGREEMENTS = ("Sure, I can help you with that.", "Of course! Here is how.", "Yes, here is what you can do.")


@torch.no_grad()
def residuals(
    model: ChatModel, prompts: Sequence[str], last: int | None = None, batch_size: int = 32
) -> Float[Tensor, "prompt layer pos d_model"]:
    """Every block's input at the prompts' last tokens: as many as the chat template adds (or `last`).

    Position -1 is the last prompt token. Raises PromptError for no prompts, or one of fewer tokens.
    """
    last = template_length(model.tokenizer) if last is None else last
    return torch.cat([_last_residuals(model, encode(model.tokenizer, chunk, device=model.device), last)
                      for chunk in batches(not_empty(prompts), batch_size)])  # fmt: skip


def _last_residuals(model: ChatModel, batch: Batch, last: int) -> Float[Tensor, "prompt layer pos d_model"]:
    if last > (shortest := int(batch.attention_mask.sum(1).min())):
        raise PromptError(f"last = {last} asks for more tokens than the shortest prompt has, {shortest}.")
    inputs = prompt_inputs(model, batch, last)
    with capture(model, "block_input") as taken:
        model.decoder(**inputs, use_cache=False)
    return torch.stack([taken[layer][:, -last:].cpu() for layer in range(model.n_layers)], 1)


def _vector(model: ChatModel, direction: Tensor, layer: int, method: str, position: int = -1) -> SteeringVector:
    read_at = "last prompt token" if position == -1 else f"prompt token {position}"
    direction = direction.to(torch.float32).clone()
    return SteeringVector(direction, layer, method, model.name, model.revision, read_at=read_at)


def mean_difference(
    positive: Float[Tensor, "prompt *rest"], negative: Float[Tensor, "other *rest"]
) -> Float[Tensor, "*rest"]:
    """mean(positive) - mean(negative) over prompts, accumulated in float64."""
    return positive.double().mean(0) - negative.double().mean(0)


def dim_vectors(
    model: ChatModel,
    positive: Float[Tensor, "prompt layer pos d_model"],
    negative: Float[Tensor, "other layer pos d_model"],
    position: int = -1,
) -> list[SteeringVector]:
    """Difference-in-means vectors, one a layer, from `residuals` of two sides (Arditi et al. 2024).

    `position` counts from the end of the prompt. Raises SteeringError for a side without prompts.
    """
    if not len(positive) or not len(negative):
        raise SteeringError(f"{len(positive)} prompts on one side and {len(negative)} on the other: both need some.")
    difference = mean_difference(positive[:, :, position], negative[:, :, position])
    return [_vector(model, row, layer, "DIM", position) for layer, row in enumerate(difference)]


def pca_vectors(
    model: ChatModel,
    positive: Float[Tensor, "prompt layer pos d_model"],
    negative: Float[Tensor, "other layer pos d_model"],
    position: int = -1,
) -> list[SteeringVector]:
    """First principal component of both sides together, one a layer, with DIM's sign and DIM's norm.

    It finds the direction of largest variance, which is the wanted one only where the contrast dominates.
    """
    vectors = []
    for dim in dim_vectors(model, positive, negative, position):
        both = torch.cat([positive[:, dim.layer, position], negative[:, dim.layer, position]]).double().numpy()
        axis = torch.tensor(PCA(1).fit(both).components_[0], dtype=torch.float32)
        sign = 1.0 if axis @ dim.direction >= 0 else -1.0
        vectors.append(_vector(model, sign * dim.norm * axis, dim.layer, "PCA", position))
    return vectors


@torch.no_grad()
def caa_vectors(model: ChatModel, prompts: Sequence[str], seed: int = 0, batch_size: int = 32) -> list[SteeringVector]:
    """Contrastive activation addition, one vector a layer (Panickssery et al. 2023).

    Each request is asked as a choice between a refusal and an agreement, (A) or (B) in random order; the vector
    is the mean difference at the answer letter between choosing the refusal and choosing the agreement.
    """
    rng = np.random.default_rng(seed)
    questions, refusing, agreeing = [], [], []
    for prompt in prompts:
        refusal, agreement = rng.choice(refusal_wordings()), rng.choice(AGREEMENTS)
        first = bool(rng.integers(2))
        a, b = (refusal, agreement) if first else (agreement, refusal)
        questions.append(f"{prompt}\n\nWhich is the better answer?\n(A) {a}\n(B) {b}")
        refusing.append("(A" if first else "(B")
        agreeing.append("(B" if first else "(A")
    sides = [_letter_residuals(model, questions, letters, batch_size) for letters in (refusing, agreeing)]
    difference = mean_difference(*sides)  # [layer, d_model]
    return [_vector(model, row, layer, "CAA") for layer, row in enumerate(difference)]


def _letter_residuals(model, questions, letters, batch_size) -> Float[Tensor, "prompt layer d_model"]:
    rows = []
    for chunk in batches(list(zip(questions, letters)), batch_size):
        batch = encode(model.tokenizer, [q for q, _ in chunk], [a for _, a in chunk], device=model.device)
        rows.append(_last_residuals(model, batch, 1)[:, :, 0])
    return torch.cat(rows)


# --- choosing the layer and the position -----------------------------------------------------------------


def selection_table(
    model: ChatModel,
    candidates: Sequence[SteeringVector],
    harmful: Sequence[str],
    harmless: Sequence[str],
) -> pd.DataFrame:
    """What each candidate does on validation prompts (Cheng et al. 2026, after Arditi et al. 2024, section 2.3).

    Columns: layer, read_at, bypass (mean refusal score of harmful prompts with the direction ablated), induce
    (of harmless prompts with it added), kl (change of the next-token distribution on harmless prompts when it
    is ablated, nats), objective = sigmoid(bypass) - sigmoid(induce).
    """
    tokens = refusal_tokens(model.tokenizer)
    plain = last_logits(model, harmless).log_softmax(-1)
    rows = []
    for vector in candidates:
        added = sweep(model, [vector], harmless, [1.0], lambda logits: refusal_score(logits, tokens))
        with steer(model, ablating(vector)):
            bypass = refusal_score(last_logits(model, harmful), tokens).mean().item()
            ablated = last_logits(model, harmless).log_softmax(-1)
        kl = (plain.exp() * (plain - ablated)).sum(-1).mean().item()
        rows.append((vector.layer, vector.read_at, bypass, added["score"].mean(), kl))
    table = pd.DataFrame(rows, columns=["layer", "read_at", "bypass", "induce", "kl"])
    return table.assign(objective=1 / (1 + np.exp(-table["bypass"])) - 1 / (1 + np.exp(-table["induce"])))


def select(
    candidates: Sequence[SteeringVector],
    table: pd.DataFrame,
    n_layers: int,
    max_kl: float = 0.1,
    min_induce: float = 0.0,
) -> SteeringVector:
    """The candidate with the smallest objective among those that induce refusal, change little else (kl), and sit
    below 0.8 of the depth. Raises SteeringError when none does, naming what failed.
    """
    checks = {f"induce > {min_induce:g}": table["induce"] > min_induce, f"kl < {max_kl}": table["kl"] < max_kl}
    checks["layer < 0.8 of the depth"] = table["layer"] < 0.8 * n_layers
    allowed = np.logical_and.reduce(list(checks.values()))
    if not allowed.any():
        counts = ", ".join(f"{name}: {int(ok.sum())} of {len(table)}" for name, ok in checks.items())
        raise SteeringError(
            f"no candidate passes every check ({counts}). Add prompts or candidates, raise max_kl or lower min_induce."
        )
    return candidates[int(table["objective"].where(allowed).idxmin())]


def select_relaxed(
    candidates: Sequence[SteeringVector], table: pd.DataFrame, n_layers: int
) -> tuple[SteeringVector, str]:
    """What `select` takes, or, where no candidate passes, what it takes without the condition on kl, then without that
    on induce either; and which were dropped: "nothing", "kl" or "kl and induce".

    Raises SteeringError when none sits below 0.8 of the depth.
    """
    for dropped, limits in (("nothing", (0.1, 0.0)), ("kl", (np.inf, 0.0))):
        try:
            return select(candidates, table, n_layers, *limits), dropped
        except SteeringError:  # no candidate within these limits
            continue
    return select(candidates, table, n_layers, np.inf, -np.inf), "kl and induce"


def ablating(vector: SteeringVector) -> SteeringVector:
    """The same direction, to be taken out wherever it is written instead of added."""
    return replace(vector, operation="ablate", sign="the direction is taken out: bypasses refusal")


def cosine(a: SteeringVector, b: SteeringVector) -> float:
    """Cosine of the angle between two vectors' directions."""
    return torch.cosine_similarity(a.direction.double(), b.direction.double(), dim=0).item()


def cosine_table(directions: Mapping[str, Float[Tensor, "*shape"]]) -> pd.DataFrame:
    """Cosines between every two of some directions, by name: a row and a column each."""
    rows = torch.stack([direction.flatten().double() for direction in directions.values()])
    rows = rows / rows.norm(dim=1, keepdim=True)
    return pd.DataFrame((rows @ rows.T).numpy(force=True), index=list(directions), columns=list(directions))


# --- comparing vectors by what they do ---------------------------------------------------------------------


WANTED = {"harmless": "refusal", "harmful": "compliance"}
"""What steering should turn answers to: of harmless prompts (vector added) and of harmful ones (subtracted)."""


def judged_grid(
    model: ChatModel,
    prompts: Sequence[str],
    settings: Sequence[tuple[SteeringVector, float]],
    max_new_tokens: int = 24,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """The table of `generate_grid`, an answer a row, with the columns of `judge` beside each answer."""
    answers = generate_grid(model, prompts, settings, max_new_tokens, batch_size)
    verdicts = judge(model, [prompts[i] for i in answers["prompt"]], answers["answer"].tolist())
    return pd.concat([answers, verdicts], axis=1)


ROWS_TOGETHER = 140  # answers that are written in one batch


def answers_both_ways(
    model: ChatModel,
    vectors: Mapping[str, SteeringVector],
    prompts: Mapping[str, Sequence[str]],
    strength: float = 1.0,
    max_new_tokens: int = 24,
) -> pd.DataFrame:
    """Verdicts on the answers to "harmless" prompts with each vector added, and to "harmful" ones with it subtracted.

    A row an answer: side, method (the vector's name), prompt (index), verdict.
    """
    parts = []
    for side, sign in (("harmless", 1), ("harmful", -1)):
        settings = [(vector, sign * strength) for vector in vectors.values()]
        table = judged_grid(model, prompts[side], settings, max_new_tokens, ROWS_TOGETHER)
        names = np.array(list(vectors))[table["setting"]]
        parts.append(pd.DataFrame(dict(side=side, method=names, prompt=table["prompt"], verdict=table["verdict"])))
    return pd.concat(parts, ignore_index=True)


def turned_shares(answers: pd.DataFrame) -> pd.DataFrame:
    """Shares of answers that are turned round (to what is `WANTED`) and that are incoherent: a row a method and side.

    `answers` are those of `answers_both_ways`. Methods that differ in a number at the end are draws of one, as
    "random 0" and "random 1" are of "random". Columns: method, side; value, low, high (turned round) and fallen,
    fallen_low, fallen_high (incoherent), each the mean over draws of the share and of the ends of its 95 % interval;
    largest, the largest share turned round in one draw.
    """
    rows, kinds = [], answers["method"].str.replace(r" \d+$", "", regex=True)
    for (side, name), part in answers.groupby(["side", kinds], sort=False):
        draws = [verdict for _, verdict in part.groupby("method")["verdict"]]
        turned = np.array([rate(verdict == WANTED[side]) for verdict in draws])
        fallen = np.mean([rate(verdict == "incoherent") for verdict in draws], 0)
        rows.append((name, side, *turned.mean(0), turned[:, 0].max(), *fallen))
    columns = ["method", "side", "value", "low", "high", "largest", "fallen", "fallen_low", "fallen_high"]
    return pd.DataFrame(rows, columns=columns)


def beyond_random(table: pd.DataFrame, plain: Mapping[str, float]) -> dict[str, int]:
    """On how many of the two sides each method's whole interval lies above every random draw and the unsteered share.

    `table` is that of `turned_shares`, with "random" among its methods; `plain` the shares that are as `WANTED`
    unsteered, by side.
    """
    found = table.set_index(["side", "method"])
    names = [name for name in found.loc["harmless"].index if name not in ("random", "unsteered")]
    bars = {side: max(found.loc[(side, "random"), "largest"], plain[side]) for side in WANTED}
    return {name: sum(bool(found.loc[(side, name), "low"] > bars[side]) for side in WANTED) for name in names}


# --- controls ----------------------------------------------------------------------------------------------


def shuffled_like(vector: SteeringVector, seed: int) -> SteeringVector:
    """A control: the vector's own coordinates in random order, so that norm and outliers stay (see `random_like`)."""
    order = torch.randperm(len(vector.direction), generator=torch.Generator().manual_seed(seed))
    return replace(vector, direction=vector.direction[order], method=f"shuffled {seed}", sign="none")


def orthogonalised(control: SteeringVector, vector: SteeringVector) -> SteeringVector:
    """A control: `control` without its part along `vector`, at the place and with the norm of `vector`.

    Of a `random_like` vector it is a random direction that shares nothing with the steering vector; of another
    trait's vector, what that one has apart from it. Raises SteeringError when nothing is left.
    """
    rest = control.direction.double()
    for _ in range(2):  # a second time takes out what rounding left of the first
        rest = ablate(rest, vector.direction.double(), 1.0)
    if rest.norm() < 1e-6 * control.norm:
        raise SteeringError("the control is parallel to the vector, so nothing of it is left; give another direction.")
    direction = (rest / rest.norm() * vector.norm).to(vector.direction.dtype)
    return replace(vector, direction=direction, method=f"{control.method}, orthogonalised", sign="none")


def random_with_cosine(vector: SteeringVector, share: float, seed: int) -> SteeringVector:
    """A control: a random vector at the place and with the norm of `vector`, and with the cosine `share` to it.

    It stands for another vector that is that near: what the two have in common it has, too, and nothing more.
    """
    aside = orthogonalised(random_like(vector, seed), vector)
    direction = share * vector.direction + (1 - share**2) ** 0.5 * aside.direction
    return replace(aside, direction=direction, method="random, with a given cosine")
