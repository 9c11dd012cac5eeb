"""Making steering vectors by training: next-token prediction (NTP) and preference optimisation (PO).

One vector learns both directions at once: added with a positive factor it should make the model refuse a harmless
prompt, with a negative one make it answer a harmful prompt (Cheng et al. 2026; PO is RePS of Wu et al. 2025). Only
the vector is trained. What the blocks below it compute never changes, so their output is computed once a response.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import PreTrainedTokenizerBase

from .judges import is_refusal, judge
from .models import ChatModel, Tape, load_model, resume, tape
from .prompts import batches, encode_rows, pad, refusal_wordings
from .record import read_json, result_name, say, stored_results, write_bytes, write_json
from .steering import SteeringVector, add, generate, steer

METHODS = ("NTP", "PO")
UNTAUGHT = {"smollm2-135m-refusal": "smollm2-135m"}  # a model as it was before it learnt to refuse
CHUNK = 32  # prompts answered between two writes of the answers' file


class TrainingError(ValueError):
    """Settings, pairs or files that no vector can be trained from; the message says what to do."""


@dataclass(frozen=True)
class Training:
    """The settings of one trained vector; factors and first tokens are those of Cheng et al. 2026.

    `layer` is the block at whose input the vector is added, at every position of prompt and response. Lengths of the
    vector are measured in the residual stream there: `learning_rate` and `start` are shares of its typical
    coordinate (median norm of a token over the root of d_model), so that one setting serves models of any scale.
    """

    layer: int
    method: str = "NTP"
    factors: tuple[float, ...] = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0)
    response_tokens: int = 64  # of each response, from its start
    phi: float = 1.0  # PO: how much an unlikely wanted answer counts
    learning_rate: float = 0.007  # Adam
    start: float = 0.001  # standard deviation of the first vector's coordinates
    pairs_a_step: int = 16
    pairs_at_once: int = 4  # of similar length, in one forward and backward pass: bounds the memory
    epochs: int = 20  # at most
    patience: int = 3  # epochs without a better validation loss before stopping
    seed: int = 0

    def __post_init__(self):
        counts = (self.response_tokens, self.pairs_a_step, self.pairs_at_once, self.epochs, self.patience)
        if self.method not in METHODS:
            raise TrainingError(f"unknown method {self.method!r}: give {' or '.join(METHODS)}.")
        if min(counts) < 1 or self.pairs_a_step % self.pairs_at_once:
            raise TrainingError("tokens, pairs, epochs and patience must be at least 1, and pairs_a_step a multiple of "
                                f"pairs_at_once; got {counts}.")  # fmt: skip
        if not self.factors or min(self.factors) <= 0:
            raise TrainingError(f"factors {self.factors} must be positive: each pair brings its own sign.")


# --- the pairs of answers to learn from ------------------------------------------------------------------------


def preference_pairs(
    model: ChatModel,
    harmful: Sequence[str],
    harmless: Sequence[str],
    complying: ChatModel,
    per_side: int = 128,
    bypass: SteeringVector | None = None,
    tokens: int = 64,
    seed: int = 0,
    path: Path | str | None = None,
) -> pd.DataFrame:
    """What to learn to say, and what not: a table with the columns prompt, wanted, unwanted, sign, source.

    Harmless prompts (sign +1) want a refusal, one of the book's wordings at random; harmful ones (sign -1) want
    compliance and not the model's own refusal (a wording where it does not refuse by itself). `complying` gives the
    compliant answers of both sides: the un-adapted model (`load_model("smollm2-135m")` for the book's), so that the
    vector owes nothing to another one. A natively aligned model has no such twin: give the model itself, which is
    announced and stands in the column `source`. It then answers as it is, so that only the harmful prompts it does
    not refuse are left, or, as in the paper, steered by `bypass` with strength -1, which makes the methods depend on
    each other. Answers that `judge` does not call compliance are left out.

    Prompts are taken in random order until `per_side` are found. With a `path` the answers are kept there (JSON) as
    they come and an interrupted run goes on; they include answers to harmful prompts, so let it be in the user's cache
    (`weights.cache_folder()`), never in a repository. Raises TrainingError when a side is empty or the file is of
    another run.
    """
    rng = np.random.default_rng(seed)
    sides = {"harmful": rng.permutation(list(harmful)).tolist(), "harmless": rng.permutation(list(harmless)).tolist()}
    wordings = {prompt: str(rng.choice(refusal_wordings())) for prompts in sides.values() for prompt in prompts}
    source = _source(model, complying, bypass)
    about = {"model": [model.name, model.revision], "source": [source, complying.revision]}
    about |= {} if model.dtype == torch.float32 else {"dtype": str(model.dtype)}  # older files are of float32
    about |= {"tokens": tokens, "seed": seed, "prompts": _digest([sides, wordings])}
    if bypass is not None:
        about["bypass"] = _digest(bypass.direction.tolist())
    kept, end = _read_answers(path, about), end_of_turn(model.tokenizer)

    def answer(side: str, prompts: list[str]) -> list[list[str]]:
        """Rows (prompt, compliant, refusing) of the prompts that were answered with compliance."""
        with steer(complying, bypass, -1.0) if bypass is not None else nullcontext():
            answers = generate(complying, prompts, tokens)
        good = (judge(complying, prompts, answers)["verdict"] == "compliance").tolist()
        prompts = [prompt for prompt, is_good in zip(prompts, good) if is_good]
        compliant = finished(complying.tokenizer, [a for a, is_good in zip(answers, good) if is_good], end, tokens)
        own = generate(model, prompts, tokens) if side == "harmful" and prompts else [""] * len(prompts)
        refusing = [text if is_refusal(text) else wordings[prompt] for text, prompt in zip(own, prompts)]
        return [list(row) for row in zip(prompts, compliant, finished(model.tokenizer, refusing, end, tokens))]

    rows = []
    for side, prompts in sides.items():
        found = _collect(side, prompts, per_side, kept, answer, path, about)
        for prompt, compliant, refusing in found:
            rows.append((prompt, refusing, compliant, 1) if side == "harmless" else (prompt, compliant, refusing, -1))
    return pd.DataFrame(rows, columns=["prompt", "wanted", "unwanted", "sign"]).assign(source=source)


def _source(model: ChatModel, complying: ChatModel, bypass: SteeringVector | None) -> str:
    """Where compliant answers come from, in words; announced when that is the model itself."""
    source = complying.name
    if bypass is not None:
        source += f" steered by {bypass.method} at block {bypass.layer}, strength -1"
    if (model.name, model.revision) == (complying.name, complying.revision):
        say(f"compliant answers come from {source}, the model itself: there is no un-adapted one. "
            + ("The trained vectors are not independent of that vector." if bypass is not None
               else "Only harmful prompts that it answers by itself are learnt from."))  # fmt: skip
    return source


def _collect(
    side: str, prompts: list[str], n: int, kept: dict, answer: Callable, path: Path | str | None, about: dict
) -> list[list[str]]:
    """(prompt, compliant, refusing) of the first `n` prompts that have them, going on behind those in `kept`."""
    found = kept.setdefault(side, {"seen": 0, "rows": []})
    while len(found["rows"]) < n and found["seen"] < len(prompts):
        chunk = prompts[found["seen"] : found["seen"] + CHUNK]
        found["rows"] += answer(side, chunk)
        found["seen"] += len(chunk)
        say(f"{side}: {len(found['rows'])} of {found['seen']} answers comply")
        if path is not None:
            write_json(path, {"about": about, "answers": kept})
    if not found["rows"]:
        raise TrainingError(
            f"none of {len(prompts)} {side} prompts got a compliant answer to learn from. Give more prompts, an "
            "un-adapted model as `complying`, or a vector that makes it comply as `bypass`."
        )
    if len(found["rows"]) < n:
        say(f"{side}: only {len(found['rows'])} instead of {n} pairs; give more prompts")
    return found["rows"][:n]


def finished(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str], end: str, tokens: int) -> list[str]:
    """The answers, with the token `end` after those that are shorter than the limit of `tokens` they were given."""
    if not len(answers):
        return []
    lengths = [len(ids) for ids in tokenizer(list(answers), add_special_tokens=False)["input_ids"]]
    return [answer + end * (n < tokens - 1) for answer, n in zip(answers, lengths)]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that the chat template puts right after an assistant's answer (else the end of text)."""
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    after = tokenizer.apply_chat_template(messages, tokenize=False).rsplit("two", 1)[1]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    return tokenizer.convert_ids_to_tokens(ids[0])


def _read_answers(path: Path | str | None, about: dict) -> dict:
    if path is None or not Path(path).exists():
        return {}
    stored = read_json(path)
    if stored["about"] != about:
        raise TrainingError(f"{path} holds other answers (other prompts, models or settings): give another path.")
    return stored["answers"]


def _digest(content) -> str:
    """A short fingerprint of what goes into JSON."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


# --- log-probabilities of responses, by the blocks above the vector only ---------------------------------------


@dataclass(eq=False)
class Responses:
    """Teacher-forced responses, one a row, padded on the right, with the residual stream where the vector goes."""

    residual: Float[Tensor, "row pos d_model"]  # at the input of the vector's block, unsteered
    tape: Tape  # what else the blocks are given; its residuals are dropped
    predicts: Bool[Tensor, "row pos"]  # positions whose next token is a response token
    targets: Int[Tensor, " token"]  # those next tokens, row after row
    real: Bool[Tensor, "row pos"]  # positions that are no padding
    base: Float[Tensor, " row"]  # log p(response | prompt) of the unsteered model, nats

    @property
    def lengths(self) -> Int[Tensor, " row"]:
        """Response tokens a row."""
        return self.predicts.sum(1)


@torch.no_grad()
def hold(model: ChatModel, layer: int, prompts: Sequence[str], responses: Sequence[str], tokens: int = 64) -> Responses:
    """Run prompts with the first `tokens` of their responses once, and hold what later runs need.

    Raises TrainingError for a response without a token.
    """
    before = encode_rows(model.tokenizer, list(prompts))
    after = [row[:tokens] for row in model.tokenizer(list(responses), add_special_tokens=False)["input_ids"]]
    if not all(after):
        raise TrainingError(f"response {after.index([])} is empty; leave its pair out.")
    # Padded on the right, a causal model needs no mask: no real token sees padding.
    rows = pad([p + r for p, r in zip(before, after)], model.tokenizer.pad_token_id, left=False)
    ids, real = (x.to(model.device) for x in rows)
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    for row, (p, r) in enumerate(zip(before, after)):
        predicts[row, len(p) - 1 : len(p) + len(r) - 1] = True
    taken = tape(model, {"input_ids": ids})
    targets = torch.tensor([token for row in after for token in row], device=model.device)
    base = _log_probs(model, taken.final, predicts, targets)
    return Responses(taken.residuals[layer], Tape([], taken.arguments), predicts, targets, real.bool(), base)


def response_log_probs(
    model: ChatModel,
    layer: int,
    held: Responses,
    direction: Float[Tensor, " d_model"],
    factors: Float[Tensor, " row"],
) -> Float[Tensor, " row"]:
    """log p(response | prompt) in nats with factor * direction added at block `layer`'s input, at every position.

    Only blocks >= layer run. Differentiable in `direction`.
    """
    factors = factors.to(held.residual)[:, None, None]
    steered = add(held.residual, direction.to(held.residual), factors)
    final = resume(model, held.tape, layer, steered)
    return _log_probs(model, final, held.predicts, held.targets)


def _log_probs(
    model: ChatModel, final: Float[Tensor, "row pos d_model"], predicts: Tensor, targets: Tensor
) -> Float[Tensor, " row"]:
    """log p(response | prompt), given the final residual; only positions that predict a response are unembedded."""
    logits = model.unembed(final[predicts]).float()
    nll = cross_entropy(logits, targets, reduction="none")
    return torch.zeros(len(final), device=nll.device).index_add(0, predicts.nonzero()[:, 0], -nll)


# --- the two losses --------------------------------------------------------------------------------------------


def preference_losses(
    wanted: Float[Tensor, " pair"],
    unwanted: Float[Tensor, " pair"],
    base_wanted: Float[Tensor, " pair"],
    base_unwanted: Float[Tensor, " pair"],
    n_wanted: Int[Tensor, " pair"],
    n_unwanted: Int[Tensor, " pair"],
    phi: float = 1.0,
) -> Float[Tensor, " pair"]:
    """The PO loss -log sigmoid(Delta) of each pair, from log-probabilities of whole responses (RePS, Wu et al. 2025).

    Delta = (beta / n_w) log p_v(y_w) - (1 / n_l) log p_v(y_l), beta = max(phi (log p(y_l) - log p(y_w)), 1) from the
    unsteered model: the more unlikely the wanted response is at first, the more it counts.
    """
    beta = (phi * (base_unwanted - base_wanted)).clamp(min=1.0)
    return -logsigmoid(beta / n_wanted * wanted - unwanted / n_unwanted)


@dataclass(eq=False)
class _Pack:
    """A few pairs of one direction and similar length, run together."""

    sign: int
    wanted: Responses
    unwanted: Responses | None  # NTP does not look at them

    @property
    def sides(self) -> list[Responses]:
        return [side for side in (self.wanted, self.unwanted) if side is not None]

    @property
    def weight(self) -> int:
        """What the summed loss is divided by: response tokens for NTP, pairs for PO."""
        return int(self.wanted.lengths.sum()) if self.unwanted is None else len(self.wanted.base)


def _pack_loss(pack: _Pack, phi: float, *found: Tensor) -> Tensor:
    """Summed loss of a pack, given the log-probabilities of the responses of its sides."""
    if pack.unwanted is None:
        return -found[0].sum()
    bases, lengths = [side.base for side in pack.sides], [side.lengths for side in pack.sides]
    return preference_losses(*found, *bases, *lengths, phi).sum()


def _steered_loss(model: ChatModel, config: Training, pack: _Pack, direction: Tensor, rng) -> Tensor:
    """Summed loss of a pack under the vector, with a factor drawn for each pair."""
    factors = pack.sign * torch.from_numpy(rng.choice(config.factors, len(pack.wanted.base)))
    found = [response_log_probs(model, config.layer, side, direction, factors) for side in pack.sides]
    loss = _pack_loss(pack, config.phi, *found)
    if not torch.isfinite(loss):
        raise TrainingError(f"the loss is {loss.item()}: lower learning_rate, or use float32.")
    return loss


def _packs(model: ChatModel, pairs: pd.DataFrame, config: Training) -> list[_Pack]:
    """Pairs in packs of similar prompts, with their residuals held."""
    packs = []
    for sign, rows in pairs.groupby("sign"):
        rows = rows.iloc[rows["prompt"].str.len().argsort(kind="stable")]
        for few in batches(list(rows.itertuples()), config.pairs_at_once):
            prompts = [row.prompt for row in few]
            sides = [[row.wanted for row in few], [row.unwanted for row in few]][: 1 + (config.method == "PO")]
            held = [hold(model, config.layer, prompts, side, config.response_tokens) for side in sides]
            packs.append(_Pack(int(sign), held[0], held[1] if len(held) > 1 else None))
    return packs


# --- training --------------------------------------------------------------------------------------------------


def train_vector(
    model: ChatModel,
    train: pd.DataFrame,
    validation: pd.DataFrame,
    config: Training,
    path: Path | str | None = None,
) -> tuple[SteeringVector, pd.DataFrame]:
    """Train one steering vector on `preference_pairs`; the vector of the epoch with the best validation loss.

    Also returns the history, a row an epoch: epoch, train, validation, norm (of the vector, unscaled), seconds. Losses
    are in nats a response token (NTP) or a pair (PO); epoch 0 is the unsteered model. Factors are drawn anew at every
    step, and once and for all for validation. The vector keeps the norm it was trained with, which a factor of 2 to 20
    went with: compare methods at equal norm (`rescaled`).

    With a `path`, a safetensors file is written after every epoch and a killed run goes on there, to the same result;
    `epochs` and `patience` may be raised later. Raises TrainingError for pairs without one of the directions, a file of
    other settings, a loss that is not finite, or a validation loss that never fell.
    """
    for table in (train, validation):
        if set(table["sign"]) != {1, -1}:
            raise TrainingError(f"the pairs have the signs {sorted(set(table['sign']))}; both 1 and -1 are needed.")
    model.site("block_input", config.layer)  # raises for a layer out of range
    about = _about(model, train, validation, config)
    state = _State.read(path, about) or _State.fresh(model.d_model)
    if not stopped(state.losses, config):
        _train(model, train, validation, config, state, lambda: state.write(path, about))
    if np.argmin(state.losses) == 0:
        raise TrainingError(
            f"{config.method} at block {config.layer} never lowered the validation loss of the unsteered model "
            f"({state.losses[0]:.3f} nats): lower learning_rate, or choose another block."
        )
    vector = SteeringVector(state.best, config.layer, config.method, model.name, model.revision,
                            read_at=f"trained on the first {config.response_tokens} response tokens")  # fmt: skip
    return vector, pd.DataFrame(state.history)


def train_vectors(
    model: ChatModel,
    harmful: Sequence[str],
    harmless: Sequence[str],
    config: Training,
    per_side: int,
    bypass: SteeringVector | None = None,
    methods: Sequence[str] = METHODS,
    answers: Path | str | None = None,
    folder: Path | str | None = None,
) -> tuple[dict[str, SteeringVector], dict[str, pd.DataFrame], pd.DataFrame]:
    """Pairs of answers and the vectors trained on them, by method; their histories; the pairs.

    Both directions have equally many pairs (`preference_pairs`), `per_side` or what the poorer one has; the last fifth
    of each is the validation set. Compliant answers come from the model as it was before it learnt to refuse, where
    there is such a one; else from the model itself, steered by `bypass` or, without one, as it is. `config` gives the
    settings; its method is replaced by each of `methods`. Answers are kept at `answers`, half-trained vectors in
    `folder`. Raises TrainingError as `preference_pairs` and `train_vector` do.
    """
    twin = UNTAUGHT.get(model.name)
    complying = load_model(twin, device=str(model.device), dtype=model.dtype) if twin else model
    pairs = preference_pairs(model, harmful, harmless, complying, per_side, None if twin else bypass,
                             config.response_tokens, config.seed, answers)  # fmt: skip
    fewer = int(pairs.groupby("sign").size().min())
    pairs = pairs[pairs.groupby("sign").cumcount() < fewer]
    learnt = pairs.groupby("sign").cumcount() < max(1, fewer * 4 // 5)
    vectors, histories = {}, {}
    for method in methods:
        path = None if folder is None else Path(folder) / f"{method}.safetensors"
        settings = replace(config, method=method)
        vector, histories[method] = train_vector(model, pairs[learnt], pairs[~learnt], settings, path)
        how = f"{vector.read_at}; compliant answers from {pairs['source'].iloc[0]}"
        vectors[method] = replace(vector, read_at=how)
    return vectors, histories, pairs


def rescaled(vector: SteeringVector, norm: float) -> SteeringVector:
    """The same direction with another norm, for example that of the difference in means."""
    return replace(vector, direction=vector.direction * (norm / vector.norm))


def stored_vectors(model: ChatModel, layer: int, own_answers: bool = False) -> dict[str, SteeringVector]:
    """NTP and PO vectors of the full-size training (`make results`) at a block, by method; none where it was not run.

    They were trained on this very model: the result's revision is that of its weights. For a model that complies only
    when steered by DIM there is a second pair that owes DIM nothing: with `own_answers` it is there too, as
    "NTP, own answers" and "PO, own answers".
    """
    try:
        found = stored_results(result_name("trained", model.name))
    except ValueError:  # nobody has trained them for this model
        return {}
    if (found["settings"]["layer"], found["revision"]) != (layer, model.revision):
        return {}
    size, vectors = found["settings"], {}
    for name, row in found["values"].items():
        if name not in METHODS and not own_answers:
            continue
        how = (
            f"{row.get('per_side', size['per_side'])} answers a side, {size['tokens']} tokens each, full-size training"
        )
        how += f"; compliant answers from {row.get('source', size['source'])}"
        direction = torch.tensor(row["direction"])
        vectors[name] = SteeringVector(direction, layer, name, model.name, model.revision, read_at=how)
    return vectors


def learnt_vectors(
    model: ChatModel,
    harmful: Sequence[str],
    harmless: Sequence[str],
    bypass: SteeringVector,
    per_side: int,
    epochs: int,
    tokens: int,
    seed: int = 0,
    own_answers: bool = False,
) -> dict[str, SteeringVector]:
    """NTP and PO vectors at the block of `bypass`, by method: those of `stored_vectors`, else from a brief training.

    That learns from `per_side` answers a side of so many `tokens`, to some of these prompts; where the model has no
    twin that complies, `bypass` makes it (`train_vectors`). Raises TrainingError where there are too few answers.
    """
    if stored := stored_vectors(model, bypass.layer, own_answers):
        return stored
    config = Training(bypass.layer, response_tokens=tokens, pairs_a_step=4, epochs=epochs, seed=seed)
    return train_vectors(model, harmful, harmless, config, per_side, bypass)[0]


def stopped(validation: Sequence[float], config: Training) -> bool:
    """Whether training is over, given the validation losses from epoch 0 on."""
    epochs = len(validation) - 1
    return epochs >= config.epochs or epochs - int(np.argmin(validation or [0.0])) >= config.patience


def _about(model: ChatModel, train: pd.DataFrame, validation: pd.DataFrame, config: Training) -> str:
    """What a half-trained vector belongs to, as JSON."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("epochs", "patience")}
    columns = ["prompt", "wanted", "unwanted", "sign"]
    pairs = _digest([table[columns].values.tolist() for table in (train, validation)])
    return json.dumps(settings | {"model": model.name, "revision": model.revision, "dtype": str(model.dtype),
                                  "pairs": pairs})  # fmt: skip


@dataclass(eq=False)
class _State:
    """The vector being trained, Adam's two moments of its gradient, the best vector yet, and the history."""

    direction: Float[Tensor, " d_model"]
    mean: Float[Tensor, " d_model"]
    square: Float[Tensor, " d_model"]
    best: Float[Tensor, " d_model"]
    step: int
    history: list[dict]

    @property
    def losses(self) -> list[float]:
        """Validation losses from epoch 0 on."""
        return [row["validation"] for row in self.history]

    @classmethod
    def fresh(cls, d_model: int) -> "_State":
        return cls(*torch.zeros(4, d_model), 0, [])

    @classmethod
    def read(cls, path: Path | str | None, about: str) -> "_State | None":
        """What an interrupted training left in the file, or None. Raises TrainingError for another training's."""
        if path is None or not Path(path).exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                words = file.metadata() or {}
                tensors = [file.get_tensor(name) for name in ("direction", "mean", "square", "best")]
        except Exception as error:  # safetensors raises its own error types
            raise TrainingError(f"{path} holds no half-trained vector ({error}): give another path.") from error
        if words.get("about") != about:
            raise TrainingError(f"{path} holds a vector of other settings, pairs or model: give another path.")
        history = json.loads(words["history"])
        say(f"going on after epoch {len(history) - 1} ({path})")
        return cls(*tensors, int(words["step"]), history)

    def write(self, path: Path | str | None, about: str) -> None:
        if path is not None:
            names = ("direction", "mean", "square", "best")
            words = {"about": about, "history": json.dumps(self.history), "step": str(self.step)}
            write_bytes(path, save({name: getattr(self, name).clone() for name in names}, metadata=words))

    def descend(self, gradient: Float[Tensor, " d_model"], rate: float) -> None:
        """One step of Adam (Kingma and Ba 2015) with its usual constants."""
        self.step += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean, square = self.mean / (1 - 0.9**self.step), self.square / (1 - 0.999**self.step)
        self.direction = self.direction - rate * mean / (square.sqrt() + 1e-8)


def _train(model, train, validation, config: Training, state: _State, keep: Callable[[], None]) -> None:
    """Epochs until `stopped`, each written by `keep`."""
    begin = time.time()
    learnt, held_out = (_packs(model, table, config) for table in (train, validation))
    unit = _typical_coordinate(learnt)
    if not state.history:
        noise = torch.randn(model.d_model, generator=torch.Generator().manual_seed(config.seed))
        state.direction = config.start * unit * noise
        losses = [_unsteered_loss(packs, config.phi) for packs in (learnt, held_out)]
        _finish_epoch(state, config, *losses, begin)
    while not stopped(state.losses, config):
        begin = time.time()
        loss = _epoch(model, config, learnt, state, config.learning_rate * unit)
        _finish_epoch(state, config, loss, _validation_loss(model, config, held_out, state.direction), begin)
        keep()


def _finish_epoch(state: _State, config: Training, loss: float, held_out: float, begin: float) -> None:
    """Add a row to the history, keep the vector if it is the best, say so."""
    norm = state.direction.norm().item() if state.history else 0.0
    state.history.append({"epoch": len(state.history), "train": loss, "validation": held_out, "norm": norm,
                          "seconds": round(time.time() - begin, 2)})  # fmt: skip
    if np.argmin(state.losses) == len(state.losses) - 1:
        state.best = state.direction.clone()
    say(f"{config.method} block {config.layer} epoch {state.history[-1]['epoch']} of {config.epochs}: "
        f"train {loss:.4f}, validation {held_out:.4f} (best {min(state.losses):.4f}), norm {norm:.3g}, "
        f"{state.history[-1]['seconds']:.0f} s")  # fmt: skip


def _epoch(model: ChatModel, config: Training, packs: list[_Pack], state: _State, rate: float) -> float:
    """One pass over the pairs; the mean loss along the way. Its draws depend on the seed and the epoch alone."""
    rng = np.random.default_rng([config.seed, len(state.history)])
    total, weight = 0.0, 0
    for step in batches(_mixed(packs, rng), config.pairs_a_step // config.pairs_at_once):
        loss, gradient = _gradient(model, config, step, state.direction, rng)
        parts = sum(pack.weight for pack in step)
        state.descend(gradient / parts, rate)
        total, weight = total + loss, weight + parts
    return total / weight


def _mixed(packs: list[_Pack], rng) -> list[_Pack]:
    """The packs in random order, with the two directions spread evenly: each step sees both."""
    places = np.empty(len(packs))
    for sign in (1, -1):
        index = [i for i, pack in enumerate(packs) if pack.sign == sign]
        places[index] = (rng.permutation(len(index)) + rng.uniform()) / len(index)
    return [packs[i] for i in np.argsort(places)]


def _gradient(model: ChatModel, config: Training, packs: list[_Pack], direction: Tensor, rng) -> tuple[float, Tensor]:
    """The packs' summed loss and its gradient at the vector."""
    direction, total, gradient = direction.detach().requires_grad_(), 0.0, torch.zeros_like(direction)
    for pack in packs:
        loss = _steered_loss(model, config, pack, direction.to(model.device), rng)
        gradient += torch.autograd.grad(loss, direction)[0]
        total += loss.item()
    return total, gradient


@torch.no_grad()
def _validation_loss(model: ChatModel, config: Training, packs: list[_Pack], direction: Tensor) -> float:
    """Mean loss with factors that are the same at every call."""
    rng = np.random.default_rng([config.seed, 0])
    losses = [_steered_loss(model, config, pack, direction.to(model.device), rng).item() for pack in packs]
    return sum(losses) / sum(pack.weight for pack in packs)


def _unsteered_loss(packs: list[_Pack], phi: float) -> float:
    """Mean loss of the model as it is: where training begins."""
    losses = [_pack_loss(pack, phi, *[side.base for side in pack.sides]).item() for pack in packs]
    return sum(losses) / sum(pack.weight for pack in packs)


def _typical_coordinate(packs: list[_Pack]) -> float:
    """Median norm of the residual stream's tokens, over the root of its width."""
    norms = [side.residual[side.real].float().norm(dim=-1).cpu() for pack in packs for side in pack.sides]
    return torch.cat(norms).median().item() / packs[0].wanted.residual.shape[-1] ** 0.5
