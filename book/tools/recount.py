"""Count again what follows from the raw rows of stored runs of 05, 06 and 08: `python book/tools/recount.py MODEL`.

Cells tagged `from-rows` need no model: they go from what circuits carry, or what answers were, prompt by prompt, and
from recorded values to gaps, curves and verdicts. So a run gains the numbers of newer cells without running again. What
it recorded before has to come out again; verdicts follow the rule of today. `recounted` in its file names what is new.

Prompts that a run asked twice are found by their rows, which are equal in every number, and count once from then on.
Where they chose edges together with the others, that stays as it was: `repeated` tells how many they are. Numbers that
cannot be counted again go: of tokens, of single texts, and of other blocks, whose prompts have no rows.
"""

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import pandas as pd
from expected import agree, numbers
from results import OUT, write_result
from run_chapters import ROOT, ChapterError, execute, records, source

from steerutils.record import read_json, result_name, say, write_json

FROM_ANSWERS = "the three methods steer alike"  # the claim that rests on answers, which may be in no row
UNTOLD = ("n_positions", "n_first_flips", "flipped_", "carried_harmful_", "carried_harmless_")  # not told by rows
OF_BLOCK = re.compile(r"_block_[+-]\d+$")
FROM_FILE = """
import numpy as np
import pandas as pd
from steerutils.record import read_json


def numbers(kept):
    return (kept["value"], kept["low"], kept["high"]) if isinstance(kept, dict) else (kept, np.nan, np.nan)


def plain(column):  # sizes of circuits are numbers
    return float(column) if column.replace(".", "", 1).isdigit() else column


stored = read_json({path!r})
values = {{name: numbers(kept) for name, kept in stored["values"].items() if not isinstance(kept, str)}}
tables = {{
    name: pd.DataFrame(kept["data"], columns=map(plain, kept["columns"])) for name, kept in stored["rows"].items()
}}
"""
THEN = {  # what a chapter's cells find, in the chapter's names
    "05-steering-circuits": """
told |= values
effects = {
    name.removeprefix("carried of "): table for name, table in tables.items() if name.startswith("carried of ")
}
compared = [name for name in controls if name in effects["DIM, held out"]]
others_than_dim = [*methods[1:], *controls, "near", *(name for name in own_answers if name in effects["DIM"])]
fewest = int(min(told["n_prompts_harmful"][0], told["n_prompts_harmless"][0]))
""",
    "06-attention-freezing": """
of_others = tables.get("answers, other vectors", pd.DataFrame(columns=["task", "vector", "setting"]))
tasks = {"induce": (None, None, "refusal"), "bypass": (None, None, "compliance")}
""",
    "08-sparse-steering": """
none = pd.DataFrame(columns=["direction", "method", "rescaled", "draw", "sparsity"])
of_tokens, of_answers = tables.get("first token", none), tables.get("verdicts", none)
directions = {"induce": (None, None, "refusal"), "bypass": (None, None, "compliance")}
""",
}


def short_notebook(chapter: str, path: Path) -> nbformat.NotebookNode:
    """The chapter's cells that run on a stored run alone: parameters, imports, and those tagged `from-rows`."""
    notebook = nbformat.read(ROOT / source(chapter), 4)
    found = notebook.cells
    first = next(i for i, cell in enumerate(found) if "parameters" in cell.metadata.get("tags", ()))
    imports = next(cell for cell in found[first:] if "from steerutils import (" in cell.source)
    tagged = [cell for cell in found if "from-rows" in cell.metadata.get("tags", ())]
    rows = nbformat.v4.new_code_cell(FROM_FILE.format(path=str(path)) + THEN[chapter])
    notebook.cells = [found[first], imports, rows, *tagged]
    return notebook


def counted(chapter: str, path: Path) -> dict:
    """What these cells record about a stored run. Raises ChapterError, naming the cell."""
    settings = read_json(path)["settings"] | {"device": "cpu", "folder": ""}
    with TemporaryDirectory() as folder:
        notebook, out = Path(folder, "cells.ipynb"), Path(folder, "executed.ipynb")
        nbformat.write(short_notebook(chapter, path), notebook)
        problem, _ = execute(str(notebook), str(out), settings, None)
        if problem:
            raise ChapterError(f"{path.stem}: {problem}")
        return records(out)


def verdicts(values: dict) -> dict:
    """The verdict of every claim among recorded values."""
    return {text: values[f"verdict_{name[6:]}"] for name, text in values.items() if name.startswith("claim_")}


def distinct(stored: dict) -> dict:
    """A run of 05 without the rows of prompts that are in it twice. The same run if none are."""
    first = table_of(stored["rows"]["carried of DIM"])
    numbers_of = first.drop(columns=["side", "run", "prompt"]).columns
    by_prompt = first.pivot(index=["side", "prompt"], columns="run", values=list(numbers_of)).reset_index("side")
    twice = by_prompt.duplicated()
    again = {side: {*found.index[found]} for side, found in twice.groupby(by_prompt["side"])}  # prompts, by side
    if not any(again.values()):
        return stored
    rows = dict(stored["rows"])
    for name in [name for name in rows if name.startswith("carried of ")]:
        table = table_of(rows[name])
        goes = [prompt in again[side] for side, prompt in zip(table["side"], table["prompt"])]
        rows[name] = rows[name] | {"data": [row for row, drop in zip(rows[name]["data"], goes) if not drop]}
    values = {
        name: value
        for name, value in stored["values"].items()
        if not (name.startswith(UNTOLD) or OF_BLOCK.search(name))
    }
    left = {side: values[f"n_prompts_{side}"] - len(found) for side, found in again.items()}
    values = values | {f"n_prompts_{side}": n for side, n in left.items()}
    values |= {"n_prompts": sum(left.values()), "n_responses": 2 * sum(left.values())}
    values["fell_short"] = " and ".join(f"{n} {side} ones" for side, n in left.items() if n < values["n_wanted"])
    values["repeated"] = " and ".join(f"{len(found)} {side} ones" for side, found in again.items() if found)
    rows = {name: kept for name, kept in rows.items() if name not in ("by position", "own curves", "by block")}
    return stored | {"rows": rows, "values": values}


def table_of(kept: dict) -> pd.DataFrame:
    """Raw rows as a table."""
    return pd.DataFrame(kept["data"], columns=kept["columns"])


def merged(values: dict, found: dict, same: bool = True) -> tuple[dict, list[str]]:
    """A run's values with those that are new in `found`, and the names (or claims) of the new ones.

    Claims that the chapter no longer makes go. Unless they need not be the `same`, since prompts went: raises
    ChapterError when a number that the run recorded comes out differently. (Its interval may be of another kind by now,
    and then the newer one counts.) What the rows do not tell stays as it was.
    """
    told, new = verdicts(values), [claim for claim, verdict in verdicts(found).items() if claim not in verdicts(values)]
    of_claims = ("claim_", "verdict_") if verdicts(found) else ()  # where the cells settle none, all stay
    kept = {name: value for name, value in values.items() if not name.startswith(of_claims)}
    for name, value in found.items():
        if name.startswith(("claim_", "verdict_")) or value == "not measured":
            continue  # claims come below; what the rows do not tell stays
        words = isinstance(value, str) or isinstance(kept.get(name), str)  # may be put in another way by now
        if same and name in kept and not words and not agree(central(value), central(kept[name]), abs=1e-4):
            raise ChapterError(f"{name} is {central(value)} from the raw rows, but the run recorded {kept[name]}")
        if name not in kept or not agree(value, kept[name], abs=1e-4):
            new.append(name)
            kept[name] = value
    for number, (claim, verdict) in enumerate(verdicts(found).items()):
        stays = claim in told and claim.startswith(FROM_ANSWERS)
        kept |= {f"claim_{number}": claim, f"verdict_{number}": told[claim] if stays else verdict}
        new += [claim] if claim in told and not stays and verdict != told[claim] else []
    return kept, new


def central(value):
    """A recorded value without its interval."""
    return numbers(value)["value"]


def recount(chapter: str, path: Path) -> list[str]:
    """Count a stored run again and write what is new into its file: the names of the new values and claims."""
    stored = read_json(path)
    given = stored["settings"]["strength"]
    if given:
        stored["values"].setdefault("strength", given)
    once = distinct(stored) if "carried of DIM" in stored["rows"] else stored
    with TemporaryDirectory() as folder:
        values, new = merged(
            once["values"], counted(chapter, write_json(Path(folder, path.name), once)), once is stored
        )
    if new:
        write_result(path, once | {"values": values, "recounted": sorted({*stored.get("recounted", []), *new})})
    return new


def main() -> None:
    """Recount the runs of the models named; exit with status 1 when one cannot be."""
    try:
        for chapter in THEN:
            for name in (result_name(chapter, model_name) for model_name in sys.argv[1:]):
                path = OUT / f"{name}.json"
                say(f"{name}: {', '.join(recount(chapter, path)) or 'nothing new' if path.exists() else 'no run'}")
    except ChapterError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
