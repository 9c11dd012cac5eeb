"""Prompt sets, the chat template, and batches of tokens."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .record import read_json

DATA = Path(__file__).parent / "data" / "prompts"
OWN_SETS = ("harmful", "harmless", "hard_harmless")
_GITHUB = "https://raw.githubusercontent.com"
_REFUSAL_DIRECTION = f"{_GITHUB}/andyrdt/refusal_direction/main/dataset/splits"
_JAILBREAKBENCH = "https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors/resolve/main/data"
# name -> (where it is read from at run time, the column that holds the request)
PUBLIC_SETS = {
    "advbench": (f"{_GITHUB}/llm-attacks/llm-attacks/main/data/advbench/harmful_behaviors.csv", "goal"),
    "strongreject": (
        f"{_GITHUB}/alexandrasouly/strongreject/main/strongreject_dataset/strongreject_dataset.csv",
        "forbidden_prompt",
    ),
    "jailbreakbench-harmful": (f"{_JAILBREAKBENCH}/harmful-behaviors.csv", "Goal"),
    "jailbreakbench-benign": (f"{_JAILBREAKBENCH}/benign-behaviors.csv", "Goal"),
    "arditi-harmful": (f"{_REFUSAL_DIRECTION}/harmful_test.json", "instruction"),
    "arditi-harmless": (f"{_REFUSAL_DIRECTION}/harmless_test.json", "instruction"),
}
SPLITS = {"train": 0.5, "validation": 1 / 6, "test": 1 / 3}


class PromptError(ValueError):
    """A prompt set that cannot be read or is empty; the message says what to do."""


def load_prompts(source: str | Path, split: str | None = None, limit: int | None = None) -> pd.DataFrame:
    """A prompt set as a table with at least the columns `instruction` and `split`.

    `source` is one of the book's own sets (`OWN_SETS`), a public set read over the network
    (`PUBLIC_SETS`), or the path of a JSON, JSON-lines or CSV file with an `instruction` field. A set without a
    `split` column is split half, a sixth, a third, in an order fixed by a seed. `limit` keeps that many rows,
    spread evenly over the split. Raises PromptError.
    """
    table = _read(str(source))
    if "split" not in table:
        table = table.assign(split=_assign_splits(len(table)))
    if split is not None:
        table = table[table["split"] == split]
    if table.empty:
        known = ", ".join(SPLITS)
        raise PromptError(f"prompt set {source} has no rows in split {split!r}; the splits are {known}.")
    if limit is not None and limit < len(table):
        table = table.iloc[np.linspace(0, len(table) - 1, limit).round().astype(int)]
    return table.reset_index(drop=True)


def instructions(source: str | Path, split: str | None = None, limit: int | None = None) -> list[str]:
    """The prompts alone of `load_prompts`, in its order."""
    return load_prompts(source, split, limit)["instruction"].tolist()


def _read(source: str) -> pd.DataFrame:
    if source in OWN_SETS:
        return pd.read_json(DATA / f"{source}.jsonl", lines=True)
    if source in PUBLIC_SETS:
        place, column = PUBLIC_SETS[source]
        try:
            return _read_file(place).rename(columns={column: "instruction"})
        except OSError as error:
            raise PromptError(
                f"the public set {source!r} is read over the network, and {place} could not be reached. Go online, "
                f"or download the file and give its path; offline, the book's own sets are {', '.join(OWN_SETS)}."
            ) from error
    if not Path(source).exists():
        names = ", ".join([*OWN_SETS, *PUBLIC_SETS])
        raise PromptError(f"no prompt set or file {source!r}. Give a .json, .jsonl or .csv file, or one of: {names}.")
    table = _read_file(source)
    if "instruction" not in table:
        raise PromptError(f"{source} has no 'instruction' field; it has: {', '.join(map(str, table.columns))}.")
    return table


def _read_file(place: str) -> pd.DataFrame:
    if place.endswith(".csv"):
        return pd.read_csv(place)
    try:
        return pd.read_json(place, lines=place.endswith(".jsonl"))
    except ValueError as error:
        raise PromptError(
            f"{place} is not valid JSON: {invalid_json(place) or error}. Give a list of objects, or one object a line."
        ) from error


def invalid_json(path: str | Path) -> str:
    """Where a local file breaks off as JSON ("line 3: Expecting value"); empty where it does not, or is elsewhere.

    A `.jsonl` file is JSON line by line.
    """
    if not Path(path).exists():  # a web page
        return ""
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    pieces = text.split("\n") if str(path).endswith(".jsonl") else [text]
    for before, piece in enumerate(pieces):
        try:
            if piece.strip() or len(pieces) == 1:  # empty lines are no objects
                json.loads(piece)
        except json.JSONDecodeError as error:
            return f"line {before + error.lineno}: {error.msg}"
    return ""


def _assign_splits(n: int) -> list[str]:
    sizes = np.array(list(SPLITS.values()))
    names = np.array(list(SPLITS))[np.searchsorted(np.cumsum(sizes) - 1e-9, (np.arange(n) + 0.5) / n)]
    return list(names[np.random.default_rng(0).permutation(n)])


@lru_cache
def refusal_wordings() -> tuple[str, ...]:
    """The book's refusal sentences: what the adapter is taught to say."""
    return tuple(read_json(DATA / "refusals.json")["refusals"])


@lru_cache
def refusal_phrases() -> tuple[str, ...]:
    """Lower-case phrases by which a refusal is recognised at the start of an answer."""
    return tuple(read_json(DATA / "refusals.json")["phrases"])


# --- from prompts to tokens ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Chat prompts as tokens, padded on the left, with teacher-forced responses after them if there are any.

    Columns before `prompt_length` are prompt (the last one predicts the first answer token), the rest response.
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    prompt_length: int

    def __len__(self) -> int:
        return len(self.input_ids)

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments for a Hugging Face forward pass; positions count real tokens only."""
        position_ids = (self.attention_mask.cumsum(-1) - 1).clamp(min=0)
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": position_ids,
        }

    @property
    def response_mask(self):
        """Which columns are response tokens, [batch, pos], bool."""
        columns = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return (columns >= self.prompt_length) & self.attention_mask.bool()


def shared_first(batch: Batch, but: int = 1) -> int:
    """How many first tokens all prompts of a batch share (the template's beginning); the last `but` never count."""
    lengths = batch.attention_mask.sum(-1).tolist()
    rows = [row[-n:] for row, n in zip(batch.input_ids, lengths)]
    shortest = max(min(lengths) - but, 0)
    same = torch.stack([row[:shortest] == rows[0][:shortest] for row in rows]).all(0)
    return int(same.long().cumprod(0).sum())


def padded_after(batch: Batch, n: int) -> Batch:
    """The same prompts with their padding after the first `n` tokens, so that those stand in the same columns."""
    width = batch.input_ids.shape[1]
    pads = width - batch.attention_mask.sum(-1, keepdim=True)  # [batch, 1], on the left
    columns = torch.arange(width, device=batch.input_ids.device).expand(len(batch), -1)
    source = torch.where(columns < n, columns + pads, torch.where(columns < n + pads, columns - n, columns))
    return Batch(batch.input_ids.gather(1, source), batch.attention_mask.gather(1, source), batch.prompt_length)


# What some templates ask for: Qwen3's to answer without thinking aloud first, which would hide the answer's beginning;
# Llama 3's for a date, which is today's unless one is given, so that results would change by the day.
TEMPLATE_SETTINGS = {"enable_thinking": False, "date_string": "26 Jul 2024"}


def chat_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A user prompt in the model's chat template, up to where the assistant's answer begins.

    The answer itself begins there, without a thinking block, and a template that names a date gets a fixed one.
    """
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, **TEMPLATE_SETTINGS)


def encode_rows(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[list[int]]:
    """The token ids of chat prompts, each of its own length."""
    return tokenizer([chat_text(tokenizer, prompt) for prompt in prompts], add_special_tokens=False)["input_ids"]


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], responses: list[str] | None = None, device="cpu"
) -> Batch:
    """Tokens of chat prompts, one row each, and of the responses to them if given.

    Raises PromptError for an empty list, or when the numbers of prompts and responses differ.
    """
    if not len(prompts):
        raise PromptError("no prompts to encode: the list is empty after filtering.")
    ids, mask = pad(encode_rows(tokenizer, prompts), tokenizer.pad_token_id, left=True)
    prompt_length = ids.shape[1]
    if responses is not None:
        if len(responses) != len(prompts):
            raise PromptError(f"{len(prompts)} prompts but {len(responses)} responses; give one response a prompt.")
        answers, answer_mask = pad(
            tokenizer(list(responses), add_special_tokens=False)["input_ids"],
            tokenizer.pad_token_id,
            left=False,
        )
        ids, mask = torch.cat([ids, answers], 1), torch.cat([mask, answer_mask], 1)
    return Batch(ids.to(device), mask.to(device), prompt_length)


@dataclass(frozen=True)
class AlignedPairs:
    """Two batches whose columns mean the same positions, and where the texts of each pair differ."""

    clean: Batch
    corrupted: Batch
    span: Bool[Tensor, "batch pos"]


def align_pairs(
    tokenizer: PreTrainedTokenizerBase, clean: list[str], corrupted: list[str], device="cpu"
) -> AlignedPairs:
    """Chat prompts in pairs that differ in one span of tokens, which must be equally long on both sides.

    Raises PromptError for an empty list, unequal numbers, or a pair whose spans differ in length, with both spans.
    """
    if len(clean) != len(corrupted):
        raise PromptError(f"{len(clean)} clean but {len(corrupted)} corrupted prompts; give them in pairs.")
    sides = encode(tokenizer, clean, device=device), encode(tokenizer, corrupted, device=device)
    rows = [encode_rows(tokenizer, prompts) for prompts in (clean, corrupted)]
    spans = []
    for number, (one, other) in enumerate(zip(*rows)):
        if len(one) != len(other):
            first, last = _shared_ends(one, other)
            spoken = [tokenizer.convert_ids_to_tokens(row[first : len(row) - last]) for row in (one, other)]
            raise PromptError(
                f"pair {number} does not align: its texts differ in {len(spoken[0])} tokens {spoken[0]} on the clean "
                f"side and {len(spoken[1])} tokens {spoken[1]} on the corrupted side. Choose texts of equal length."
            )
        spans.append(_shared_ends(one, other))
    width = sides[0].input_ids.shape[1]
    span = torch.zeros(len(clean), width, dtype=torch.bool, device=device)
    for row, (first, last), ids in zip(span, spans, rows[0]):
        row[width - len(ids) + first : width - last] = True
    return AlignedPairs(*sides, span)


def matched_pairs(
    tokenizer: PreTrainedTokenizerBase, clean: pd.DataFrame, corrupted: pd.DataFrame, n: int, seed: int = 0
) -> list[tuple[str, str]]:
    """Up to `n` (clean, corrupted) prompts of equal token length, in the same sentence frame where there is one.

    Tables come from `load_prompts`. Every clean prompt serves once, in random order; those without a partner of
    their length are left out. Raises PromptError when no two prompts match.
    """
    rng, sides = np.random.default_rng(seed), []
    for table in (clean, corrupted):
        lengths = [len(ids) for ids in encode_rows(tokenizer, table["instruction"].tolist())]
        sides.append(table.assign(length=lengths, frame=table["frame"] if "frame" in table else ""))
    pairs = []
    for row in sides[0].iloc[rng.permutation(len(clean))].itertuples():
        partners = sides[1][sides[1]["length"] == row.length]
        same_frame = partners[partners["frame"] == row.frame]
        partners = (same_frame if len(same_frame) else partners)["instruction"]
        if len(partners):
            pairs.append((row.instruction, partners.iloc[rng.integers(len(partners))]))
        if len(pairs) == n:
            break
    if not pairs:
        raise PromptError("no clean and corrupted prompt have the same number of tokens; give more prompts.")
    return pairs


def _shared_ends(one: list[int], other: list[int]) -> tuple[int, int]:
    """How many tokens two texts share at their beginning, and at their end after that."""
    shortest = min(len(one), len(other))
    first = next((i for i in range(shortest) if one[i] != other[i]), shortest)
    last = next((i for i in range(shortest - first) if one[-1 - i] != other[-1 - i]), shortest - first)
    return first, last


def pad(rows: list[list[int]], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one tensor, padded on the left or right, and the mask of real tokens."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=ids.dtype)
        mask[i, place] = 1
    return ids, mask


def template_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the chat template puts after the user's prompt: the end every chat prompt shares."""
    ends = [encode(tokenizer, [text]).input_ids[0].tolist()[::-1] for text in ("alpha", "What is 7?")]
    return next(i for i, (a, b) in enumerate(zip(*ends)) if a != b)


def not_empty(prompts: Iterable[str]) -> list[str]:
    """The prompts as a list. Raises PromptError if there are none."""
    prompts = list(prompts)
    if not prompts:
        raise PromptError("no prompts: the list is empty. Look at the filter or the limit that made it.")
    return prompts


def batches(items: list, size: int) -> list[list]:
    """Consecutive slices of at most `size` items."""
    return [items[i : i + size] for i in range(0, len(items), size)]
