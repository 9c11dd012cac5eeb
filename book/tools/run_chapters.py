"""Run the chapters with papermill: `python book/tools/run_chapters.py --profile smoke|book [NAME ...]`.

A result goes to `_build/PROFILE/chapters/NAME.ipynb`, with a note of what it was made from beside it, so that
a chapter is run again only when its source, its parameters, steerutils or the main libraries have changed.
"""

import argparse
import ast
import hashlib
import json
import multiprocessing
import os
import platform
import re
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROFILES = ("smoke", "book")
CELL_SECONDS = 1800  # a cell that takes longer hangs
CHAPTER_BYTES = 6 * 2**30  # what a chapter may take at its peak


class ChapterError(RuntimeError):
    """A chapter that did not run to its end; the message names the cell."""


def chapters() -> list[str]:
    """The names of all chapters, in the order of the book."""
    return sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def source(name: str) -> Path:
    """The notebook of a chapter, relative to the root of the repository."""
    if name not in chapters():
        raise ChapterError(f"there is no chapter {name}; the chapters are: {', '.join(chapters())}")
    return Path("notebooks", f"{name}.ipynb")


def result_path(name: str, profile: str) -> Path:
    """Where the executed notebook of a chapter lies."""
    return ROOT / "_build" / profile / "chapters" / f"{name}.ipynb"


def declared_parameters(notebook: Path) -> dict:
    """The parameters that a notebook declares, with their defaults."""
    from papermill import inspect_notebook

    found = inspect_notebook(str(notebook))
    return {name: ast.literal_eval(parameter["default"]) for name, parameter in found.items()}


def check_names(notebook: Path, parameters: dict) -> dict:
    """All parameters of a run, defaults included; ValueError for one that the notebook does not declare."""
    declared = declared_parameters(notebook)
    if unknown := sorted(set(parameters) - set(declared)):
        raise ValueError(f"{notebook}: unknown parameter {', '.join(unknown)}; it takes {', '.join(declared)}")
    return declared | parameters


def library_files() -> list[Path]:
    """The files of steerutils, code and data, on which every chapter depends."""
    files = (ROOT / "steerutils").rglob("*")
    return sorted(path for path in files if path.is_file() and "__pycache__" not in path.parts)


def fingerprint(files: list[Path], *facts) -> str:
    """One hash of files, by path and content, and of any facts beside them."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for path in files:
        digest.update(f"\0{path.relative_to(ROOT)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def wanted_note(name: str, parameters: dict) -> str:
    """The fingerprint that an up-to-date result of a chapter carries.

    Stored results that it may show are its own, by name, and those of no chapter (rankings, vectors, bench).
    """
    stored = (ROOT / "book" / "results").glob("*.json")
    shown = sorted(path for path in stored if path.stem.startswith(name) or not re.match(r"[0-9A]", path.stem))
    versions = [platform.python_version()] + [version(library) for library in ("torch", "transformers")]
    return fingerprint([ROOT / source(name), *library_files(), *shown], parameters, versions)


def is_fresh(result: Path, wanted: str) -> bool:
    """Whether a result was made from the present sources and has not been changed since."""
    note = result.with_suffix(".json")
    if not (result.exists() and note.exists()):
        return False
    kept = json.loads(note.read_text())
    made = {"made_from": wanted, "result": hashlib.sha256(result.read_bytes()).hexdigest()}
    return made.items() <= kept.items() and "seconds" in kept


def execute(
    notebook: str, running: str, parameters: dict, threads: int | None, cell_seconds: int = CELL_SECONDS
) -> tuple[str, float]:
    """Execute one notebook in this process: what went wrong (empty if nothing) and the peak memory in GiB."""
    import papermill

    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow each other tenfold on busy cores
    os.chdir(ROOT)
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # the kernel is this environment's Python
    problem = ""
    try:
        papermill.execute_notebook(
            notebook,
            running,
            parameters,
            kernel_name="python3",
            progress_bar=sys.stderr.isatty(),
            execution_timeout=cell_seconds,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # its notes on transport and shutdown are noise
        )
    except papermill.PapermillExecutionError as error:
        first_line = error.source.strip().splitlines()[0]
        problem = f"cell [{error.exec_count}] `{first_line}` raised {error.ename}: {error.evalue}"
    except Exception as error:  # a dead or silent kernel: out of memory, or a cell over its time
        problem = f"{type(error).__name__}: {error}"
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # the kernel is the only child
    return problem, peak / 2 ** (30 if sys.platform == "darwin" else 20)


def run(name: str, profile: str, threads: int | None = None) -> Path:
    """The executed notebook of a chapter, run now (on all cores, or on `threads`) unless an up-to-date one is there.

    Raises ChapterError, naming the cell, when the chapter fails; ValueError when it does not take `profile`.
    """
    parameters = check_names(ROOT / source(name), {"profile": profile})
    wanted, result = wanted_note(name, parameters), result_path(name, profile)
    if is_fresh(result, wanted):
        print(f"{name} ({profile}): up to date", flush=True)
        return result
    print(f"{name} ({profile}): running", flush=True)
    result.parent.mkdir(parents=True, exist_ok=True)
    running, start = result.with_suffix(".running.ipynb"), time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # its own process, to measure its memory
        job = (str(source(name)), str(running.relative_to(ROOT)), {"profile": profile}, threads)
        problem, peak = pool.apply(execute, job)
    seconds = time.perf_counter() - start
    if problem:
        raise ChapterError(f"{name} ({profile}) failed after {seconds:.0f} s: {problem}\n  See {running}")
    os.replace(running, result)
    note = {"made_from": wanted, "result": hashlib.sha256(result.read_bytes()).hexdigest()}
    note |= {"seconds": round(seconds), "gib": round(peak, 1), "threads": threads or os.cpu_count()}
    result.with_suffix(".json").write_text(json.dumps(note))
    print(f"{name} ({profile}): done in {seconds:.0f} s, {peak:.1f} GiB at its peak", flush=True)
    return result


def run_all(names: list[str], profile: str) -> None:
    """Run several chapters, one a core if memory allows: two threads on one small model mostly wait."""
    cores, memory = os.cpu_count() or 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    jobs = max(1, min(cores, memory // CHAPTER_BYTES, len(names)))
    with ThreadPoolExecutor(jobs) as pool:
        started = [pool.submit(run, name, profile, max(1, cores // jobs)) for name in names]
        try:
            for job in started:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def records(result: Path) -> dict:
    """The recorded values of an executed chapter: numbers, texts or intervals, by name."""
    found = {}
    for cell in json.loads(result.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            if kept := output.get("metadata", {}).get("steerutils"):
                if kept["name"] in found:
                    raise ChapterError(f"{result.stem} records {kept['name']} twice; give each value its own name")
                found[kept["name"]] = kept["value"]
    return found


def rows(result: Path) -> dict:
    """The raw rows that an executed chapter kept, by name: their columns and data."""
    outputs = [o for cell in json.loads(result.read_text(encoding="utf-8"))["cells"] for o in cell.get("outputs", [])]
    kept = [o["metadata"]["steerutils_rows"] for o in outputs if "steerutils_rows" in o.get("metadata", {})]
    if len({row["name"] for row in kept}) < len(kept):
        raise ChapterError(f"{result.stem} keeps rows of one name twice; give each table its own name")
    return {row["name"]: {key: row[key] for key in ("columns", "data")} for row in kept}


def main() -> None:
    """Run the chapters named, or all; exit with status 1 when one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=PROFILES, required=True)
    parser.add_argument("names", nargs="*", metavar="NAME", help="chapters, such as 00-quickstart (default: all)")
    arguments = parser.parse_args()
    print(f"== the chapters, profile {arguments.profile}", flush=True)
    try:
        run_all(arguments.names or chapters(), arguments.profile)
    except (ChapterError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
