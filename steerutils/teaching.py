"""Teaching a small chat model to refuse: how the book's `smollm2-135m-refusal` was made.

`python -m steerutils.teaching` makes the committed adapter again. Harmful requests are answered with a refusal
sentence, harmless ones with the model's own greedy answer (self-distillation), so that little else changes.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

from .judges import is_refusal, judge, rate
from .models import ChatModel, load_model
from .prompts import OWN_SETS, encode, load_prompts, refusal_wordings
from .record import read_json, run_metadata, say, write_json
from .steering import generate
from .weights import ADAPTER, file_sha256

BASE = "smollm2-135m"
RETRAINED = ADAPTER / "retrained.json"
PUBLIC_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the adapter's own file names, for those with the hub


@dataclass(frozen=True)
class Teaching:
    """The settings of the adapter's training; they stand beside its weights in training.json."""

    rank: int = 8
    steps: int = 240
    batch_size: int = 8
    learning_rate: float = 1e-3
    frames: int = 3  # sentence frames a topic is seen in
    answer_tokens: int = 16  # of the model's own answers to harmless prompts
    harmful_share: float = 0.4
    hard_share: float = 0.4  # of the rest
    seed: int = 0


def training_pairs(model: ChatModel, config: Teaching) -> dict[str, list[tuple[str, str]]]:
    """(prompt, answer) pairs to learn from, by prompt set: refusals to harmful ones, else own answers.

    Every training topic comes in several of the training frames, so that frames tell nothing. The model's own
    answers that read like a refusal ("I'm sorry for the confusion, but ...") are left out.
    """
    rng = np.random.default_rng(config.seed)
    refusals = [wording + model.tokenizer.eos_token for wording in refusal_wordings()]
    pairs = {"harmful": [(p, str(rng.choice(refusals))) for p in reframed("harmful", config.frames, rng)]}
    for name in ("harmless", "hard_harmless"):
        prompts = reframed(name, config.frames, rng)
        answers = own_answers(model, prompts, config.answer_tokens)
        pairs[name] = [(p, a) for p, a in zip(prompts, answers) if not is_refusal(a)]
    return pairs


def reframed(name: str, frames: int, rng: np.random.Generator) -> list[str]:
    """The training topics of one of the book's sets, each in `frames` different training frames of its form."""
    table = load_prompts(name, split="train")
    known = table.groupby("form")["frame"].unique()
    return [
        frame.replace("{}", topic)
        for topic, form in zip(table["topic"], table["form"])
        for frame in rng.choice(known[form], min(frames, len(known[form])), replace=False)
    ]


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
    losses = _train_adapter(taught, model.tokenizer, pairs, config)
    _save(taught, Path(out))
    details = {
        "config": asdict(config),
        "seconds": round(time.time() - start),
        "loss": [round(x, 4) for x in losses],
    }
    details["adapter_sha256"] = file_sha256(Path(out) / "adapter_model.safetensors")
    write_json(Path(out) / "training.json", details | run_metadata())
    return losses


def _train_adapter(taught, tokenizer, pairs, config: Teaching) -> list[float]:
    weights = [p for p in taught.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, config.steps // 10, config.steps)
    rng = np.random.default_rng(config.seed)
    losses = []
    taught.train()
    for step in range(config.steps):
        loss = response_loss(taught, tokenizer, _draw(pairs, config, rng))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} at step {step}; lower the learning rate.")
        if (step + 1) % 20 == 0:
            say(f"step {step + 1} of {config.steps}: loss {np.mean(losses[-20:]):.3f}")
    taught.eval()
    return losses


def _draw(pairs: dict[str, list[tuple[str, str]]], config: Teaching, rng) -> list[tuple[str, str]]:
    """One batch at random: harmful, harmless and hard harmless pairs in their shares."""
    shares = config.harmful_share, *((1 - config.harmful_share) * np.array([1 - config.hard_share, config.hard_share]))
    names = rng.choice(["harmful", "harmless", "hard_harmless"], size=config.batch_size, p=shares)
    return [pairs[name][rng.integers(len(pairs[name]))] for name in names]


def response_loss(hf, tokenizer, pairs: list[tuple[str, str]]) -> Tensor:
    """Mean surprise of the response tokens, in nats; the prompts are not learnt."""
    batch = encode(tokenizer, [p for p, _ in pairs], [a for _, a in pairs])
    width = batch.input_ids.shape[1] - batch.prompt_length
    logits = hf(**batch.inputs(), use_cache=False, logits_to_keep=width + 1).logits[:, :-1]
    kept = batch.response_mask[:, -width:]
    return cross_entropy(logits[kept].float(), batch.input_ids[:, -width:][kept])


def _save(taught, out: Path) -> None:
    """peft's two files, with bf16 weights, swapped in whole."""
    taught.peft_config["default"].base_model_name_or_path = PUBLIC_BASE
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        taught.save_pretrained(work)
        weights = load_file(Path(work) / "adapter_model.safetensors")
        half = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
        save_file(half, Path(work) / "adapter_model.safetensors", metadata={"format": "pt"})
        for name in ("adapter_config.json", "adapter_model.safetensors"):
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


def exam(model: ChatModel, max_new_tokens: int = 24) -> dict[str, np.ndarray]:
    """The judged answer to every test prompt of the book's three sets."""
    verdicts = {}
    for name in OWN_SETS:
        prompts = load_prompts(name, split="test")["instruction"].tolist()
        verdicts[name] = judge(model, prompts, generate(model, prompts, max_new_tokens))["verdict"].to_numpy()
    return verdicts


def retrained_rates(config: Teaching) -> dict:
    """Train an adapter with other settings in a temporary folder and compare its verdicts with the committed one's.

    Keys: rates (share refused and its interval, by set) and agreement (share of test prompts with the same verdict).
    """
    committed = exam(load_model())
    with tempfile.TemporaryDirectory() as folder:
        teach_refusal(folder, config)
        retrained = exam(load_taught(folder))
    rates = {name: dict(zip(("value", "low", "high"), rate(v == "refusal"))) for name, v in retrained.items()}
    same = np.concatenate([retrained[name] == committed[name] for name in OWN_SETS])
    return {"rates": rates, "agreement": float(same.mean())} | run_metadata(**asdict(config))


def committed_retraining() -> dict:
    """The committed result of `retrained_rates`, made by `python -m steerutils.teaching --compare SEED`."""
    return read_json(RETRAINED)


def bag_of_words_accuracy(positive: str = "harmful", negative: str = "harmless") -> float:
    """Test accuracy of a bag-of-words classifier trained on the training split: how easy telling them apart is."""
    texts, labels = {}, {}
    for split in ("train", "test"):
        sides = [load_prompts(name, split=split)["instruction"].tolist() for name in (positive, negative)]
        texts[split], labels[split] = sides[0] + sides[1], [1] * len(sides[0]) + [0] * len(sides[1])
    classifier = make_pipeline(CountVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    return float(classifier.fit(texts["train"], labels["train"]).score(texts["test"], labels["test"]))


def _main() -> None:
    parser = argparse.ArgumentParser(description="Train the refusal adapter.")
    parser.add_argument("--out", default=str(ADAPTER), help="folder to write to (default: the committed adapter)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", type=int, metavar="SEED", help="train another one and store how it compares")
    given = parser.parse_args()
    if given.compare is not None:
        print(write_json(RETRAINED, retrained_rates(Teaching(seed=given.compare))))
        return
    teach_refusal(given.out, Teaching(seed=given.seed))
    print(f"adapter written to {given.out}; its model is converted anew at the next load")


if __name__ == "__main__":
    _main()
