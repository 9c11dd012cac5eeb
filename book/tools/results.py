"""Full-size results of one model: `make results MODEL=...` runs what is not there yet and stores the numbers.

`book/results/ranking-MODEL.json` holds layer scores, baselines and every judged verdict, with parameters, versions,
device and seconds; never the text of an answer. Parts that are done are kept under `_build/results` and not run again,
so that a killed run goes on where it stopped.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import numpy as np
import torch
from run_chapters import ROOT

from steerutils import (
    ChatModel,
    activation_difference,
    attribute_pairs,
    best_strengths,
    dim_vectors,
    ends_of_layers,
    generate,
    judge,
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
    run_metadata,
    steer,
    steered_verdicts,
    successful,
)
from steerutils.record import read_json, say, write_bytes, write_json

OUT = ROOT / "book" / "results"
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of every vector, when several blocks are steered at once
TASKS = {"induce": ("harmless", 1.0, "refusal"), "bypass": ("harmful", -1.0, "compliance")}


@dataclass(frozen=True)
class Ranking:
    """The settings of the full-size ranking experiment; they stand in its result file."""

    model_name: str = "smollm2-135m-refusal"
    train: int = 128  # prompts a side that the vectors are made from
    validation: int = 20  # a task: strengths and layers are chosen on them
    test: int = 100  # a task
    strengths: tuple[float, ...] = (1.0, 2.0)
    tokens: int = 24
    pairs: int = 400
    points: int = 5
    seeds: int = 3  # of the attribution pairs and of the prompts of the baselines
    patched_pairs: int = 32  # for exact layer patching
    device: str = "cpu"


def stored_name(model_name: str) -> str:
    """A model's name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", model_name.rstrip("/").split("/")[-1])


def ranking_results(config: Ranking) -> dict:
    """Run every part that is not there yet; all of them as one dictionary."""
    work = ROOT / "_build" / "results" / stored_name(config.model_name)
    model = load_model(config.model_name, device=config.device)
    seconds: dict[str, float] = {}

    def part(name: str, make: Callable[[], dict]) -> dict:
        path = work / f"{name}.json"
        settings = json.loads(json.dumps(asdict(config) | {"revision": model.revision}))
        if name != "baselines":  # more seeds later do not make the first ones anew
            del settings["seeds"]
        if path.exists() and (stored := read_json(path))["settings"] == settings:
            seconds[name] = stored["seconds"]
            return stored["values"]
        say(f"{config.model_name}: {name} ...")
        start = time.time()
        values = make()
        seconds[name] = round(time.time() - start, 1)
        say(f"  {seconds[name]:.0f} s")
        write_json(path, {"settings": settings, "seconds": seconds[name], "values": values})
        return values

    def ask(name: str, split: str, n: int) -> list[str]:
        return load_prompts(name, split, limit=n)["instruction"].tolist()

    taken = {side: residuals(model, ask(side, "train", config.train), last=1) for side in ("harmful", "harmless")}
    found_vectors = dim_vectors(model, taken["harmful"], taken["harmless"])
    vectors = [v for v in found_vectors if v.norm > 0]  # at block 0 every prompt's last token is the template's
    usable = {v.layer: v for v in vectors}
    values = {"norms": [vector.norm for vector in found_vectors]}
    for task, (side, sign, wanted) in TASKS.items():
        values[task] = {}
        for split, n in (("validation", config.validation), ("test", config.test)):
            settings = [(v, sign * s) for v in vectors for s in config.strengths]
            if split == "test":  # each layer at the strength that was best for it on validation
                best = best_strengths(successful(found, wanted))  # noqa: F821
                settings = [(v, float(best[v.layer])) for v in vectors]
            prompts, path = ask(side, split, n), work / f"{task}-{split}-rows.json"
            make = lambda: steered_verdicts(model, settings, prompts, config.tokens, path)  # noqa: B023, E731
            part(f"{task}-{split}", lambda: {"rows": len(make())})  # noqa: B023
            found = make()  # from the file
            values[task][split] = compact(found)
        values[task]["unsteered"] = unsteered(model, ask(side, "test", config.test), config.tokens)
    for seed in range(config.seeds):
        values[f"attribution-{seed}"] = part(f"attribution-{seed}", lambda: attributions(model, config, seed, work))  # noqa: B023
    sums = np.array(values["attribution-0"]["in"]).sum(0) + np.array(values["attribution-0"]["out"]).sum(0)
    groups = {"all blocks": vectors, "top 5 of Total": [usable[i] for i in order_of(sums) if i in usable][:5]}
    for task, (side, sign, wanted) in TASKS.items():
        splits = {"validation": ask(side, "validation", config.validation), "test": ask(side, "test", config.test)}
        for name, group in groups.items():
            values[task][name] = part(
                f"{task}-{name}",
                lambda: together(model, group, sign, wanted, splits, config.tokens),  # noqa: B023
            )
    values["baselines"] = part("baselines", lambda: baselines(model, config, taken))
    return {"settings": asdict(config), "revision": model.revision, "values": values, "seconds": seconds,
            "device": device_name(model), **run_metadata()}  # fmt: skip


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

    path = work / f"attribution-{seed}.npz"
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


def device_name(model: ChatModel) -> str:
    """What the numbers were made on."""
    return torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_name", nargs="?", default=Ranking.model_name)
    for name in ("train", "validation", "test", "pairs", "seeds", "patched_pairs"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Ranking, name))
    parser.add_argument("--device", default="cpu")
    config = Ranking(**vars(parser.parse_args()))
    content = json.dumps(ranking_results(config), separators=(",", ":"))
    path = write_bytes(OUT / f"ranking-{stored_name(config.model_name)}.json", content.encode())
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
