"""Full-size results of one model: `make results MODEL=...` runs what is not there yet and stores the numbers.

Under `book/results`, each with its settings, versions, device, the seconds of the run that finished it and how many
parts were there before that run (a chapter's also with the seconds of all processes that worked on it), and never the
text of an answer:
`ranking-MODEL.json` (layer scores, baselines, every judged verdict), `graph-MODEL.json` (only the layer scores and
baselines, for a model that cannot be steered: ask with `--only graph`), `trained-MODEL.json` (vectors made by training)
and `CHAPTER-MODEL.json` (all that a chapter records, and its raw rows, in the profile "full", or in "book" where that
is its largest or was asked for). What is there is not made again, whatever its settings are: remove the file for that,
or give a setting that it does not have. Only 03 follows a ranking that was made anew.
Parts of the ranking and of the longest chapters (04 to 08), the training's epochs and its answers are kept under
`_build/results` and in the user's cache, so that a killed run goes on where it stopped. Parts of a ranking that is
stored in `book/results` are not made again when only other parts' settings change: more strengths, or more seeds, are
added to what is there.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from run_chapters import ROOT, ChapterError, check_names, execute, records, rows, source

from steerutils import (
    ChatModel,
    SteeringVector,
    Training,
    activation_difference,
    attribute,
    attribute_pairs,
    best_strengths,
    dim_vectors,
    encode,
    ends_of_layers,
    generate,
    instructions,
    judge,
    last_logits,
    layer_patching,
    left,
    load_model,
    load_prompts,
    matched_pairs,
    order_of,
    pair_contrast,
    probe_accuracy,
    refusal_score,
    refusal_tokens,
    residuals,
    result_name,
    run_metadata,
    steer,
    steered_verdicts,
    steering_contrast,
    successful,
    train_vectors,
)
from steerutils.prompts import batches
from steerutils.ranking import digest, place_of
from steerutils.record import read_json, say, write_bytes, write_json
from steerutils.training import UNTAUGHT, TrainingError
from steerutils.weights import cache_folder, file_sha256, find

OUT = ROOT / "book" / "results"
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # of every vector, when several blocks are steered at once
TASKS = {"induce": ("harmless", 1.0, "refusal"), "bypass": ("harmful", -1.0, "compliance")}
GRID = ("train", "validation", "test", "strengths", "reach", "tokens", "grid_dtype")  # what the grid's parts use
UNSTEERED = ("test", "tokens", "grid_dtype")
CHECKED = ("train", "validation", "tokens", "grid_dtype")
STEERED = ("train", "validation", "points", "steered_prompts")
TOGETHER = (*CHECKED, "test")  # and the layers themselves
ATTRIBUTION = ("pairs", "points", "patched_pairs")
GRAPH = ("model_name", "train", "seeds", *ATTRIBUTION)  # what the graph measures alone use
LONGEST_CELL = 24 * 3600  # seconds: at full size a cell may take hours
CHAPTERS = {  # the largest profile of each, the shorter runs first
    "00-quickstart": "book",
    "01-steering-vectors": "book",
    "02-attribution-graphs": "book",
    "03-layer-ranking": "full",
    "06-attention-freezing": "full",
    "07-ov-decomposition": "full",
    "08-sparse-steering": "full",
    "05-steering-circuits": "full",
    "04-personality": "full",
}
ANSWERING = ("04-personality", "06-attention-freezing", "08-sparse-steering")  # their answers have a number format


@dataclass(frozen=True)
class Ranking:
    """The settings of the full-size ranking experiment; they stand in its result file."""

    model_name: str = "smollm2-135m-refusal"
    train: int = 128  # prompts a side that the vectors are made from
    validation: int = 20  # a task: strengths and layers are chosen on them
    test: int = 100  # a task
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)  # tried in every block
    reach: float = 256.0  # up to which a block is tried at twice the strength while its answers hold together
    tokens: int = 24
    pairs: int = 400
    points: int = 5
    seeds: int = 3  # of the attribution pairs and of the prompts of the baselines
    patched_pairs: int = 32  # for exact layer patching
    steered_prompts: int = 8  # of validation, a task: for attribution with steering itself as the contrast; 0 for none
    grid_dtype: str = "float32"  # of the steered answers; attribution is always in float32
    device: str = "cpu"


def ranking_results(model: ChatModel, config: Ranking) -> dict:
    """Run every part that is not there yet; all of them as one dictionary."""
    work, answering = parts_of(config.model_name), model
    if config.grid_dtype != "float32":
        answering = load_model(config.model_name, device=config.device, dtype=getattr(torch, config.grid_dtype))
    restore_parts(model, config, work)
    part = partial(kept_part, config, model.revision)
    taken = last_residuals(model, config)
    found = dim_vectors(model, taken["harmful"], taken["harmless"])
    vectors = [v for v in found if v.norm > 0]  # at block 0 every prompt's last token is the template's
    parts = {task: grid_parts(part, task, model, answering, vectors, config) for task in TASKS}
    attributed = {
        name: part(name, ATTRIBUTION, partial(attributions, model, config, seed, work))
        for seed, name in enumerate(f"attribution-{seed}" for seed in range(config.seeds))
    }
    sums = sum(np.array(attributed["attribution-0"]["values"][kind]).sum(0) for kind in ("in", "out"))  # [layer]
    usable = {v.layer: v for v in vectors}
    groups = {"all blocks": vectors, "top 5 of Total": [usable[i] for i in order_of(sums) if i in usable][:5]}
    for task in TASKS:
        parts[task] |= joint_parts(part, task, model, answering, vectors, groups, config)
    single = attributed | {"baselines": part("baselines", ("train", "seeds"), lambda: baselines(model, config, taken))}
    named = single | {f"{task}-{name}": made for task, of_task in parts.items() for name, made in of_task.items()}
    values = {"norms": [vector.norm for vector in found]}
    values |= {task: {name: made["values"] for name, made in of_task.items()} for task, of_task in parts.items()}
    values |= {name: made["values"] for name, made in single.items()}
    return {"settings": asdict(config), "revision": model.revision, "values": values,
            "seconds": {name: made["seconds"] for name, made in named.items()},
            "device": device_name(model.device), **run_metadata()}  # fmt: skip


def kept_part(
    config: Ranking, revision: str, name: str, uses: tuple[str, ...], make: Callable[[], dict], **facts
) -> dict:
    """A part ("values", "seconds") from its file, or made: anew only when a setting that it uses, or another fact, has
    changed.
    """
    path = parts_of(config.model_name) / f"{name}.json"
    used = {key: value for key, value in asdict(config).items() if key in uses} | facts
    settings = json.loads(json.dumps(used | {"revision": revision}))
    if path.exists() and (stored := read_json(path))["settings"] == settings:
        return stored
    say(f"{config.model_name}: {name} ...")
    start = time.time()
    made = {"settings": settings, "values": make(), "seconds": round(time.time() - start, 1)}
    say(f"  {made['seconds']:.0f} s")
    write_json(path, made)
    return made


def grid_parts(
    part: Callable, task: str, model: ChatModel, answering: ChatModel, vectors: list[SteeringVector], config: Ranking
) -> dict[str, dict]:
    """A task's grid, on test each block at the strength that was best for it on validation; and the model unsteered."""
    side, sign, wanted = TASKS[task]
    parts, settings = {}, [(v, sign * s) for v in vectors for s in config.strengths]
    for split, reach in (("validation", config.reach), ("test", 0.0)):
        prompts, path = instructions(side, split, getattr(config, split)), rows_path(config, task, split)
        judged = partial(judged_rows, answering, settings, prompts, config.tokens, path, reach)
        part(f"{task}-{split}", GRID, lambda: {"rows": len(judged()[1])})  # noqa: B023 (called at once)
        tried, table = judged()  # from the file
        kept = read_json(path)["rows"]  # of other settings, too
        used = [kept[place_of(v.layer, v.method, v.norm, strength)] for v, strength in tried]
        parts[split] = {"values": compact(table), "seconds": round(sum(row["seconds"] for row in used), 1)}
        best = best_strengths(successful(table, wanted))
        settings = [(v, float(best[v.layer])) for v in vectors]
    prompts = instructions(side, "test", config.test)
    plain = lambda: {"verdicts": unsteered(answering, prompts, config.tokens)}  # noqa: E731
    parts["unsteered"] = part(f"{task}-unsteered", UNSTEERED, plain)
    parts["unsteered"] |= {"values": parts["unsteered"]["values"]["verdicts"]}
    if config.grid_dtype != "float32":
        some = [(vector, sign) for vector in vectors[:: max(1, len(vectors) // 5)]]
        prompts = instructions(side, "validation", config.validation)
        check = partial(same_verdicts, model, answering, some, prompts, config.tokens)
        parts["float32 check"] = part(f"{task}-float32 check", CHECKED, check)
    return parts


def judged_rows(
    model: ChatModel, settings: list, prompts: list[str], tokens: int, path: Path, reach: float
) -> tuple[list[tuple[SteeringVector, float]], pd.DataFrame]:
    """The settings, with those `farther` on up to `reach`, and their verdicts, from the file or made."""
    table = steered_verdicts(model, settings, prompts, tokens, path)
    while more := farther(settings, table, reach):
        settings = settings + more
        table = steered_verdicts(model, settings, prompts, tokens, path)
    return settings, table


def joint_parts(
    part: Callable, task: str, model: ChatModel, answering: ChatModel, vectors: list, groups: dict, config: Ranking
) -> dict[str, dict]:
    """Groups of blocks steered at once, and attribution with steering itself as the contrast."""
    side, sign, wanted = TASKS[task]
    splits = {split: instructions(side, split, getattr(config, split)) for split in ("validation", "test")}
    parts = {}
    for name, group in groups.items():
        make = partial(together, answering, group, sign, wanted, splits, config.tokens)
        parts[name] = part(f"{task}-{name}", TOGETHER, make, layers=[vector.layer for vector in group])
    if few := splits["validation"][: config.steered_prompts]:
        make = partial(steering_scores, model, [(v, sign) for v in vectors], few, config.points)
        parts["steering contrast"] = part(f"{task}-steering contrast", STEERED, make)
    return parts


def farther(
    settings: list[tuple[SteeringVector, float]], table: pd.DataFrame, reach: float
) -> list[tuple[SteeringVector, float]]:
    """Each block's largest strength doubled, where at most half of the answers (`table`, of `steered_verdicts`) have
    fallen apart at it: early blocks' vectors are short, so that a few times their length may do nothing there.
    """
    apart = (table["verdict"] == "incoherent").groupby([table["layer"], table["strength"]]).mean()
    largest = {vector.layer: (vector, strength) for vector, strength in sorted(settings, key=lambda s: abs(s[1]))}
    return [(vector, 2 * strength) for vector, strength in largest.values()
            if apart[vector.layer, strength] <= 0.5 and abs(2 * strength) <= reach]  # fmt: skip


def last_residuals(model: ChatModel, config: Ranking) -> dict[str, torch.Tensor]:
    """Every block's input at the last token of the training prompts, by side: [prompt, layer, 1, d_model] each."""
    sides = {side: load_prompts(side, "train", limit=config.train) for side in ("harmful", "harmless")}
    return {side: residuals(model, table["instruction"].tolist(), last=1) for side, table in sides.items()}


def graph_results(model: ChatModel, config: Ranking) -> dict:
    """The parts of a ranking that need no steered answer, for a model without refusals of its own.

    The same attribution, exact layer patching and baselines as in a ranking, and the metric that is attributed on the
    training prompts of each side ("metric"), which shows whether it tells them apart. The settings hold the template:
    in a base model it decides what the metric means.
    """
    values: dict = {"metric": side_scores(model, config)}
    say(f"  refusal scores: { ({side: round(float(np.mean(row)), 2) for side, row in values['metric'].items()}) }")
    for seed in range(config.seeds):
        values[f"attribution-{seed}"] = attributions(model, config, seed, parts_of(config.model_name))
    values["baselines"] = baselines(model, config, last_residuals(model, config))
    about = {name: value for name, value in asdict(config).items() if name in GRAPH}
    about |= {"metric": "refusal score of the next token", "template": model.tokenizer.chat_template}
    return {"values": values, "settings": about, "device": device_name(model.device)}


def side_scores(model: ChatModel, config: Ranking) -> dict[str, list[float]]:
    """The refusal score of the next token, in nats, of each training prompt, by side."""
    tokens, found = refusal_tokens(model.tokenizer), {}
    for side in ("harmless", "harmful"):
        prompts = instructions(side, "train", limit=config.train)
        rows = [refusal_score(last_logits(model, chunk), tokens).cpu().numpy() for chunk in batches(prompts, 32)]
        found[side] = _rounded(np.concatenate(rows))
    return found


def rows_path(config: Ranking, task: str, split: str) -> Path:
    """Where the grid's rows of a task and split are kept: those of other prompts, tokens or formats lie elsewhere."""
    return (
        parts_of(config.model_name)
        / f"{task}-{split}-{getattr(config, split)}x{config.tokens}-{config.grid_dtype}-rows.json"
    )


def restore_parts(model: ChatModel, config: Ranking, work: Path) -> None:
    """Put the parts of a stored ranking of this model where unfinished runs keep theirs; what lies there stays.

    Only what was made on this kind of device, because the seconds belong to it.
    """
    path = OUT / f"{result_name('ranking', config.model_name)}.json"
    if not path.exists():
        return
    stored = read_json(path)
    if (stored["revision"], stored["device"]) != (model.revision, device_name(model.device)):
        return
    values = stored["values"]
    settings = asdict(Ranking()) | stored["settings"]  # a setting that is newer than the file had its default
    before = Ranking(**settings)
    uses = dict.fromkeys((name for name in values if name.startswith("attribution-")), ATTRIBUTION)
    uses |= {"baselines": ("train", "seeds")}
    for task, (side, _, _) in TASKS.items():
        inner = {"all blocks": TOGETHER, "top 5 of Total": TOGETHER, "float32 check": CHECKED,
                 "steering contrast": STEERED}  # fmt: skip
        for name in inner.keys() & values[task].keys():
            uses[f"{task}-{name}"], values[f"{task}-{name}"] = inner[name], values[task][name]
        uses[f"{task}-unsteered"], values[f"{task}-unsteered"] = UNSTEERED, {"verdicts": values[task]["unsteered"]}
        for split in ("validation", "test"):
            if not (rows_at := rows_path(before, task, split)).exists():
                prompts = instructions(side, split, limit=settings[split])
                write_json(rows_at, grid_rows(stored, task, split, prompts))
    for name, used in uses.items():
        if not (work / f"{name}.json").exists():
            about = {key: settings[key] for key in settings if key in used} | {"revision": model.revision}
            about |= {"layers": values[name]["layers"]} if used is TOGETHER else {}
            content = {"settings": about, "seconds": stored["seconds"].get(name, 0.0), "values": values[name]}
            write_json(work / f"{name}.json", json.loads(json.dumps(content)))


def grid_rows(stored: dict, task: str, split: str, prompts: list[str]) -> dict:
    """A grid's rows as `steered_verdicts` keeps them, from a stored ranking; the seconds are the rows' mean."""
    settings, rows = asdict(Ranking()) | stored["settings"], stored["values"][task][split]
    each = stored["seconds"][f"{task}-{split}"] / len(rows)
    about = {"model": settings["model_name"], "revision": stored["revision"], "dtype": settings["grid_dtype"],
             "tokens": settings["tokens"], "prompts": digest(prompts)}  # fmt: skip
    kept = {
        place_of(row["layer"], "DIM", stored["values"]["norms"][row["layer"]], row["strength"]): {
            "verdicts": row["verdicts"], "scores": row["scores"], "seconds": each}
        for row in rows
    }  # fmt: skip
    return {"about": about, "rows": kept}


def same_verdicts(model: ChatModel, other: ChatModel, settings: list, prompts: list[str], tokens: int) -> dict:
    """The same grid in two number formats: both kinds' verdicts as letters, and the seconds of each."""
    found = {}
    for kind in (model, other):
        start = time.time()
        table = steered_verdicts(kind, settings, prompts, tokens)
        found[str(kind.dtype).removeprefix("torch.")] = {
            "seconds": round(time.time() - start, 1),
            "rows": [{key: row[key] for key in ("layer", "verdicts")} for row in compact(table)],
        }
    return found


@dataclass(frozen=True)
class Trained:
    """The settings of the full-size training of NTP and PO; they stand in its result file."""

    layer: int
    per_side: int = 128
    held_out: int = 32  # answers a side for the validation loss
    tokens: int = 24  # of each answer
    epochs: int = 20  # of 32 steps each, at most: training stops after three without a better validation loss
    pairs_a_step: int = 8
    learning_rate: float = 0.007
    for_dim: int = 128  # training prompts a side that made the DIM vector, of which these vectors see none
    seed: int = 0


def parts_of(model_name: str) -> Path:
    """The folder of what is finished of a model's results, under `_build`."""
    return ROOT / "_build" / "results" / result_name("parts", model_name)


def trained_results(model: ChatModel, config: Trained) -> dict:
    """NTP and PO at one block: both directions, the history of each, and whose answers they learnt from.

    A model without a twin that complies learns twice: from its answers under DIM, as in the paper, and from the answers
    to harmful prompts that it gives by itself, if there are enough of them.
    """
    work = parts_of(model.name)
    sides = {side: instructions(side, "train") for side in ("harmful", "harmless")}
    used, unused = ([rows[part] for rows in sides.values()]
                    for part in (slice(config.for_dim), slice(config.for_dim, None)))  # fmt: skip
    settings = Training(config.layer, response_tokens=config.tokens, learning_rate=config.learning_rate,
                        pairs_a_step=config.pairs_a_step, epochs=config.epochs, seed=config.seed)  # fmt: skip

    def trained(ending: str, bypass: SteeringVector | None) -> dict:
        """Both methods from one source of answers, by name."""
        kept = cache_folder() / "answers" / f"{result_name('pairs' + ending.replace(', ', '-'), model.name)}.json"
        vectors, histories, pairs = train_vectors(
            model,
            *unused,
            settings,
            config.per_side + config.held_out,
            bypass,
            answers=kept,
            folder=work / f"by{ending}",
        )
        of_all = {"source": pairs["source"].iloc[0], "per_side": len(pairs) // 2 * 4 // 5}
        return {
            method + ending: of_all
            | {"direction": _rounded(vector.direction.numpy()), "history": histories[method].to_dict("list")}
            for method, vector in vectors.items()
        }

    if model.name in UNTAUGHT:
        values = trained("", None)
    else:
        values = trained("", dim_vectors(model, *(residuals(model, rows, last=1) for rows in used))[config.layer])
        try:
            values |= trained(", own answers", None)
        except TrainingError as error:  # it answers too few harmful prompts by itself
            say(f"no vectors from its own answers: {error}")
    first = {key: values["NTP"][key] for key in ("per_side", "source")}
    return {"values": values, "settings": asdict(config) | first, "device": device_name(model.device)}


def chapter_results(name: str, model_name: str, revision: str, profile: str, device: str, **more) -> dict:
    """All that a chapter records when it runs on a model, and its raw rows. Raises ChapterError, naming the cell.

    "seconds_of_all" are those of all "processes" that have ended and that worked on it with these settings: this one,
    those that were cut off before it, and those beside it.
    """
    given = {"profile": profile, "model_name": model_name, "device": device, **more}
    parameters = check_names(ROOT / source(name), given)
    out = parts_of(model_name) / f"{name}.ipynb"
    out.parent.mkdir(parents=True, exist_ok=True)
    parts = str(out.with_suffix("")) + ("" if device == "cpu" else f"-{device}")
    kept = {"folder": parts} if "folder" in parameters else {}  # a long one keeps its parts
    there = len([*Path(parts).glob("*.npz")])  # whose seconds are not among this run's
    about = parameters | {"model_name": ""}  # which the folder says, however a path is spelled
    spent_at = f"seconds-{digest([json.dumps(about), revision])}.json"
    spent_at = Path(parts, spent_at) if kept else Path(f"{parts}-{spent_at}")
    start = time.time()
    try:
        problem, _ = execute(str(source(name)), str(out), parameters | kept, None, LONGEST_CELL)
    finally:
        spent = add_seconds(spent_at, time.time() - start)
    if problem:
        raise ChapterError(f"{name} on {model_name}: {problem}\n  See {out}")
    if not kept:  # the next run begins from nothing
        spent_at.unlink(missing_ok=True)
    on = {"settings": parameters, "device": device_name(device), "parts_there": there,
          "seconds_of_all": round(sum(spent)), "processes": len(spent)}  # fmt: skip
    return {"values": records(out), "rows": rows(out)} | on


def add_seconds(path: Path, seconds: float) -> list[float]:
    """Add a process's seconds to a file of those of others, before it or beside it; all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        spent = [*(read_json(path) if path.exists() else []), round(seconds, 1)]
        write_json(path, spent)
    return spent


def is_there(name: str, given: dict, revision: str, **made_from) -> bool:
    """Whether a result of this revision of a model is stored, with all `given` settings and from what it is made from.

    Settings that are not given take any stored value. The model's name needs no comparing: it is in the file's.
    """
    path = OUT / f"{name}.json"
    if not path.exists():
        return False
    stored = read_json(path)
    newer = asdict(Ranking()) | {
        "answer_dtype": Ranking.grid_dtype,
        "share": 1.0,
    }  # what is newer than the file had its default
    settings = newer | (stored["asked"] if "asked" in stored else stored["settings"])  # a ranking has no "asked"
    same = [stored["revision"] == revision]
    same += [stored.get(key, fact) == fact for key, fact in made_from.items()]  # an older file does not say
    for key, value in given.items():
        larger = (key == "profile" and settings[key] == "full") or (key == "share" and settings[key] > value)
        same += [settings[key] == value or larger]
    if all(same):
        say(f"{name}: is there")
    return all(same)


def make(name: str, settings: dict, given: dict, revision: str, work: Callable[[], dict], **made_from) -> None:
    """Store a result under `book/results`, with its settings and what it was made from, unless one `is_there`."""
    if is_there(name, given, revision, **made_from):
        return
    say(f"{name} ...")
    start = time.time()
    found = work()
    found |= {"asked": settings, "revision": revision, "seconds": round(time.time() - start)}
    found |= made_from | run_metadata()
    write_result(OUT / f"{name}.json", found)
    say(f"{name}: {found['seconds']} s")


def write_result(path: Path, found: dict) -> None:
    """Write a result file, compact: raw rows are most of it."""
    write_bytes(path, (json.dumps(found, separators=(",", ":"), ensure_ascii=False) + "\n").encode())


def make_chapter(chapter: str, model_name: str, device: str, given: dict) -> None:
    """Store a chapter's result of a model, with the settings that are `given` on the command line, unless it is there.

    03 is made from the model's ranking, too.
    """
    name = UNTAUGHT.get(model_name, model_name) if chapter == "04-personality" else model_name
    profile = "book" if given.get("profile") == "book" else CHAPTERS[chapter]
    more = {"answer_dtype": given["grid_dtype"]} if chapter in ANSWERING and "grid_dtype" in given else {}
    more |= {"share": given["share"]} if chapter == "04-personality" and "share" in given else {}
    chosen = more | ({"profile": profile} if "profile" in given else {})
    made_from, ranking = {}, OUT / f"{result_name('ranking', name)}.json"
    if chapter == "03-layer-ranking":
        made_from = {"ranking": file_sha256(ranking) if ranking.exists() else "none"}
    revision = find(name).revision
    work = partial(chapter_results, chapter, name, revision, profile, device, **more)
    asked = {"profile": profile, "model": name} | more
    make(result_name(chapter, name), asked, chosen, revision, work, **made_from)


def together(
    model: ChatModel, vectors: list, sign: float, wanted: str, splits: dict[str, list[str]], tokens: int
) -> dict:
    """Steering several blocks at once, each with the same share of its vector: the share is chosen on validation."""

    def verdicts(share: float, prompts: list[str]) -> str:
        with ExitStack() as stack:
            for vector in vectors:
                stack.enter_context(steer(model, vector, sign * share))
            answers = generate(model, prompts, tokens)
        return "".join(word[0] for word in judge(model, prompts, answers)["verdict"])

    on_validation = {share: verdicts(share, splits["validation"]) for share in SHARES}
    best = max(SHARES, key=lambda share: on_validation[share].count(wanted[0]))
    return {"layers": [v.layer for v in vectors], "share": best, "validation": list(on_validation.values()),
            "test": verdicts(best, splits["test"])}  # fmt: skip


def steering_scores(model: ChatModel, settings: list, prompts: list[str], points: int) -> dict:
    """EAP-IG from the base to the steered run, a row a setting: sums over the edges that leave the steering node.

    "absolute" are each prompt's sums of absolute scores, "signed" its plain sums: those estimate the change of the
    first token's refusal score, which one forward pass measures. In nats.
    """
    batch, tokens = encode(model.tokenizer, prompts, device=model.device), refusal_tokens(model.tokenizer)
    rows = []
    for vector, strength in settings:
        contrast = steering_contrast(model, batch, vector, strength)
        found = attribute(model, contrast, lambda logits: refusal_score(logits[:, -1], tokens), left(points))
        rows.append(found.values[:, 0])  # [prompt, reader] of the source "input"
    return {"layers": [vector.layer for vector, _ in settings],
            "absolute": [_rounded(np.abs(row).sum(1)) for row in rows],
            "signed": [_rounded(row.sum(1)) for row in rows]}  # fmt: skip


def compact(table) -> list[dict]:
    """One entry a (layer, strength): the verdicts as letters, the first-token scores."""
    return [
        {"layer": int(layer), "strength": float(strength), "verdicts": "".join(w[0] for w in rows["verdict"]),
         "scores": rows["score"].tolist()}
        for (layer, strength), rows in table.groupby(["layer", "strength"], sort=False)
    ]  # fmt: skip


def unsteered(model: ChatModel, prompts: list[str], tokens: int) -> str:
    """Verdicts without steering, as letters."""
    return "".join(word[0] for word in judge(model, prompts, generate(model, prompts, tokens))["verdict"])


def attributions(model: ChatModel, config: Ranking, seed: int, work) -> dict:
    """Layer sums of EAP-IG scores over pairs: of absolute values an example, and of the absolute mean."""
    sides = load_prompts("harmless", "train"), load_prompts("harmful", "train")
    pairs = matched_pairs(model.tokenizer, *sides, config.pairs, seed)
    tokens = refusal_tokens(model.tokenizer)

    def metric(logits):
        return refusal_score(logits[:, -1], tokens)

    def each(graph, scores):
        return ends_of_layers(graph, np.abs(scores)).swapaxes(0, 1)  # [example, 2, layer]

    path = work / f"attribution-{seed}-{config.pairs}-pairs.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = attribute_pairs(model, pairs, metric, left(config.points), each, path)
    mean = ends_of_layers(found.signed.graph, np.abs(found.signed.values) / found.n_examples)
    counts = ends_of_layers(found.signed.graph, found.signed.graph.edges.astype(float))
    patched = [layer_patching(model, pair_contrast(model, [clean], [corrupted]), metric)[:, 0]
               for clean, corrupted in pairs[: config.patched_pairs]]  # fmt: skip
    return {
        "n_pairs": len(pairs),
        "in": _rounded(found.each[:, 0]),  # [example, layer]
        "out": _rounded(found.each[:, 1]),
        "in_of_mean": _rounded(mean[0]),
        "out_of_mean": _rounded(mean[1]),
        "edges_in": counts[0].astype(int).tolist(),
        "edges_out": counts[1].astype(int).tolist(),
        "layer_patching": _rounded(np.array(patched)),  # [example, layer], nats
        "strongest": found.absolute.table(200).round(4).to_dict("list"),
    }


def baselines(model: ChatModel, config: Ranking, taken: dict[str, torch.Tensor]) -> dict:
    """ActDiff and probes, by seed: each seed takes another half of the training prompts."""
    found = {"activation difference": [], "probe": []}
    for seed in range(config.seeds):
        keep = np.random.default_rng(seed).permutation(config.train)[: config.train // 2]
        sides = [taken[side][keep, :, -1] for side in ("harmful", "harmless")]
        found["activation difference"].append(_rounded(activation_difference(*sides)))
        found["probe"].append(_rounded(probe_accuracy(*sides)))
    return found


def _rounded(values: np.ndarray) -> list:
    """Numbers with five significant figures: enough to rank, small enough to commit."""
    return json.loads(json.dumps(np.vectorize(lambda x: float(f"{x:.5g}"))(values).tolist()))


def device_name(device: torch.device | str) -> str:
    """What the numbers were made on."""
    return torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("model_name", nargs="?", default=Ranking.model_name)
    parser.add_argument("--only", nargs="+", choices=("ranking", "trained", "graph", *CHAPTERS), default=None)
    for name in ("train", "validation", "test", "pairs", "seeds", "patched_pairs", "steered_prompts"):
        parser.add_argument(f"--{name}", type=int, help="of the ranking")
    parser.add_argument("--strengths", type=float, nargs="+", help="of the ranking's grid")
    parser.add_argument("--reach", type=float, help="the grid's largest strength")
    parser.add_argument("--grid_dtype", choices=("float32", "bfloat16"),
                        help="of whole answers: in the ranking, 04, 06 and 08")  # fmt: skip
    parser.add_argument("--profile", choices=("full", "book"), help="of the chapters")
    parser.add_argument("--share", type=float, help="of the full size's topics and pairs, in 04")
    parser.add_argument("--device", default=Ranking.device)
    given = vars(parser.parse_args())  # only what stands on the command line, but for these three
    if not 0 < given.get("share", 1) <= 1:
        raise ValueError(f"--share is a part of 04's topics and pairs, above 0 and at most 1, not {given['share']}")
    model_name, only, device = (given.pop(name) for name in ("model_name", "only", "device"))
    only = only or ("ranking", "trained", *CHAPTERS)
    of_ranking = {key: value for key, value in given.items() if key not in ("profile", "share")}
    ranking = Ranking(model_name=model_name, device=device, **of_ranking)
    model = load_model(model_name, device=device)
    device = model.device.type  # "auto" is settled now
    ranking_name = result_name("ranking", model_name)
    if "ranking" in only and not is_there(ranking_name, of_ranking, model.revision):
        content = json.dumps(ranking_results(model, ranking), separators=(",", ":"))
        write_bytes(OUT / f"{ranking_name}.json", content.encode())
    if "graph" in only:
        name = result_name("graph", model_name)
        asked, chosen = ({key: some[key] for key in GRAPH if key in some} for some in (asdict(ranking), of_ranking))
        make(name, asked, chosen, model.revision, lambda: graph_results(model, ranking))
    if "trained" in only:
        trained = Trained(int(0.6 * model.n_layers))
        name = result_name("trained", model_name)
        make(name, asdict(trained), {}, model.revision, lambda: trained_results(model, trained))
    del model  # a chapter loads its own
    for chapter in CHAPTERS:
        if chapter in only:
            make_chapter(chapter, model_name, device, given)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what it has spent is added up all the same
    try:
        main()
    except (ChapterError, ValueError) as error:
        sys.exit(str(error))
