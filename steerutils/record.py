"""Recorded values, notebook parameters and result files: what makes a number on a page checkable."""

import hashlib
import io
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import metadata, version
from pathlib import Path
from string import Formatter

import numpy as np
import pandas as pd

INTERPRETER_NAMES = {"In", "Out", "exit", "quit", "get_ipython", "open"}
LIBRARIES = ("torch", "transformers", "numpy", "steerutils")
PROFILES = {"smoke": "quick", "book": "minutes", "full": "an hour or more"}
# stored results of these come with the book; personality is steered in the model that was not taught to refuse
RESULT_MODELS = ("smollm2-135m-refusal", "smollm2-135m", "Qwen2.5-Coder-0.5B-Instruct")  # the book's own first
CHECKED = "_steerutils_checked_parameters"  # the global that check_parameters leaves behind
LONGEST_NAME = 40  # characters of a verdict or a method's name


def record(name: str, value, low: float | None = None, high: float | None = None, digits: int = 2) -> None:
    """Show a number of a chapter and keep it, exactly, in the notebook's output metadata.

    The one call serves three readers: pytest compares the exact value, the prose quotes the text with
    `{glue:text}`, and a person sees the number. `low` and `high` are the ends of its interval; `digits`
    are the decimals shown. Raises ValueError for a value, or an end, that is not finite.
    """
    exact = _plain(value)
    if any(isinstance(number, float) and not math.isfinite(number) for number in (exact, _plain(low), _plain(high))):
        raise ValueError(f"record({name!r}): the value is not a finite number; look at the cell that computes it.")
    kept = exact if low is None else {"value": exact, "low": _plain(low), "high": _plain(high)}
    text = as_text(kept, digits)
    from IPython.display import display  # only a notebook needs it

    display(
        # a literal, as pages read it: a bare 0.90 would come out as 0.9
        {"text/plain": repr(text), "text/html": f"<small class='recorded'><code>{name}</code> = {text}</small>"},
        raw=True,
        metadata={
            "scrapbook": {"name": name, "mime_prefix": ""},
            "steerutils": {"name": name, "value": kept},
        },
    )


def record_rows(name: str, table: pd.DataFrame) -> None:
    """Keep raw rows (one a prompt and setting) in the notebook's output metadata, for `make results`; shows nothing.

    They are for verdicts and numbers. Raises ValueError for a text longer than a name, which may be an answer.
    """
    texts = table.select_dtypes(exclude="number").to_numpy().ravel()
    if long := next((str(text) for text in texts if len(str(text)) > LONGEST_NAME), None):
        raise ValueError(f"record_rows({name!r}): rows are for verdicts and numbers, not for answers: {long[:20]!r}...")
    rows = json.loads(table.to_json(orient="split", index=False, double_precision=6))
    from IPython.display import display  # only a notebook needs it

    display({"text/plain": "", "text/html": ""}, raw=True, metadata={"steerutils_rows": {"name": name} | rows})


def record_sizes(sizes: Mapping[str, object]) -> None:
    """Keep a chapter's sizes (of prompts, draws, ...) among its raw rows, a row a name and value; shows nothing."""
    every = pd.Series(dict(sizes), dtype=object).explode().astype(str)
    record_rows("sizes", every.rename_axis("name").reset_index(name="value"))


def name_of(label: str) -> str:
    """A label as a part of the names under which values are recorded: without spaces and commas."""
    return label.replace(", ", "_").replace(" ", "_")


def _plain(value):
    """The Python number behind a tensor, a numpy scalar or a number."""
    return value.item() if hasattr(value, "item") else value


def check_parameters(namespace: dict, profiles: Sequence[str] = ("smoke", "book")) -> dict:
    """Check a notebook's parameters against those its `parameters` cell declares; return them by name.

    Call it as `check_parameters(globals())` in the cell after the parameters. Papermill only prints a line
    when it is given an unknown parameter, and then runs on with the default: here that is an error, and so
    is a value of another type than the declared one, or a profile that is not among `profiles`. When a person changes a
    parameter and runs the cells again, what the chapter has made since counts as none. Raises ValueError.
    """
    declared = namespace.get("__annotations__", {})
    given = {n for n, v in namespace.items() if not n.startswith("_") and not _part_of_session(n, v)}
    if unknown := sorted(given - set(declared) if CHECKED not in namespace else ()):
        raise ValueError(f"unknown parameter {', '.join(unknown)}; this notebook takes: {', '.join(declared)}.")
    for name, kind in declared.items():
        value = namespace[name]
        if kind is float and type(value) is int:
            namespace[name] = value = float(value)
        if isinstance(kind, type) and not isinstance(value, kind):
            raise ValueError(f"parameter {name} = {value!r} should be {kind.__name__}.")
    if "profile" in declared and namespace["profile"] not in profiles:
        choices = ", ".join(f"{name!r} ({PROFILES[name]})" for name in profiles)
        raise ValueError(f"profile = {namespace['profile']!r}: this notebook has {choices}.")
    namespace[CHECKED] = True
    return {name: namespace[name] for name in declared}


def _part_of_session(name: str, value) -> bool:
    """Whether a global was there for another reason than being a parameter (an import, the shell's own)."""
    return name in INTERPRETER_NAMES or isinstance(value, types.ModuleType) or callable(value)


def run_metadata(**parameters) -> dict:
    """What a reader needs to repeat a result: its parameters (if any), library versions, machine and date (UTC)."""
    return ({"parameters": parameters} if parameters else {}) | {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def result_name(kind: str, model_name: str) -> str:
    """The name of the results of some kind for a model: a hub id or a folder counts by its last part."""
    return f"{kind}-" + re.sub(r"[^A-Za-z0-9.]+", "-", model_name.rstrip("/").split("/")[-1])


def stored_results(name: str) -> dict:
    """Full-size results that came with the book (`book/results/NAME.json`), from the repository's copy or its web page.

    Raises ValueError when there are none, with the command that makes them, and RuntimeError for a damaged file, which
    is not the same as none.
    """
    folder = Path(__file__).parents[1] / "book" / "results"
    if folder.exists():
        place = path = folder / f"{name}.json"
        if path.exists():
            return _parsed(path.read_bytes(), path)
        problem = "no such file"
    else:  # installed by itself, as on Colab
        urls = dict(line.split(", ", 1) for line in metadata("steerutils").get_all("Project-URL") or [])
        place = urls.get("Repository", "").replace("github.com", "raw.githubusercontent.com")
        place += f"/main/book/results/{name}.json"
        content, problem = _fetched(place)
        if content is not None:
            return _parsed(content, place)
    raise ValueError(
        f"no stored results {name!r} at {place} ({problem}). "
        "Make them in a clone of the book's repository: make results MODEL=..."
    )


def _parsed(content: bytes, place: Path | str) -> dict:
    try:
        return json.loads(content)
    except ValueError as error:  # cut off, or a page of something else
        raise RuntimeError(f"{place} is damaged ({error}): fetch the book's repository again.") from error


@cache
def _fetched(place: str) -> tuple[bytes | None, str]:
    """A web page's content, asked for once a session, or what went wrong. A network that fails is said aloud: a page
    that is not there means "no such result", but one that cannot be reached does not.
    """
    try:
        with urllib.request.urlopen(place, timeout=20) as answer:
            return answer.read(), ""
    except urllib.error.HTTPError as error:
        return None, str(error)
    except OSError as error:
        say(f"{place} could not be reached ({error}): the book's stored results are missing from what follows.")
        return None, str(error)


def stored_runs(chapter: str) -> dict[tuple[str, str], dict]:
    """The values of a chapter's stored runs (`make results`), by kind ("full size", or "book size" for a run in that
    profile) and model. Models without a run are left out.
    """
    return {run: stored["values"] for run, stored in _stored(chapter).items()}


def stored_rows(chapter: str, name: str) -> dict[tuple[str, str], pd.DataFrame]:
    """What `record_rows(name, ...)` kept in a chapter's stored runs, by kind and model as in `stored_runs`.

    Runs without rows of that name are left out.
    """
    return {
        run: pd.DataFrame(kept["data"], columns=kept["columns"])
        for run, stored in _stored(chapter).items()
        if (kept := stored.get("rows", {}).get(name))
    }


def _stored(chapter: str) -> dict[tuple[str, str], dict]:
    found = {}
    for model_name in RESULT_MODELS:
        with suppress(ValueError):  # not run yet
            stored = stored_results(result_name(chapter, model_name))
            found[f"{stored['asked']['profile']} size", model_name] = stored
    return found


def full_size(chapter: str, labels: dict[str, str], digits: int = 2) -> pd.DataFrame:
    """What a chapter recorded in its stored runs, as text with intervals: a row a label, a column a run.

    `labels` maps what the row is called to the recorded name; a value that a run does not have is left blank, and a row
    that none has is left out. Without any run, one line says so.
    """
    found = {
        ", ".join(run): {label: as_text(values.get(name, ""), digits) for label, name in labels.items()}
        for run, values in stored_runs(chapter).items()
    }
    if not found:
        return pd.DataFrame({"full size": ["not run yet for any model"]})
    table = pd.DataFrame(found, index=list(labels))
    return table[(table != "").any(axis=1)]


def show_full_size(
    chapter: str,
    rows: Mapping[str, str],
    columns: Mapping[str, str],
    title: str = "",
    whole: Sequence[str] = (),
    digits: int = 2,
) -> None:
    """Show what a chapter recorded in its stored runs, a table a run, where rows and columns both name the values.

    `rows` maps labels to keys, `columns` maps labels to names with {} in place of a key; the columns in `whole` have
    no decimals, the others `digits`. A dash stands where a word was recorded instead of a number, a blank where
    nothing was; rows of which a run recorded nothing are left out, and so are runs that recorded nothing of all this.
    Each table stands under its model and the `title`, in which `{name}` is filled in by what the run recorded.
    A run that did not record these stands without the title. Without any run, one line says so.
    """
    from IPython.display import Markdown, display  # only a notebook needs it

    def text(found: dict, name: str, digits: int) -> str:
        return "–" if isinstance(found.get(name), str) else as_text(found.get(name, ""), digits)

    runs = stored_runs(chapter)
    for (kind, model_name), found in runs.items():
        told = {
            label: {row: text(found, name.format(key), 0 if label in whole else digits) for row, key in rows.items()}
            for label, name in columns.items()
        }
        table = pd.DataFrame(told, index=list(rows))
        if (table != "").any(axis=None):
            named = {name.split("[")[0] for _, name, _, _ in Formatter().parse(title) if name}
            display(Markdown(f"**{model_name}**, {kind}{title.format_map(found) if named <= found.keys() else ''}:"))
            display(table[(table != "").any(axis=1)])
    if not runs:
        display(Markdown("Not run at full size yet for any model."))


def findings(chapter: str, sentences: Sequence[str], digits: int = 2):
    """What a chapter's stored runs say: under each model's name the sentences, with `{name}` filled in by what the run
    recorded under that name, interval included.

    A sentence that names what a run did not record is left out. Without any run, one line says so. Returns IPython
    Markdown.
    """
    from IPython.display import Markdown  # only a notebook needs it

    parts = []
    for (kind, model_name), values in stored_runs(chapter).items():
        known = [s for s in sentences if {name for _, name, _, _ in Formatter().parse(s) if name} <= values.keys()]
        texts = {name: as_text(value, digits) for name, value in values.items()}
        parts.append("\n".join([f"**{model_name}**, {kind}:\n", *(f"- {s.format_map(texts)}" for s in known)]))
    return Markdown("\n\n".join(parts) or "Not run at full size yet for any model.")


def above(interval: Sequence[float], bar: float) -> bool | None:
    """Whether a value lies above a bar, given (value, low, high): None where its interval holds the bar itself."""
    _, low, high = interval
    return True if low > bar else False if high < bar else None


def below(interval: Sequence[float], bar: float) -> bool | None:
    """Whether a value lies below a bar, given (value, low, high): None where its interval holds the bar itself."""
    found = above(interval, bar)
    return None if found is None else not found


def all_of(outcomes: Sequence[bool | None]) -> bool | None:
    """One test from several: True if all are, False if any is, else None, which leaves both open."""
    return False if False in outcomes else None if None in outcomes else True


def holds(tests: Mapping[str, bool | np.bool_ | None]) -> str:
    """A claim's verdict from its tests by name: one word if they agree, else "holds (induce), not settled (bypass)".

    None stands for a test that leaves both open. More than three tests are counted, not named. Raises ValueError for no
    tests.
    """
    if not tests:
        raise ValueError("a verdict needs at least one test.")
    cases = {}
    for word, outcome in (("holds", True), ("does not hold", False), ("not settled", None)):
        if named := [name for name, found in tests.items() if (found if found is None else bool(found)) is outcome]:
            of = ", ".join(named) if len(tests) <= 3 else f"{len(named)} of {len(tests)}"
            cases[word] = f"{word} ({of})"
    return ", ".join(cases.values()) if len(cases) > 1 else next(iter(cases))


def settle(chapter: str, claims: Mapping[str, Mapping[str, bool | np.bool_ | None]]) -> pd.DataFrame:
    """Record every claim and its verdict: what `holds` says of its tests, "not run" without tests.

    The table shows them ("live") beside the verdicts of the chapter's stored runs: a row a claim, a column a run.
    """
    live = {claim: holds(tests) if tests else "not run" for claim, tests in claims.items()}
    for number, (claim, verdict) in enumerate(live.items()):
        record(f"claim_{number}", claim)
        record(f"verdict_{number}", verdict)
    table = pd.DataFrame({"live": live})
    for run, values in stored_runs(chapter).items():
        known = {text: values[f"verdict_{name[6:]}"] for name, text in values.items() if name.startswith("claim_")}
        table[", ".join(run)] = pd.Series(known).reindex(table.index).fillna("")
    return table


def show_verdicts(verdicts: pd.DataFrame, headings: Mapping[str, Sequence[str]], rest: str = "Further claims") -> None:
    """Show the table of `settle` in parts: under each heading the claims that begin with one of its beginnings.

    A claim stands under the first heading that fits, and under `rest` if none does. The column of the live run is left
    out where it settles nothing and a stored run is beside it; one line says so. A claim that was never put to a stored
    run has a dash there: the run is older than the claim. Raises ValueError for a beginning that no claim has.
    """
    from IPython.display import Markdown, display  # only a notebook needs it

    lost = [start for starts in headings.values() for start in starts if not verdicts.index.str.startswith(start).any()]
    if lost:
        raise ValueError(f"no claim begins with {lost[0]!r}")
    table = verdicts.replace("", "–")
    if len(table.columns) > 1 and table["live"].isin(["not settled", "not run"]).all():
        table = table.drop(columns="live")
        display(Markdown("The live run is too small to settle any of these: what stands here is from the stored runs."))
    place = [
        next((heading for heading, starts in headings.items() if claim.startswith(tuple(starts))), rest)
        for claim in table.index
    ]
    for heading in (*headings, rest):
        part = table[np.array(place) == heading]
        if len(part):
            display(Markdown(f"**{heading}**"))
            display(part.rename_axis("claim"))


def as_text(recorded, digits: int = 2) -> str:
    """A recorded value as text, with its interval if it has one: `0.93 (0.90 to 0.96)`. What rounds to zero has no
    sign.
    """
    if isinstance(recorded, dict):
        value, low, high = (as_text(float(recorded[part]), digits) for part in ("value", "low", "high"))
        return f"{value} ({low} to {high})"
    return f"{recorded:z.{digits}f}" if isinstance(recorded, float) else str(recorded)


def read_json(path: Path | str):
    """The content of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_json(path: Path | str, content) -> Path:
    """Write JSON, whole or not at all."""
    return write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path | str, content: bytes) -> Path:
    """Write a file so that a reader sees the old one or the whole new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
        part.write(content)
    os.chmod(part.name, 0o644)  # temporary files are private; results are not
    os.replace(part.name, path)
    return path


def kept_arrays(
    folder: Path | str | None, about: Sequence, make: Callable[[], Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Arrays that take long to make, by name: from a file in the folder, or made and written there.

    The file's name stands for `about` (anything that JSON can hold): all that the arrays depend on. No folder keeps
    nothing.
    """
    name = hashlib.sha256(json.dumps(list(about)).encode()).hexdigest()[:24]  # without a folder, too: errors come early
    if not folder:
        return dict(make())
    path = Path(folder) / f"{name}.npz"
    if not path.exists():
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **make())
        write_bytes(path, buffer.getvalue())
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def say(line: str) -> None:
    """One line of progress on standard error, at once (standard output stays for results)."""
    print(line, file=sys.stderr, flush=True)
