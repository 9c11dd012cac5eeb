"""Write `environment.yml` from `pyproject.toml`; with `--check`, only say whether the two agree."""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONDA_NAMES = {"torch": "pytorch"}  # where conda-forge calls a package otherwise
ONLY_PIP = {"nnsight"}  # not on conda-forge
HEADER = """\
# Made from pyproject.toml by book/tools/environment.py: change it there, not here.
# It is checked without being solved: it agrees with pyproject.toml and each line is a valid requirement, but no
# solver has been asked whether conda-forge has them all together. What is tested is `make`, with constraints.txt.
"""


def split(requirement: str) -> tuple[str, str]:
    """The name of a requirement and its bounds."""
    end = next((i for i, letter in enumerate(requirement) if letter in "<>=!~"), len(requirement))
    return requirement[:end].strip(), requirement[end:].strip()


def environment() -> str:
    """The text of the file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [split(line) for line in project["dependencies"] + project["optional-dependencies"]["book"]]
    lines = [f"python{project['requires-python']}"]
    lines += [CONDA_NAMES.get(name, name) + bounds for name, bounds in wanted if name not in ONLY_PIP]
    pip = [name + bounds for name, bounds in wanted if name in ONLY_PIP] + ["-e ."]
    body = ["name: steering-book", "channels: [conda-forge]", "dependencies:"]
    body += [f'  - "{line}"' for line in [*lines, "pip"]] + ["  - pip:"] + [f'      - "{line}"' for line in pip]
    return HEADER + "\n".join(body) + "\n"


def main() -> None:
    """Write the file, or check it."""
    path = ROOT / "environment.yml"
    if "--check" not in sys.argv:
        path.write_text(environment())
    elif not path.exists() or path.read_text() != environment():
        sys.exit("environment.yml is not what pyproject.toml says: run python book/tools/environment.py")


if __name__ == "__main__":
    main()
