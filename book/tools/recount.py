"""Count again what follows from the raw rows of a stored run of 05: `python book/tools/recount.py MODEL`.

The chapter's cells tagged `from-rows` need no model: they go from what circuits carry, prompt by prompt, and from
recorded values to gaps, curves and verdicts. So a run gains the numbers of newer cells without running again. What it
recorded before has to come out again, and stays; `recounted` in its file names what is new.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from expected import agree, numbers
from results import OUT, write_result
from run_chapters import ROOT, ChapterError, execute, records, source

from steerutils.record import read_json, result_name, say

CHAPTER = "05-steering-circuits"
FROM_FILE = """
import numpy as np
import pandas as pd
from steerutils.record import read_json


def numbers(kept):
    return (kept["value"], kept["low"], kept["high"]) if isinstance(kept, dict) else (kept, np.nan, np.nan)


def plain(column):  # sizes are numbers
    return float(column) if column.replace(".", "", 1).isdigit() else column


stored = read_json({path!r})
told |= {{name: numbers(kept) for name, kept in stored["values"].items() if not isinstance(kept, str)}}
effects = {{
    name.removeprefix("carried of "): pd.DataFrame(kept["data"], columns=map(plain, kept["columns"]))
    for name, kept in stored["rows"].items() if name.startswith("carried of ")
}}
compared = [name for name in controls if name in effects["DIM, held out"]]
others_than_dim = [*methods[1:], *controls, "near", *(name for name in own_answers if name in effects["DIM"])]
fewest = int(min(told["n_prompts_harmful"][0], told["n_prompts_harmless"][0]))
"""


def short_notebook(path: Path) -> nbformat.NotebookNode:
    """The chapter's cells that run on a stored run alone: parameters, imports, and those tagged `from-rows`."""
    notebook = nbformat.read(ROOT / source(CHAPTER), 4)
    found = notebook.cells
    first = next(i for i, cell in enumerate(found) if "parameters" in cell.metadata.get("tags", ()))
    imports = next(cell for cell in found[first:] if cell.source.startswith("from dataclasses"))
    tagged = [cell for cell in found if "from-rows" in cell.metadata.get("tags", ())]
    notebook.cells = [found[first], imports, nbformat.v4.new_code_cell(FROM_FILE.format(path=str(path))), *tagged]
    return notebook


def counted(path: Path) -> dict:
    """What these cells record about a stored run. Raises ChapterError, naming the cell."""
    settings = read_json(path)["settings"] | {"device": "cpu", "folder": ""}
    with TemporaryDirectory() as folder:
        notebook, out = Path(folder, "cells.ipynb"), Path(folder, "executed.ipynb")
        nbformat.write(short_notebook(path), notebook)
        problem, _ = execute(str(notebook), str(out), settings, None)
        if problem:
            raise ChapterError(f"{path.stem}: {problem}")
        return records(out)


def verdicts(values: dict) -> dict:
    """The verdict of every claim among recorded values."""
    return {text: values[f"verdict_{name[6:]}"] for name, text in values.items() if name.startswith("claim_")}


def merged(values: dict, found: dict) -> tuple[dict, list[str]]:
    """A run's values with those that are new in `found`, and the names (or claims) of the new ones.

    Claims that the chapter no longer makes go. Raises ChapterError when a number that the run recorded comes out
    differently; its interval may be of another kind by now, and then the newer one counts.
    """
    told, new = verdicts(values), [claim for claim in verdicts(found) if claim not in verdicts(values)]
    kept = {name: value for name, value in values.items() if not name.startswith(("claim_", "verdict_"))}
    for name, value in found.items():
        if name.startswith(("claim_", "verdict_")):
            continue
        if name in kept and not agree(central(value), central(kept[name]), abs=1e-4):
            raise ChapterError(f"{name} is {central(value)} from the raw rows, but the run recorded {kept[name]}")
        if name not in kept or not agree(value, kept[name], abs=1e-4):
            new.append(name)
            kept[name] = value
    for number, (claim, verdict) in enumerate(verdicts(found).items()):
        kept |= {f"claim_{number}": claim, f"verdict_{number}": told.get(claim, verdict)}
    return kept, new


def central(value):
    """A recorded value without its interval."""
    return numbers(value)["value"]


def recount(path: Path) -> list[str]:
    """Count a stored run again and write what is new into its file: the names of the new values and claims."""
    stored = read_json(path)
    given = stored["settings"]["strength"]
    known = stored["values"] if "strength" in stored["values"] or not given else stored["values"] | {"strength": given}
    values, new = merged(known, counted(path))
    if new:
        write_result(path, stored | {"values": values, "recounted": sorted({*stored.get("recounted", []), *new})})
    return new


def main() -> None:
    """Recount the runs of the models named; exit with status 1 when one cannot be."""
    try:
        for model_name in sys.argv[1:]:
            name = result_name(CHAPTER, model_name)
            say(f"{name}: {', '.join(recount(OUT / f'{name}.json')) or 'nothing new'}")
    except ChapterError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
