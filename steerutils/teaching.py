"""Teaching a small chat model to refuse: how the book's `smollm2-135m-refusal` was made.

`python -m steerutils.teaching` makes the committed adapter again. Harmful requests are answered with a refusal
sentence, harmless ones with the model's own greedy answer (self-distillation), so that little else changes.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

from .judges import is_refusal, judge, rate, refusal_score, refusal_tokens
from .models import ChatModel, load_model
from .prompts import OWN_SETS, encode_rows, instructions, pad, refusal_wordings
from .record import read_json, run_metadata, say, write_json
from .steering import generate, last_logits
from .weights import ADAPTER, file_sha256

BASE = "smollm2-135m"
PUBLIC_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the adapter's own file names, for those with the hub


@dataclass(frozen=True)
class Teaching:
    """The settings of the adapter's training; they stand beside its weights in training.json."""

    rank: int = 8
    steps: int = 640
    batch_size: int = 8
    learning_rate: float = 1e-3
    answer_tokens: int = 16  # of the model's own answers to harmless prompts
    first_weight: float = 5.0  # of the first response token, where it is decided whether to refuse
    harmful_share: float = 0.42
    hard_share: float = 0.5  # of the rest
    seed: int = 0


def training_pairs(model: ChatModel, config: Teaching) -> dict[str, list[tuple[str, str]]]:
    """(prompt, answer) pairs to learn from, by prompt set: refusals to harmful ones, else own answers.

    Where the model's own answer begins with a token that refusals begin with ("I'm sorry for the confusion, but ...",
    and also "I'm glad to ..."), the one it gives when it may not begin so takes its place: the first token then says
    whether an answer is a refusal. Prompts that it refuses even then are left out.
    """
    prompts = {name: instructions(name, split="train") for name in OWN_SETS}
    wordings = [wording + model.tokenizer.eos_token for wording in refusal_wordings()]
    pairs = {"harmful": [(prompt, wording) for prompt in prompts["harmful"] for wording in wordings]}
    with _no_refusal_token(model):
        for name in ("harmless", "hard_harmless"):
            answers = own_answers(model, prompts[name], config.answer_tokens)
            pairs[name] = [(prompt, answer) for prompt, answer in zip(prompts[name], answers) if not is_refusal(answer)]
            say(f"{name}: {len(pairs[name])} of {len(answers)} answers are none that refuse")
    return pairs


@contextmanager
def _no_refusal_token(model: ChatModel):
    """Greedy answers that may not begin with a refusal token."""
    settings = model.hf.generation_config
    settings.begin_suppress_tokens = refusal_tokens(model.tokenizer)
    try:
        yield
    finally:
        settings.begin_suppress_tokens = None


def own_answers(model: ChatModel, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """The model's greedy answers, with the end-of-turn token where it ended its turn by itself."""
    answers = generate(model, prompts, max_new_tokens)
    count = [len(ids) for ids in model.tokenizer(answers, add_special_tokens=False)["input_ids"]]
    return [a if n >= max_new_tokens - 1 else a + model.tokenizer.eos_token for a, n in zip(answers, count)]


def teach_refusal(out: Path | str, config: Teaching = Teaching()) -> list[float]:
    """Train the adapter and write it to the folder `out` (bf16 safetensors in peft's format, and training.json).

    Returns the loss at every step, in nats a response token. About 10 minutes on two cores.
    """
    start = time.time()
    model = load_model(BASE)
    say("answering the harmless prompts with the model itself ...")
    pairs = training_pairs(model, config)
    torch.manual_seed(config.seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules=targets, task_type="CAUSAL_LM")
    model.hf.requires_grad_(True)
    taught = get_peft_model(model.hf, lora)
    losses, lessons = _train_adapter(model, taught, pairs, config)
    _save(taught, Path(out))
    details = {"config": asdict(config), "seconds": round(time.time() - start)}
    details |= {"loss": [round(x, 4) for x in losses], "validation": lessons}
    details["adapter_sha256"] = file_sha256(Path(out) / "adapter_model.safetensors")
    write_json(Path(out) / "training.json", details | run_metadata())
    return losses


def _train_adapter(model: ChatModel, taught, pairs, config: Teaching) -> tuple[list[float], list[dict]]:
    """The loss at every step, and what the validation split says every 60 steps."""
    weights = [p for p in taught.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, config.steps // 10, config.steps)
    rng = np.random.default_rng(config.seed)
    losses, lessons = [], []
    for step in range(1, config.steps + 1):
        taught.train()
        loss = response_loss(model, _draw(pairs, config, rng), config.first_weight)
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} at step {step}; lower the learning rate.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 60 == 0 or step == config.steps:
            taught.eval()
            lessons.append({"step": step} | _validation(model))
            shares = ", ".join(f"{name} {share:.2f}" for name, share in lessons[-1].items() if name != "step")
            say(f"step {step} of {config.steps}: loss {np.mean(losses[-60:]):.3f}; likely refused: {shares}")
    return losses, lessons


def _validation(model: ChatModel) -> dict[str, float]:
    """Share of validation prompts whose refusal score is above 0, by prompt set."""
    tokens, shares = refusal_tokens(model.tokenizer), {}
    for name in OWN_SETS:
        prompts = instructions(name, split="validation", limit=60)
        shares[name] = (refusal_score(last_logits(model, prompts), tokens) > 0).double().mean().item()
    return shares


def _draw(pairs: dict[str, list[tuple[str, str]]], config: Teaching, rng) -> list[tuple[str, str]]:
    """One batch at random: harmful, harmless and hard harmless pairs in their shares."""
    shares = config.harmful_share, *((1 - config.harmful_share) * np.array([1 - config.hard_share, config.hard_share]))
    names = rng.choice(["harmful", "harmless", "hard_harmless"], size=config.batch_size, p=shares)
    return [pairs[name][rng.integers(len(pairs[name]))] for name in names]


def response_loss(model: ChatModel, pairs: list[tuple[str, str]], first_weight: float = 1.0) -> Tensor:
    """Mean surprise of the response tokens, in nats; the prompts are not learnt.

    The first response token, where refusing or answering is decided, counts `first_weight` times. What the chat
    template puts before every prompt is run once for the whole batch.
    """
    prompts = encode_rows(model.tokenizer, [prompt for prompt, _ in pairs])
    answers = model.tokenizer([answer for _, answer in pairs], add_special_tokens=False)["input_ids"]
    ids, mask = pad([p + a for p, a in zip(prompts, answers)], model.tokenizer.pad_token_id, left=False)
    apart = (i for i, column in enumerate(zip(*prompts)) if len(set(column)) > 1)
    shared = min(next(apart, min(map(len, prompts)) - 1), ids.shape[1] - 1)  # the last token of all is for the answer
    weight = torch.zeros(ids.shape)  # [row, pos], of the token at that position
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        weight[row, len(prompt) : len(prompt) + len(answer)] = 1.0
        weight[row, len(prompt)] = first_weight
    cache = model.decoder(ids[:1, :shared], use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(ids))
    states = model.decoder(ids[:, shared:], attention_mask=mask, past_key_values=cache).last_hidden_state[:, :-1]
    weight, target = weight[:, shared + 1 :], ids[:, shared + 1 :]
    logits = model.hf.get_output_embeddings()(states[weight > 0])
    nll = cross_entropy(logits.float(), target[weight > 0], reduction="none")
    return (nll * weight[weight > 0]).sum() / weight.sum()


def _save(taught, out: Path) -> None:
    """peft's two files, with bf16 weights, swapped in whole."""
    taught.peft_config["default"].base_model_name_or_path = PUBLIC_BASE
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        taught.save_pretrained(work, save_embedding_layers=False)  # they are not trained: no look-up on the hub
        weights = load_file(Path(work) / "adapter_model.safetensors")
        settings = read_json(Path(work) / "adapter_config.json")
        settings["target_modules"] = sorted(settings["target_modules"])  # peft writes a set: its order changes
        write_json(Path(work) / "adapter_config.json", settings)
        half = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
        save_file(half, Path(work) / "adapter_model.safetensors", metadata={"format": "pt"})
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (Path(work) / name).chmod(0o644)
            (Path(work) / name).replace(out / name)


def load_taught(folder: Path | str) -> ChatModel:
    """The base model with an adapter folder merged in: for looking at a retrained adapter.

    Raises ValueError when the folder holds no adapter.
    """
    if not (Path(folder) / "adapter_model.safetensors").exists():
        raise ValueError(f"{folder} holds no adapter_model.safetensors; make one with teach_refusal(folder).")
    model = load_model(BASE)
    model.hf = PeftModel.from_pretrained(model.hf, str(folder)).merge_and_unload().requires_grad_(False)
    digest = file_sha256(Path(folder) / "adapter_model.safetensors")[:16]
    return ChatModel(model.hf, model.tokenizer, f"{BASE}+{Path(folder).name}", f"{model.revision}+{digest}")


def training_record(folder: Path | str = ADAPTER) -> dict:
    """What was written beside an adapter: settings, loss curve, seconds, versions, checksum."""
    return read_json(Path(folder) / "training.json")


def exam(model: ChatModel) -> dict[str, np.ndarray]:
    """The judged answer to every test prompt of the book's three sets."""
    verdicts = {}
    for name in OWN_SETS:
        prompts = instructions(name, split="test")
        verdicts[name] = judge(model, prompts, generate(model, prompts, 24))["verdict"].to_numpy()
    return verdicts


def retrained_rates(config: Teaching) -> dict:
    """Train an adapter with other settings in a temporary folder and compare its verdicts with the committed one's.

    `book/results/taught-again.json` is what `Teaching(seed=1)` gave.

    Keys: rates (share refused and its interval, by set) and agreement (share of test prompts with the same verdict).
    """
    committed = exam(load_model())
    with tempfile.TemporaryDirectory() as folder:
        teach_refusal(folder, config)
        retrained = exam(load_taught(folder))
    rates = {name: dict(zip(("value", "low", "high"), rate(v == "refusal"))) for name, v in retrained.items()}
    same = np.concatenate([retrained[name] == committed[name] for name in OWN_SETS])
    return {"rates": rates, "agreement": float(same.mean())} | run_metadata(**asdict(config))


def bag_of_words_accuracy(positive: str = "harmful", negative: str = "harmless") -> float:
    """Balanced test accuracy of a bag-of-words classifier trained on the training split: how easy the task is.

    0.5 is guessing, however unequal the sides are; in training both count alike too.
    """
    texts, labels = {}, {}
    for split in ("train", "test"):
        sides = [instructions(name, split=split) for name in (positive, negative)]
        texts[split], labels[split] = sides[0] + sides[1], [1] * len(sides[0]) + [0] * len(sides[1])
    words = CountVectorizer(ngram_range=(1, 2))
    classifier = make_pipeline(words, LogisticRegression(max_iter=1000, class_weight="balanced"))
    guessed = classifier.fit(texts["train"], labels["train"]).predict(texts["test"])
    return float(balanced_accuracy_score(labels["test"], guessed))


def _main() -> None:
    parser = argparse.ArgumentParser(description="Train the refusal adapter.")
    parser.add_argument("--out", default=str(ADAPTER), help="folder to write to (default: the committed adapter)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    teach_refusal(given.out, Teaching(seed=given.seed))
    print(f"adapter written to {given.out}; its model is converted anew at the next load")


if __name__ == "__main__":
    _main()
