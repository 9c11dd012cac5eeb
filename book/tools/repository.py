"""Carry the repository's URL from `pyproject.toml` to every badge, button and install cell; `--check` only reports.

The URL stands once, as `[project.urls] Repository`. The README, the notebooks and the package's install cells
repeat it because they are read where nothing can fill it in. The pages take it when they are built.
"""

import re
import sys
from pathlib import Path

from build_pages import ROOT, repository

SLUG = r"[\w.-]+/[\w.-]+?"
LINKS = [  # where the files name the repository: before it, and what follows
    (r"colab\.research\.google\.com/github/", r"(?=/blob/)"),
    (r"git\+https://github\.com/", r"(?=[\"'\\\s])"),
    (r"git clone https://github\.com/", r"(?=\s)"),
    (r"https://github\.com/", r"(?=/actions/)"),
    (r"repository-code: https://github\.com/", r"(?=\s)"),
]


def slug() -> str:
    """OWNER/NAME of the repository."""
    return repository().removeprefix("https://github.com/").rstrip("/")


def files() -> list[Path]:
    """The files that repeat the URL."""
    return [ROOT / "README.md", ROOT / "CITATION.cff", *sorted((ROOT / "notebooks").glob("*.ipynb"))]


def carried(text: str) -> str:
    """A file's text with its links to the repository, and to its published pages, as they should be."""
    for before, after in LINKS:
        text = re.sub(f"({before}){SLUG}{after}", rf"\g<1>{slug()}", text)
    owner, name = slug().split("/")
    return re.sub(r"https://[\w-]+\.github\.io/[\w.-]+", f"https://{owner}.github.io/{name}", text)


def main() -> None:
    """Rewrite the files that differ, or report them."""
    stale = [path for path in files() if carried(path.read_text()) != path.read_text()]
    if "--check" in sys.argv:
        sys.exit(f"run python book/tools/repository.py: it would change {stale}" if stale else 0)
    for path in stale:
        path.write_text(carried(path.read_text()))
        print(f"{path.relative_to(ROOT)}: now links to {repository()}")


if __name__ == "__main__":
    main()
