"""What attribution costs: `make bench` writes a table and `book/results/bench.json`.

Every ratio comes from one process in which the two sides take turns, after a warm-up; medians over the rounds. All of
it runs on one thread, because a second one on a shared core makes small operations wait, which are no part of the
question; the headline is measured once more on all threads. The bare pass is one forward and backward pass with frozen
parameters: same batch, dtype, attention and metric, gradient to the embeddings. Peak memory is measured in a fresh
process each, above what the loaded model takes.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from run_chapters import ROOT
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steerutils import Batch, ChatModel, SteeringVector, instructions, last_logits, load_model, steer, sweep
from steerutils.attribution import (
    EAP,
    attribute,
    graph_of,
    left,
    logits_read,
    midpoint,
    steering_contrast,
    token_contrast,
)
from steerutils.circuits import circuit_logits
from steerutils.models import resume
from steerutils.record import run_metadata, say, write_json
from steerutils.responses import flip_difference, read_by, steered_runs
from steerutils.subgraphs import random_circuit

OUT = ROOT / "book" / "results" / "bench.json"
LIMITS = {"response_ratio": 1.5, "circuit_ratio": 3.0}  # over bare passes: what `make bench` may not exceed
POINTS = 5
SHAPES = {  # Llama layout with random weights
    "gpt2-small shape": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                             num_key_value_heads=12, vocab_size=50257),
    "llama-2-7b shape": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                             num_key_value_heads=32, vocab_size=32000),
}  # fmt: skip


def random_llama(device: str = "cpu", dtype: torch.dtype = torch.float32, **shape) -> ChatModel:
    """A Llama-layout model of some shape with random weights; its tokenizer is empty."""
    torch.manual_seed(0)
    with torch.device(device):
        hf = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa")).to(dtype)
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    return ChatModel(hf.eval().requires_grad_(False), empty, "random llama", "seed 0")


def random_batches(model: ChatModel, examples: int, tokens: int) -> tuple[Batch, Batch]:
    """Clean and corrupted random tokens."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (2, examples, tokens), generator=draw).to(model.device)
    return tuple(Batch(side, torch.ones_like(side), tokens) for side in ids)


def metric(logits):
    """A logit difference that needs no answers."""
    return logits[:, -1, 5] - logits[:, -1, 77]


def bare_pass(model: ChatModel, batch: Batch) -> None:
    """One forward and backward pass to the embeddings."""
    embeddings = model.hf.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    inputs = batch.inputs() | {"inputs_embeds": embeddings}
    del inputs["input_ids"]
    logits = model.hf(**inputs, use_cache=False, logits_to_keep=1).logits
    torch.autograd.grad(metric(logits).sum(), embeddings)


def eap_ig(model: ChatModel, sides: tuple[Batch, Batch], points: Sequence[float] | None = None) -> None:
    """All of EAP-IG for one batch: the contrast and the scores."""
    attribute(model, token_contrast(model, *sides), metric, points or left(POINTS))


def interleaved(rounds: int, **tasks: Callable[[], None]) -> dict[str, float]:
    """Median seconds of each task; the tasks take turns, after one round of warm-up."""
    seconds = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            _wait()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def attribution_cost(model: ChatModel, examples: int, tokens: int, rounds: int) -> dict:
    """Seconds of EAP, EAP-IG and bare passes, and their ratios."""
    sides = random_batches(model, examples, tokens)
    found = interleaved(
        rounds,
        bare=lambda: bare_pass(model, sides[0]),
        eap=lambda: eap_ig(model, sides, EAP),
        eap_ig=lambda: eap_ig(model, sides),
        eap_ig_midpoint=lambda: eap_ig(model, sides, midpoint(POINTS)),
    )
    found["ratio"] = found["eap_ig"] / (POINTS * found["bare"])
    found["midpoint_ratio"] = found["eap_ig_midpoint"] / (POINTS * found["bare"])
    found["eap_ratio"] = found["eap"] / found["bare"]
    return found | {"examples": examples, "tokens": tokens, "points": POINTS}


def sweep_cost(model: ChatModel, rounds: int, n_prompts: int = 6) -> dict:
    """Seconds of a sweep over every layer, and of separate runs of the same."""
    prompts = instructions("harmless", "train", limit=n_prompts)
    directions = torch.randn(model.n_layers, model.d_model, generator=torch.Generator().manual_seed(0))
    vectors = [SteeringVector(row, layer, "random", model.name, model.revision) for layer, row in enumerate(directions)]

    def separate():
        for vector in vectors:
            with steer(model, vector):
                last_logits(model, prompts)

    shared = lambda: sweep(model, vectors, prompts, [1.0], lambda logits: logits[:, 0])  # noqa: E731
    found = interleaved(rounds, sweep=shared, separate=separate)
    return found | {"ratio": found["sweep"] / found["separate"], "prompts": n_prompts}


def response_cost(model: ChatModel, rounds: int, examples: int = 8, prompt: int = 40, response: int = 24) -> dict:
    """Steering from the middle block on: attribution over all response tokens, and one circuit patched exactly.

    The first over its own ten bare passes (blocks from the steered one on), the second over one bare forward pass of
    the whole model.
    """
    ids = torch.randint(
        3, model.config.vocab_size, (examples, prompt + response), generator=torch.Generator().manual_seed(1)
    )
    batch = Batch(ids, torch.ones_like(ids), prompt)
    direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    vector = SteeringVector(direction, model.n_layers // 2, "random", model.name, model.revision)
    runs = steered_runs(model, batch, vector)
    contrast, metric = read_by(runs.contrast, flip_difference(runs))
    circuit = random_circuit(contrast.graph, contrast.graph.n_edges // 10, 0)
    patched = circuit_logits(model, contrast, itertools.repeat(circuit))

    def bare_part():
        start = contrast.clean.clone().requires_grad_()
        final = resume(model, contrast.tape, vector.layer, start)
        torch.autograd.grad(metric(logits_read(model, contrast, final)).sum(), start)

    def bare_forward():
        with torch.no_grad():
            model.hf(**batch.inputs(), use_cache=False, logits_to_keep=contrast.keep)

    found = interleaved(
        rounds,
        bare_part=bare_part,
        attribution=lambda: attribute(
            model,
            replace(steering_contrast(model, batch, vector, keep=contrast.keep), words=contrast.words),
            metric,
            midpoint(10),
        ),
        bare_forward=bare_forward,
        circuit=lambda: next(patched),
        circuit_alone=lambda: next(circuit_logits(model, contrast, [circuit])),
    )
    found["attribution_ratio"] = found["attribution"] / (10 * found["bare_part"])
    found["circuit_ratio"] = found["circuit"] / found["bare_forward"]
    found["circuit_alone_ratio"] = found["circuit_alone"] / found["bare_forward"]  # its base run counted, too
    return found | {"examples": examples, "prompt": prompt, "response": response, "layer": vector.layer}


def growth(rounds: int) -> dict:
    """Seconds of EAP-IG as one size doubles, and the slope on log-log axes, for a small random model."""
    base = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8,
                num_key_value_heads=8, vocab_size=2048)  # fmt: skip
    usual, model = dict(examples=4, tokens=32, points=5), random_llama(**base)
    grown = {"blocks": {n: random_llama(**base | {"num_hidden_layers": n}) for n in (4, 8, 16)}}
    grown["heads"] = {
        n: random_llama(**base | {"num_attention_heads": n, "num_key_value_heads": n, "head_dim": 32})
        for n in (4, 8, 16)
    }
    sizes = {"examples": (2, 4, 8, 16), "tokens": (16, 32, 64, 128), "points": (2, 4, 8, 16)}
    runs = {name: {n: _run(model, usual | {name: n}) for n in values} for name, values in sizes.items()}
    runs |= {name: {n: _run(of_size, usual) for n, of_size in row.items()} for name, row in grown.items()}
    found = {name: interleaved(rounds, **{str(n): run for n, run in row.items()}) for name, row in runs.items()}
    slopes = {
        name: np.polyfit(np.log([float(n) for n in row]), np.log(list(row.values())), 1)[0]
        for name, row in found.items()
    }
    return {"seconds": found, "slopes": {name: round(float(slope), 3) for name, slope in slopes.items()}}


def _run(model: ChatModel, size: dict) -> Callable[[], None]:
    sides = random_batches(model, size["examples"], size["tokens"])
    return lambda: eap_ig(model, sides, left(size["points"]))


def memory_above_model(task: str, examples: int, tokens: int) -> int:
    """Bytes at the peak of a task above the loaded embedded model, in a fresh process."""
    command = [sys.executable, __file__, "--memory-of", task, str(examples), str(tokens)]
    # every larger block of its own, so that what is freed goes back and the allocator's leftovers do not count
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout.split()[-1])


def _measure_memory(task: str, examples: int, tokens: int) -> None:
    model = load_model()
    sides = random_batches(model, examples, tokens)
    bare_pass(model, tuple(Batch(s.input_ids[:1, :4], s.attention_mask[:1, :4], 4) for s in sides)[0])  # warm up
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of loading: begin anew (Linux)
    before = _memory("VmRSS")
    if task == "bare":
        bare_pass(model, sides[0])
    else:
        eap_ig(model, sides)
    print(_memory("VmHWM") - before)


def _memory(field: str) -> int:
    """Bytes of this process: what it holds (VmRSS) or its peak (VmHWM)."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) * 1024


def gpu_cost(rounds: int) -> dict:
    """EAP-IG on a Llama-2-7B shape in bf16, one example of 100 tokens: seconds, ratio and peak memory."""
    model = random_llama("cuda", torch.bfloat16, **SHAPES["llama-2-7b shape"])
    found = attribution_cost(model, 1, 100, rounds)
    peaks = {}
    sides = random_batches(model, 1, 100)
    for name, task in (("bare", lambda: bare_pass(model, sides[0])), ("eap_ig", lambda: eap_ig(model, sides))):
        torch.cuda.reset_peak_memory_stats()
        task()
        peaks[name] = torch.cuda.max_memory_allocated()
    return found | {"peak_bytes": peaks, "device": torch.cuda.get_device_name(), "edges": graph_of(model).n_edges}


def bench(rounds: int) -> dict:
    """Everything, as one dictionary."""
    threads, model = torch.get_num_threads(), load_model()
    say(f"the embedded model, 8 x 40 tokens, on {threads} threads ...")
    on_all = attribution_cost(model, 8, 40, rounds)
    torch.set_num_threads(1)
    say("the same on one thread, as all that follows ...")
    embedded = attribution_cost(model, 8, 40, rounds)
    say("the sweep against separate runs ...")
    swept = sweep_cost(model, rounds)
    say("attribution over responses, and a circuit ...")
    responses = response_cost(model, rounds)
    say("peak memory ...")
    peaks = {task: memory_above_model(task, 8, 40) for task in ("bare", "eap_ig")}
    say("the GPT-2-small shape ...")
    small = attribution_cost(random_llama(**SHAPES["gpt2-small shape"]), 4, 17, rounds)
    say("growth ...")
    found = {
        "eap_ig_ratio": embedded["ratio"],
        "eap_ig_ratio_all_threads": on_all["ratio"],
        "eap_ig_memory_ratio": peaks["eap_ig"] / peaks["bare"],
        "sweep_ratio": swept["ratio"],
        "response_ratio": responses["attribution_ratio"],
        "circuit_ratio": responses["circuit_ratio"],
        "threads": threads,
        "embedded_all_threads": on_all,
        "embedded": embedded | {"peak_bytes_above_model": peaks},
        "sweep": swept,
        "responses": responses,
        "gpt2_small_shape": small,
        "growth": growth(rounds),
        "rounds": rounds,
    }
    if torch.cuda.is_available():
        say("the Llama-2-7B shape on the GPU ...")
        found["llama_2_7b_shape"] = gpu_cost(rounds)
    return found | run_metadata()


def with_gpu_figures(found: dict, stored: Path) -> dict:
    """The figures, with those that an earlier run took on a GPU where this machine has none."""
    before = json.loads(stored.read_text()) if stored.exists() else {}
    return {name: before[name] for name in ("llama_2_7b_shape",) if name in before} | found


def table(found: dict) -> str:
    """The main lines for a terminal."""
    lines = [f"{'':34} {'s':>8} {'ratio':>7}"]
    for name in ("embedded_all_threads", "embedded", "gpt2_small_shape", "llama_2_7b_shape"):
        if name in found:
            row = found[name]
            lines += [f"{name:22} bare pass    {row['bare']:8.3f} {1:7.2f}"]
            lines += [f"{name:22} EAP          {row['eap']:8.3f} {row['eap_ratio']:7.2f}"]
            lines += [f"{name:22} EAP-IG left  {row['eap_ig']:8.3f} {row['ratio']:7.2f}  (over {POINTS} bare passes)"]
            lines += [f"{name:22} EAP-IG mid   {row['eap_ig_midpoint']:8.3f} {row['midpoint_ratio']:7.2f}"]
    lines += [f"sweep over separate runs: {found['sweep_ratio']:.2f}"]
    lines += [f"attribution over response tokens, over 10 bare passes: {found['response_ratio']:.2f}"]
    lines += [f"one circuit patched exactly, over a bare forward pass: {found['circuit_ratio']:.2f}"]
    lines += [f"peak memory of EAP-IG over a bare pass, above the model: {found['eap_ig_memory_ratio']:.2f}"]
    lines += [f"growth, slope on log-log axes: {found['growth']['slopes']}"]
    return "\n".join(lines)


def over_limits(found: dict) -> list[str]:
    """What costs more than the book promises, in words."""
    told = {"response_ratio": "attribution over response tokens", "circuit_ratio": "one circuit patched exactly"}
    return [f"{told[name]}: {found[name]:.2f}, promised at most {LIMITS[name]:g}" for name in LIMITS
            if found[name] > LIMITS[name]]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", nargs=3, metavar=("TASK", "EXAMPLES", "TOKENS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_of:
        task, examples, tokens = given.memory_of
        return _measure_memory(task, int(examples), int(tokens))
    found = bench(given.rounds)
    write_json(OUT, with_gpu_figures(json.loads(json.dumps(found)), OUT))
    print(table(found))
    print(f"written to {OUT.relative_to(ROOT)}")
    if dear := over_limits(found):
        sys.exit("over its limit: " + "; ".join(dear))


if __name__ == "__main__":
    main()
