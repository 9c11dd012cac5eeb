import socket
import time

import pandas as pd
import pytest
from conftest import byte_tokenizer

from steerutils import PromptError, encode, instructions, load_prompts, prompts
from steerutils.prompts import Batch, chat_text, pad, padded_after, shared_first


def test_the_books_sets_load_by_name_and_split():
    train = load_prompts("harmful", "train")
    assert {"instruction", "topic", "category", "split"} <= set(train.columns) and set(train["split"]) == {"train"}
    assert len(load_prompts("harmless")) >= 300 and len(load_prompts("harmless", "test")) == 120


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv"])
def test_a_file_of_ones_own_loads_by_path_and_is_split_reproducibly(tmp_path, ending):
    table = pd.DataFrame({"instruction": [f"Request {i}?" for i in range(60)], "note": "x"})
    path = tmp_path / f"mine.{ending}"
    if ending == "csv":
        table.to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines=ending == "jsonl")
    sizes = {split: len(load_prompts(path, split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 30, "validation": 10, "test": 20}
    assert load_prompts(path, "test").equals(load_prompts(path, "test"))
    together = [set(load_prompts(path, split)["instruction"]) for split in sizes]
    assert set.union(*together) == set(table["instruction"]) and sum(map(len, together)) == 60


def test_a_limit_spreads_over_the_split():
    some = load_prompts("harmful", "test", limit=12)
    assert len(some) == 12 and some["category"].nunique() >= 10


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(PromptError, match="no prompt set or file 'harmfull'.*harmless"):
        load_prompts("harmfull")
    with pytest.raises(PromptError, match="no rows in split 'dev'.*validation"):
        load_prompts("harmful", "dev")
    (tmp_path / "a.json").write_text('[{"text": "hello"}]')
    with pytest.raises(PromptError, match="no 'instruction' field; it has: text"):
        load_prompts(tmp_path / "a.json")


@pytest.mark.parametrize(
    "ending, text, line",
    [
        ("json", "{not json", 1),
        ("json", '[{"instruction": "a"},\n {"instruction":}]', 2),
        ("json", "", 1),
        ("jsonl", '{"instruction": "a"}\n\n{"instruction": "b"}\n{"instruction":\n', 4),
    ],
)
def test_a_file_that_is_no_json_is_named_with_the_line(tmp_path, ending, text, line):
    path = tmp_path / f"mine.{ending}"
    path.write_text(text)
    with pytest.raises(PromptError, match=rf"mine\.{ending} is not valid JSON: line {line}: \w+"):
        load_prompts(path)


def test_a_file_that_is_no_table_is_named_as_well(tmp_path):
    (tmp_path / "a.json").write_text("5")  # JSON, but no list of objects
    with pytest.raises(PromptError, match=r"a.json is not valid JSON: \w.+ Give a list of objects"):
        load_prompts(tmp_path / "a.json")


@pytest.mark.parametrize("name", list(prompts.PUBLIC_SETS))
def test_a_public_set_is_read_in_its_own_format_or_says_that_it_is_out_of_reach(name, tmp_path, monkeypatch):
    place, column = prompts.PUBLIC_SETS[name]
    local = tmp_path / place.rsplit("/", 1)[1]
    monkeypatch.setitem(prompts.PUBLIC_SETS, name, (str(local), column))
    with pytest.raises(PromptError, match=f"public set '{name}'.*could not be reached.*offline"):
        load_prompts(name)
    table = pd.DataFrame({column: ["Do this", "Do that", "And this"], "category": "c"})
    table.to_csv(local, index=False) if local.suffix == ".csv" else table.to_json(local, orient="records")
    assert instructions(name) == ["Do this", "Do that", "And this"]


@pytest.mark.parametrize("name", list(prompts.PUBLIC_SETS))
def test_without_a_network_a_public_set_says_what_to_do(name, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # no waiting before another try
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PromptError, match=f"public set '{name}'.*could not be reached. Go online, or download"):
        load_prompts(name)


def test_prompts_are_padded_on_the_left_and_responses_on_the_right(llama):
    batch = encode(llama.tokenizer, ["a", "a longer one"], ["xyz", "x"])
    assert batch.attention_mask[0, 0] == 0 and batch.attention_mask[1, 0] == 1
    assert batch.attention_mask[:, batch.prompt_length - 1].all()
    assert batch.response_mask.sum(1).tolist() == [3, 1]
    assert llama.tokenizer.decode(batch.input_ids[0][batch.response_mask[0]]) == "xyz"
    assert batch.inputs()["position_ids"][0, batch.prompt_length - 1] == batch.attention_mask[0].sum() - 4


def test_templates_are_told_not_to_think_aloud_and_which_day_it_is():
    """As Qwen3 and Llama 3 ask: else answers begin with a thinking block, and prompts change by the day."""
    template = (
        "{% if not date_string is defined %}{{ strftime_now('%d %b %Y') }}{% else %}{{ date_string }}{% endif %}"
        "{{ messages[0]['content'] }}{% if enable_thinking is defined and enable_thinking is false %}!{% endif %}"
    )
    assert chat_text(byte_tokenizer(template), "Hi") == "26 Jul 2024Hi!"
    assert chat_text(byte_tokenizer(), "Hi") == "<s>user\nHi</s>\n<s>assistant\n"


def test_empty_and_uneven_lists_are_errors(llama):
    with pytest.raises(PromptError, match="no prompts"):
        encode(llama.tokenizer, [])
    with pytest.raises(PromptError, match="2 prompts but 1 responses"):
        encode(llama.tokenizer, ["a", "b"], ["c"])


def test_padding_can_stand_after_the_tokens_that_all_prompts_begin_with():
    rows = [[7, 8, 9, 1], [7, 8, 2, 3, 4, 5], [7, 8, 9, 9, 6]]
    ids, mask = pad(rows, 0, left=True)
    batch = Batch(ids, mask, ids.shape[1])
    assert shared_first(batch) == 2
    assert shared_first(batch, 3) == 1  # the last three of the shortest stay out
    moved = padded_after(batch, 2)
    assert moved.input_ids.tolist() == [[7, 8, 0, 0, 9, 1], [7, 8, 2, 3, 4, 5], [7, 8, 0, 9, 9, 6]]
    assert moved.attention_mask.tolist() == [[1, 1, 0, 0, 1, 1], [1] * 6, [1, 1, 0, 1, 1, 1]]
    for row, tokens in enumerate(rows):
        real = moved.attention_mask[row].bool()
        assert moved.inputs()["position_ids"][row][real].tolist() == list(range(len(tokens)))
    assert padded_after(batch, 0).input_ids.equal(batch.input_ids)
