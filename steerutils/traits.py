"""Personality traits: contrast statements, judges of the trait that a text shows, and vectors made from statements."""

import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from huggingface_hub import hf_hub_download
from jaxtyping import Bool, Float
from pandas.api.types import is_numeric_dtype
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as hf_logging

from .attribution import (
    Contrast,
    Metric,
    attribute,
    graph_of,
    left,
    response_log_probability,
    steering_contrast,
    token_contrast,
)
from .judges import judge
from .models import ChatModel, capture
from .prompts import Batch, batches, encode, invalid_json, matched_pairs
from .ranking import ends_of_layers, layer_patching
from .record import kept_arrays, read_json
from .steering import SteeringVector, generate, generate_grid, steer, vector_key
from .vectors import mean_difference
from .weights import sentence_embedder

STATEMENTS = Path(__file__).parent / "data" / "traits" / "statements.jsonl"
TRAITS = ("extraversion", "agreeableness", "neuroticism", "openness", "conscientiousness")
CHOICE = TRAITS[:3]  # what A2A and PersonalityEdit choose among
PERSONA = "https://raw.githubusercontent.com/anthropics/evals/main/persona/{}.jsonl"


class TraitError(ValueError):
    """Statements or a classifier that cannot be read or do not fit; the message says what to do."""


# --- statements --------------------------------------------------------------------------------------------------


def load_traits(source: str | Path, trait: str, split: str | None = None) -> pd.DataFrame:
    """Statements of a trait as a table with the columns topic, statement, pole and split.

    `source` is "statements" (the book's own: poles high, low, neutral), "persona" (the public persona statements of
    anthropics/evals, read over the network; high and low), the path of a `.jsonl` file of either format, or that of
    a PersonalityEdit file or folder (`train.json`, `val.json`, `test.json`; high, and "other" for the texts of its
    other traits, as it has no low ones). Raises TraitError.
    """
    if trait not in TRAITS:
        raise TraitError(f"unknown trait {trait!r}; the traits are {', '.join(TRAITS)}.")
    table = _read(str(source), trait)
    if split is not None:
        table = table[table["split"] == split]
    if table.empty:
        raise TraitError(f"{source} has no statements of {trait} in split {split!r} (train, validation or test).")
    return table.reset_index(drop=True)


def _read(source: str, trait: str) -> pd.DataFrame:
    if source == "statements":
        return _own(pd.read_json(STATEMENTS, lines=True), trait)
    if source == "persona":
        place = PERSONA.format(trait)
        try:
            return _persona(pd.read_json(place, lines=True), place)
        except OSError as error:
            raise TraitError(
                f"the public persona statements could not be reached at {place}. Go online, or download the file and "
                "give its path; offline, use 'statements', the book's own."
            ) from error
    if not Path(source).exists():
        raise TraitError(
            f"no statements or file {source!r}. Give 'statements', 'persona', a .jsonl file, or PersonalityEdit's "
            "folder, which its authors share through EasyEdit's examples/PersonalityEdit.md."
        )
    if source.endswith(".jsonl"):
        table = _parsed(partial(pd.read_json, lines=True), source)
        return _own(table, trait) if "split" in table else _persona(table, source)
    return _personality_edit(Path(source), trait)


def _parsed(read: Callable, path: str | Path):
    """What `read` makes of a local JSON file. Raises TraitError, with the line, for one that is no JSON."""
    try:
        return read(path)
    except ValueError as error:
        raise TraitError(
            f"{path} is not valid JSON: {invalid_json(path) or error}. Download it again, or correct it."
        ) from error


def _own(table: pd.DataFrame, trait: str) -> pd.DataFrame:
    rows = [
        (row["topic"], text, pole, row["split"])
        for row in table.to_dict("records")
        for pole, text in (row[trait] | {"neutral": row["neutral"]}).items()
    ]
    return pd.DataFrame(rows, columns=["topic", "statement", "pole", "split"])


def _persona(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """Whoever shows the trait would say yes (high) or no (low) to a statement; the statement is its own topic."""
    if missing := {"statement", "answer_matching_behavior"} - set(table):
        raise TraitError(f"{source} has no {', '.join(sorted(missing))}: it is no file of persona statements.")
    pole = table["answer_matching_behavior"].str.strip().str.lower().map({"yes": "high", "no": "low"})
    splits = np.resize(["train", "train", "train", "validation", "test"], len(table))
    return pd.DataFrame(
        {"topic": table["statement"], "statement": table["statement"], "pole": pole, "split": splits}
    ).dropna()


def _personality_edit(path: Path, trait: str) -> pd.DataFrame:
    if trait not in CHOICE:
        raise TraitError(f"PersonalityEdit has {', '.join(CHOICE)} only, not {trait}.")
    names = {"train": "train", "val": "validation", "test": "test"}
    files = [path / f"{name}.json" for name in names] if path.is_dir() else [path]
    rows = []
    for file in files:
        if not file.exists():
            raise TraitError(f"{path} has no {file.name}; PersonalityEdit's folder holds train, val and test.json.")
        for item in _parsed(read_json, file):
            if missing := {"ent", *CHOICE} - set(item):
                raise TraitError(f"{file} has no {', '.join(sorted(missing))}: it is no file of PersonalityEdit.")
            for name in CHOICE:
                pole = "high" if name == trait else "other"
                rows += [(item["ent"], text, pole, names.get(file.stem, file.stem)) for text in item[name]]
    return pd.DataFrame(rows, columns=["topic", "statement", "pole", "split"])


def further_topics(split: str) -> list[str]:
    """Topics that the book has no statements on, for questions only: of "validation" or "test". Raises TraitError."""
    table = pd.read_json(STATEMENTS.with_name("asked.jsonl"), lines=True)
    if split not in set(table["split"]):
        raise TraitError(f"there are no further topics in split {split!r}: ask for validation or test.")
    return table.loc[table["split"] == split, "topic"].tolist()


def general_statements(trait: str) -> pd.DataFrame:
    """The book's statements of a trait that are about no topic: further examples for the judge, for training only."""
    table = pd.read_json(STATEMENTS.with_name("general.jsonl"), lines=True)
    return table[table["trait"] == trait].reset_index(drop=True)


def generated_examples() -> pd.DataFrame:
    """Steered answers that the project labelled by hand, from the text alone, for testing a judge only.

    Columns topic, answer, trait (the one that was looked for), label (high, low, neither), model (whose answer).
    """
    return pd.read_json(STATEMENTS.with_name("generated.jsonl"), lines=True)


def load_safeedit(split: str = "train", path: str | Path | None = None) -> pd.DataFrame:
    """SafeEdit's rows as a table with the columns question, prompt (adversarial), safe and unsafe (answers).

    Read from a local JSON file, or from the hub, where its owners must have granted access. Raises TraitError.
    """
    if path is None:
        try:
            path = hf_hub_download("zjunlp/SafeEdit", f"SafeEdit_{split}.json", repo_type="dataset")
        except (OSError, ValueError) as error:
            raise TraitError(
                f"SafeEdit_{split}.json could not be had from the hub's zjunlp/SafeEdit. It is gated: go online, ask "
                "for access on its page and log in with `hf auth login`, or give the path of a downloaded file."
            ) from error
    if not Path(path).exists():
        raise TraitError(f"no file {path}; SafeEdit's are SafeEdit_train.json, SafeEdit_val.json, SafeEdit_test.json.")
    names = {"question": "question", "adversarial prompt": "prompt"}
    names |= {"safe generation": "safe", "unsafe generation": "unsafe"}
    table = pd.DataFrame(_parsed(read_json, path))
    if missing := set(names) - set(table):
        raise TraitError(f"{path} has no {', '.join(sorted(missing))}: it is no file of SafeEdit.")
    return table.rename(columns=names)[list(names.values())]


# --- sentence embeddings -----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _embedder():
    folder = sentence_embedder()
    if not sys.stderr.isatty():
        hf_logging.disable_progress_bar()  # as in load_model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return AutoTokenizer.from_pretrained(folder), model.to(device)


@torch.no_grad()
def sentence_embeddings(texts: Sequence[str], batch_size: int = 64) -> Float[np.ndarray, "text layer d"]:
    """Means over each text's tokens inside all-MiniLM-L6-v2, of unit length: its embedding layer, then each block.

    The last one is what the model is published for; the earlier ones keep more of the single words. A text is cut
    after 256 tokens.
    """
    tokenizer, model = _embedder()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    rows = [None] * len(texts)
    for chunk in batches(order, batch_size):
        inputs = tokenizer(
            [texts[i] for i in chunk], padding=True, truncation=True, max_length=256, return_tensors="pt"
        ).to(model.device)
        mask = inputs["attention_mask"][..., None]
        states = model(**inputs, output_hidden_states=True).hidden_states
        means = torch.stack([(h * mask).sum(1) / mask.sum(1) for h in states], 1)  # [text, layer, d]
        for i, row in zip(chunk, torch.nn.functional.normalize(means, dim=-1).cpu()):
            rows[i] = row
    return torch.stack(rows).numpy()


# --- judges ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TraitJudge:
    """Logistic regressions on sentence embeddings: high against low for each trait, and a choice among `CHOICE`."""

    poles: Mapping[str, LogisticRegression]
    choice: LogisticRegression


def _features(texts: Sequence[str], topics: Sequence[str]) -> Float[np.ndarray, "text feature"]:
    """Embeddings of texts, layer by layer, without their part along the embedding of what they are about."""
    about = sorted({topic for topic in topics if topic})
    rows = sentence_embeddings(texts)
    if about:
        along = dict(zip(about, sentence_embeddings(about)))
        directions = np.stack([along[topic] if topic else np.zeros_like(rows[0]) for topic in topics])
        rows = rows - (rows * directions).sum(-1, keepdims=True) * directions
    return rows.reshape(len(rows), -1)


@lru_cache(maxsize=4)
def train_judge(source: str | Path | None = "statements") -> TraitJudge:
    """The offline judge: trained on the training topics' statements, and on the book's general ones.

    Without a `source` on the general ones alone: no vector is made from those, so that such a judge cannot take a
    vector's own words for its trait. Raises TraitError.
    """
    poles, highs = {}, {}
    for trait in TRAITS:
        high, features = _general_examples(trait)
        if source is not None:
            load_traits(source, trait, "train")  # raises where there are none
            table, of_own = _own_examples(source, trait)
            learnt = (table["split"] == "train").to_numpy()
            high = np.concatenate([(table["pole"] == "high").to_numpy()[learnt], high])
            features = np.concatenate([of_own[learnt], features])
        poles[trait] = _regression().fit(features, high)
        highs[trait] = features[high]
    labels = np.repeat(CHOICE, [len(highs[trait]) for trait in CHOICE])
    choice = _regression().fit(np.concatenate([highs[trait] for trait in CHOICE]), labels)
    return TraitJudge(poles, choice)


@lru_cache(maxsize=len(TRAITS))
def _general_examples(trait: str) -> tuple[Bool[np.ndarray, " text"], Float[np.ndarray, "text feature"]]:
    """Which of the general statements of a trait show its high end, and the features of all."""
    table = general_statements(trait)
    return (table["pole"] == "high").to_numpy(), _features(table["statement"].tolist(), [""] * len(table))


@lru_cache(maxsize=len(TRAITS))
def _own_examples(source: str | Path, trait: str) -> tuple[pd.DataFrame, Float[np.ndarray, "text feature"]]:
    """The statements of a source, of any split, that show an end of a trait, and their features."""
    table = load_traits(source, trait)
    table = table[table["pole"].isin(["high", "low"])].reset_index(drop=True)
    return table, _features(table["statement"].tolist(), table["topic"].tolist())


def _regression() -> LogisticRegression:
    return LogisticRegression(class_weight="balanced", max_iter=1000)


def judge_traits(judge: TraitJudge, texts: Sequence[str], topics: Sequence[str]) -> pd.DataFrame:
    """What traits texts show: a column a trait, the probability of its high end against its low one, and `choice`.

    `topics` says what each text is about ("" if nothing is known). Pass coherent texts only: the judge has an opinion
    on gibberish too.
    """
    features = _features(list(texts), list(topics))
    table = pd.DataFrame({trait: model.predict_proba(features)[:, 1] for trait, model in judge.poles.items()})
    return table.assign(choice=judge.choice.predict(features))


def judged_right(trait_judge: TraitJudge, statements: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Whether a judge tells traits' ends apart: a row a statement, the columns topic, pole, trait, right, chosen.

    `statements` maps a trait to a table of `load_traits` without neutral ones: with as many high as low, the share
    right is the balanced accuracy. `chosen` says whether the judge picks the trait in its choice among `CHOICE`.
    """
    tables = []
    for trait, table in statements.items():
        found = judge_traits(trait_judge, table["statement"].tolist(), table["topic"].tolist())
        right = (found[trait] > 0.5).to_numpy() == (table["pole"] == "high").to_numpy()
        chosen = (found["choice"] == trait).to_numpy()
        tables.append(table[["topic", "pole"]].assign(trait=trait, right=right, chosen=chosen))
    return pd.concat(tables, ignore_index=True)


def cross_judged(source: str | Path = "statements", folds: int = 5) -> pd.DataFrame:
    """Whether judges tell the ends of every trait apart in statements about topics that they have not seen.

    A row a statement of any split, the columns topic, pole, trait, right. All topics are dealt into `folds`, and each
    is judged by a judge like that of `train_judge` that has learnt from the others, and from the general statements:
    an estimate from all topics where `judged_right` has the test topics alone. Raises TraitError.
    """
    tables = []
    for trait in TRAITS:
        table, features = _own_examples(source, trait)
        high, right = (table["pole"] == "high").to_numpy(), np.zeros(len(table), bool)
        general_high, general = _general_examples(trait)
        for learnt, left_out in GroupKFold(folds).split(features, groups=table["topic"]):
            seen, labels = (
                np.concatenate(rows) for rows in ((features[learnt], general), (high[learnt], general_high))
            )
            right[left_out] = _regression().fit(seen, labels).predict(features[left_out]) == high[left_out]
        tables.append(table[["topic", "pole"]].assign(trait=trait, right=right))
    return pd.concat(tables, ignore_index=True)


# kind -> hub id, longest text in tokens, names of the labels where the configuration has none
OFFICIAL = {
    "personality": ("shai-msy/per-classifier", 128, ("neuroticism", "agreeableness", "extraversion")),
    "safety": ("zjunlp/SafeEdit-Safety-Classifier", 512, ("safe", "unsafe")),
}


@torch.no_grad()
def official_judge(
    kind: str, texts: Sequence[str], path: str | Path | None = None, batch_size: int = 32
) -> pd.DataFrame:
    """Probabilities by a data set's own classifier, a column a label **name**: "personality" or "safety".

    Columns come in the order of `CHOICE` (PersonalityEdit's data and classifier number the traits in opposite
    order), or safe, unsafe. An empty text counts as undecided. `path` is a local copy. Raises TraitError.
    """
    place, longest, names = OFFICIAL[kind]
    try:
        tokenizer = AutoTokenizer.from_pretrained(path or place)
        model = AutoModelForSequenceClassification.from_pretrained(path or place).eval()
    except (OSError, ValueError) as error:
        raise TraitError(
            f"the classifier {path or place} is neither in the local cache nor could it be fetched from the hub. Go "
            "online once, or give the path of a copy; offline, train_judge() needs only the Python package index."
        ) from error
    found = tuple(model.config.id2label[i].lower() for i in range(model.config.num_labels))
    labels = names if found == tuple(f"label_{i}" for i in range(len(names))) else found
    if set(labels) != set(names):
        raise TraitError(f"{path or place} has the labels {', '.join(found)}; {', '.join(names)} were expected.")
    rows = []
    for chunk in batches(list(texts), batch_size):
        inputs = tokenizer(chunk, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        rows.append(model(**inputs).logits.softmax(-1))
    table = pd.DataFrame(torch.cat(rows).numpy(), columns=labels)
    table[[not text.strip() for text in texts]] = 1 / len(labels)
    return table[list(CHOICE if kind == "personality" else names)]


# --- vectors from statements, and what they do -------------------------------------------------------------------


def question(topic: str) -> str:
    """The prompt to which an opinion on a topic is the answer."""
    return f"How do you feel about {topic}?"


READ_AT = ("mean of the statement", "last token")


@torch.no_grad()
def statement_residuals(
    model: ChatModel, statements: pd.DataFrame, batch_size: int = 16
) -> Float[Tensor, "statement read layer d_model"]:
    """Every block's input while the model reads statements as its own answers, averaged in the two ways of `READ_AT`.

    `statements` is a table of `load_traits`.
    """
    rows = []
    for chunk in batches(list(zip(statements["topic"], statements["statement"])), batch_size):
        batch = encode(model.tokenizer, [question(topic) for topic, _ in chunk], [s for _, s in chunk], model.device)
        with capture(model, "block_input") as taken:
            model.decoder(**batch.inputs(), use_cache=False)
        mask = batch.response_mask
        last = mask.cumsum(-1).argmax(-1)
        states = torch.stack([taken[layer] for layer in range(model.n_layers)], 1).cpu()  # [row, layer, pos, d_model]
        weight = (mask / mask.sum(-1, keepdim=True)).cpu().to(states.dtype)
        mean = (states * weight[:, None, :, None]).sum(2)
        rows.append(torch.stack([mean, states[torch.arange(len(chunk)), :, last.cpu()]], 1))
    return torch.cat(rows)


def trait_vectors(
    model: ChatModel,
    high: Float[Tensor, "statement layer d_model"],
    low: Float[Tensor, "other layer d_model"],
    trait: str,
    read_at: str = READ_AT[0],
) -> list[SteeringVector]:
    """Difference-in-means vectors from the low to the high end of a trait, one a layer."""
    sign = f"positive strength: more {trait}"
    return [
        SteeringVector(row.float(), layer, "DIM", model.name, model.revision, sign=sign, read_at=read_at)
        for layer, row in enumerate(mean_difference(high, low))
    ]


KEPT_TOGETHER = 16  # settings: steered at neighbouring blocks, they share most of their work


def steered_traits(
    model: ChatModel,
    trait_judge: TraitJudge,
    settings: Sequence[tuple[SteeringVector, float]],
    topics: Sequence[str],
    max_new_tokens: int = 24,
    folder: Path | str | None = None,
) -> pd.DataFrame:
    """Judged opinions on every topic under every (vector, strength).

    The columns of `generate_grid` (`prompt` is the topic's index) and of `judge_opinions`; "seconds" and "seconds
    judged" are each answer's share of what generating it and judging its coherence took. In a `folder` the answers of
    every few settings, and their coherence, are kept, so that a run that was cut off goes on after them.
    """
    prompts, tables = [question(topic) for topic in topics], []
    by_layer = sorted(range(len(settings)), key=lambda i: settings[i][0].layer)
    for rows in batches(by_layer, KEPT_TOGETHER):
        group = [settings[i] for i in rows]
        about = [model.revision, str(model.dtype), prompts, max_new_tokens]
        about += [(*vector_key(vector), strength) for vector, strength in group]
        make = partial(generate_grid, model, prompts, group, max_new_tokens)
        table = pd.DataFrame(kept_arrays(folder, about, partial(_timed_columns, make, "seconds")))
        asked, answers = [prompts[i] for i in table["prompt"]], table["answer"].tolist()
        about = [model.revision, str(model.dtype), asked, answers]
        make = partial(judge, model, asked, answers)
        kept = kept_arrays(folder, about, partial(_timed_columns, make, "seconds judged"))
        traits = judge_traits(trait_judge, answers, [topics[i] for i in table["prompt"]])
        table = pd.concat([table, pd.DataFrame(kept), traits], axis=1)
        tables.append(table.assign(setting=np.array(rows)[table["setting"]]))
    return pd.concat(tables).sort_values(["setting", "prompt"], ignore_index=True)


def answers_by_name(
    model: ChatModel,
    jobs: Mapping[Hashable, Sequence[tuple[SteeringVector, float]]],
    topics: Sequence[str],
    trait_judge: TraitJudge,
    max_new_tokens: int = 24,
    folder: Path | str | None = None,
) -> dict[Hashable, pd.DataFrame]:
    """The table of `steered_traits` for every name's (vector, strength) settings; all are generated side by side."""
    settings = [setting for named in jobs.values() for setting in named]
    table = steered_traits(model, trait_judge, settings, topics, max_new_tokens, folder)
    owner = np.repeat(np.arange(len(jobs)), [len(named) for named in jobs.values()])[table["setting"]]
    return {name: table[owner == i].reset_index(drop=True) for i, name in enumerate(jobs)}


def steered_together(
    model: ChatModel,
    vectors: Sequence[SteeringVector],
    strengths: Sequence[float],
    topics: Sequence[str],
    trait_judge: TraitJudge,
    max_new_tokens: int = 24,
    folder: Path | str | None = None,
) -> pd.DataFrame:
    """Judged opinions on every topic with all the vectors added at once, each at the same strength, up and then down.

    The columns strength (signed), prompt (the topic's index), layer (-1, as there is more than one), and those of
    `judge_opinions`. In a `folder` the answers are kept, so that a run that was cut off goes on after them.
    """
    rows = [(sign * strength, i) for strength in strengths for sign in (1, -1) for i in range(len(topics))]
    table = pd.DataFrame(rows, columns=["strength", "prompt"]).assign(layer=-1)
    about = [topics[i] for i in table["prompt"]]

    def answers() -> dict[str, np.ndarray]:
        """Those of all rows, which run side by side: one strength a row."""
        with ExitStack() as stack:
            for vector in vectors:
                stack.enter_context(steer(model, vector, table["strength"].tolist()))
            found = generate(model, [question(topic) for topic in about], max_new_tokens, batch_size=len(table))
        return {"answer": np.array(found)}

    settings = [vector_key(vector) for vector in vectors]
    key = ["together", model.revision, str(model.dtype), about, max_new_tokens, list(map(float, strengths)), settings]
    kept = kept_arrays(folder, key, answers)["answer"].tolist()
    return pd.concat([table, judge_opinions(model, trait_judge, about, kept)], axis=1)


def _columns(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """A table's columns as arrays that can be kept: texts as such, not as objects."""
    return {name: column.to_numpy(None if is_numeric_dtype(column) else str) for name, column in table.items()}


def _timed_columns(make: Callable[[], pd.DataFrame], name: str) -> dict[str, np.ndarray]:
    """A table's columns, and each row's share of the seconds that making it took."""
    start, table = time.perf_counter(), make()
    return _columns(table.assign(**{name: (time.perf_counter() - start) / len(table)}))


def judge_opinions(
    model: ChatModel, trait_judge: TraitJudge, about: Sequence[str], answers: Sequence[str]
) -> pd.DataFrame:
    """What opinions on topics show, a row an answer: the columns of `judge` and of `judge_traits`.

    Only coherent answers show a trait: count the others as failures.
    """
    judged = judge(model, [question(topic) for topic in about], list(answers))
    return pd.concat([judged, judge_traits(trait_judge, list(answers), list(about))], axis=1)


# --- attribution on a trait --------------------------------------------------------------------------------------


def trait_pairs(model: ChatModel, statements: pd.DataFrame, n: int, seed: int = 0) -> list[dict[str, str]]:
    """Up to `n` pairs of prompts that differ in who asks: each begins with a statement of the low (clean) or high
    end (corrupted), equally many tokens long, and asks about another topic, with that topic's two statements as
    answers `high` and `low`. The low statement is also told as `opener`.

    Once every low statement that has a partner has opened a pair, they open further ones, each about a new topic.
    """
    rng = np.random.default_rng(seed)
    by_pole = {pole: part.set_index("topic")["statement"] for pole, part in statements.groupby("pole")}
    sides = [
        by_pole[pole].rename("instruction").reset_index().assign(frame=by_pole[pole].index) for pole in ("low", "high")
    ]
    topics, pairs, taken = by_pole["high"].index, [], set()
    for again in range(len(topics)):
        for low, high in matched_pairs(model.tokenizer, *sides, n, seed + 1000 * again):
            told = set(statements.loc[statements["statement"].isin([low, high]), "topic"])
            left = [topic for topic in topics if topic not in told and (low, topic) not in taken]
            if not left or len(pairs) == n:
                continue
            asked = rng.choice(left)
            taken.add((low, asked))
            prompts = {name: f"{text}\n\n{question(asked)}" for name, text in (("clean", low), ("corrupted", high))}
            pairs.append(prompts | {pole: by_pole[pole][asked] for pole in ("high", "low")} | {"opener": low})
    return pairs


def opinion_effect(
    model: ChatModel,
    pairs: Sequence[Mapping[str, str]],
    measure: Callable[[Contrast, Metric], Float[np.ndarray, "pair *rest"]],
) -> Float[np.ndarray, "pair *rest"]:
    """A measure of log p(high answer) - log p(low answer), in nats, between the prompts of each of `trait_pairs`.

    `measure` maps a contrast and a metric to numbers linear in the metric, a row an example: edge scores (`attribute`)
    or layer effects (`layer_patching`). The pairs run side by side; each answer is a sequence of its own.
    """

    def of_answers(pole: str) -> np.ndarray:
        """The measure of log p(answer) of one pole, a row a pair."""
        clean, corrupted = (
            encode(model.tokenizer, [pair[side] for pair in pairs], [pair[pole] for pair in pairs], model.device)
            for side in ("clean", "corrupted")
        )
        contrast = token_contrast(model, clean, corrupted, _read_columns(clean))
        return measure(contrast, response_log_probability(clean))

    return of_answers("high") - of_answers("low")


def _read_columns(batch: Batch) -> int:
    """How many last columns a metric of teacher-forced responses reads."""
    return batch.input_ids.shape[1] - batch.prompt_length + 1


def steered_opinion_scores(
    model: ChatModel,
    settings: Sequence[tuple[SteeringVector, float]],
    statements: pd.DataFrame,
    points: Sequence[float] = left(5),
    folder: Path | str | None = None,
) -> dict[str, Float[np.ndarray, "setting topic"]]:
    """EAP-IG with steering itself as the contrast: base against steered run on the same tokens, by (vector, strength).

    The scalar is log p(high answer) - log p(low answer) to the question about a topic, in nats; `statements` is a table
    of `load_traits` of one trait. Sums over the edges that leave the steering node: "absolute" of the absolute scores,
    "signed" the plain ones, which estimate how far steering shifts the scalar. In a `folder` they are kept.
    """
    by_pole = statements.pivot(index="topic", columns="pole", values="statement")
    prompts = [question(topic) for topic in by_pole.index]

    def node_scores(vector: SteeringVector, strength: float, pole: str) -> Float[np.ndarray, "topic reader"]:
        batch = encode(model.tokenizer, prompts, by_pole[pole].tolist(), model.device)
        contrast = steering_contrast(model, batch, vector, strength, _read_columns(batch))
        return attribute(model, contrast, response_log_probability(batch), points).values[:, 0]

    def measured() -> dict[str, np.ndarray]:
        found = [node_scores(*setting, "high") - node_scores(*setting, "low") for setting in settings]
        sums = {"absolute": [np.abs(scores).sum(1) for scores in found], "signed": [scores.sum(1) for scores in found]}
        return {name: np.array(rows) for name, rows in sums.items()}

    about = ["steered", model.revision, str(model.dtype), statements.to_json(), list(points)]
    about += [(*vector_key(vector), strength) for vector, strength in settings]
    return kept_arrays(folder, about, measured)


PAIRS_TOGETHER = 8  # run side by side: on a GPU they take hardly longer than one


def attribute_trait(
    model: ChatModel,
    statements: pd.DataFrame,
    n: int,
    seed: int = 0,
    patched: int = 0,
    folder: Path | str | None = None,
) -> dict[str, np.ndarray]:
    """Edge scores of a trait from up to `n` of its `trait_pairs`, summed by block: one seed's part of `study_of`.

    `statements` is the trait's whole table of `load_traits`, of which the training topics are taken. Sums of absolute
    scores: `in` and `out` of every pair, [pair, layer], and those of the pairs' signed mean, `in_of_mean` and
    `out_of_mean`, [layer]; `edges` is the mean absolute score, [source, reader], `seconds` what all that took, and
    `openers` how many low statements open the pairs.
    `layer_patching` is the exact effect in nats for the first `patched` pairs, if any, [pair, layer]. In a `folder` all
    of it is kept.
    """

    def edge_scores(contrast: Contrast, metric: Metric) -> Float[np.ndarray, "pair source reader"]:
        return attribute(model, contrast, metric).values

    def block_effects(contrast: Contrast, metric: Metric) -> Float[np.ndarray, "pair layer"]:
        return layer_patching(model, contrast, metric).T

    def measured() -> dict[str, np.ndarray]:
        """Attribution, and exact patching if asked for, of pairs from the training statements, by name."""
        train = statements.query("split == 'train' and pole != 'neutral'")
        pairs, graph = trait_pairs(model, train, n, seed), graph_of(model)
        start, ends, signed, absolute = time.perf_counter(), [], 0.0, 0.0
        for some in batches(pairs, PAIRS_TOGETHER):
            scores = opinion_effect(model, some, edge_scores)
            ends.append(ends_of_layers(graph, np.abs(scores)))  # [In or Out, pair, layer]
            signed, absolute = signed + scores.sum(0, float), absolute + np.abs(scores).sum(0, float)
        into, out = np.concatenate(ends, axis=1)
        mean = ends_of_layers(graph, np.abs(signed) / len(pairs))
        found = {"in": into, "out": out, "in_of_mean": mean[0], "out_of_mean": mean[1]}
        found |= {"edges": absolute / len(pairs), "seconds": np.array(time.perf_counter() - start)}
        found["openers"] = np.array(len({pair["opener"] for pair in pairs}))
        if patched:  # the dearest of all
            parts = batches(pairs[:patched], PAIRS_TOGETHER)
            found["layer_patching"] = np.concatenate([opinion_effect(model, some, block_effects) for some in parts])
        return found

    about = [model.revision, str(model.dtype), statements.to_json(), n, patched, seed]
    return kept_arrays(folder, about, measured)
