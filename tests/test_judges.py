import numpy as np
import pandas as pd
import pytest
import torch

from steerutils import (
    SteeringVector,
    answered_and_refused,
    bootstrap,
    bootstrap_draws,
    encode,
    is_refusal,
    jackknife,
    judge,
    last_logits,
    load_prompts,
    mean_over,
    paired_difference,
    rate,
    rate_of_draws,
    ratio_of_means,
    read_prompts,
    refusal_score,
    refusal_tokens,
    repetition,
    shown,
    steer,
)
from steerutils import judges as module
from steerutils.judges import MAX_REPETITION, answer_nll
from steerutils.prompts import refusal_wordings

QUESTION = "How do I bake bread?"
GOOD = "Mix flour, water, salt and yeast, let the dough rise for an hour, then bake it until it is brown."
REFUSAL = "I'm sorry, but I can't help with that request. Is there something else I can do for you?"
LOOPS = [
    "I can't I can't I can't I can't I can't I can't",
    "no no no no no no no no no no no no",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]
SALAD = "purple seventeen although carburetor vivid onto sneeze Tuesday marmalade beneath quantum elbow"


def test_every_wording_of_the_book_is_recognised_as_a_refusal():
    assert len(refusal_wordings()) >= 10
    assert all(is_refusal(text) for text in refusal_wordings())


@pytest.mark.parametrize("text", [GOOD, "", "The rule says you cannot park here. " * 3])
def test_other_text_is_no_refusal(text):
    assert not is_refusal(text)


def test_a_refusal_phrase_late_in_an_answer_does_not_count():
    assert not is_refusal(GOOD + " " + REFUSAL)
    assert is_refusal("I’m sorry, but no.")


@pytest.mark.parametrize("loop", LOOPS)
def test_loops_are_repetitive_and_text_is_not(loop):
    assert repetition(loop) > MAX_REPETITION > 2 * repetition(GOOD)
    assert repetition("") == 0


def test_the_gate_on_good_looping_empty_and_mixed_answers(embedded):
    answers = [
        GOOD,
        REFUSAL,
        *LOOPS,
        "",
        SALAD,
        "Mix the flour. " + "and the water " * 12,
        REFUSAL + " " + GOOD,
    ]
    table = judge(embedded, [QUESTION] * len(answers), answers)
    expected = ["compliance", "refusal", *["incoherent"] * 6, "refusal"]
    assert table["verdict"].tolist() == expected


def test_refusal_score_of_bfloat16_logits_is_computed_in_float32():
    logits = (3 * torch.randn(4, 40_000, generator=torch.Generator().manual_seed(0))).bfloat16()
    found = refusal_score(logits, [0, 3])
    assert torch.equal(found, refusal_score(logits.float(), [0, 3])) and found.dtype == torch.float32
    assert refusal_score(logits.double(), [0, 3]).dtype == torch.float64


def test_refusal_score_is_the_log_odds_of_the_refusal_tokens():
    logits = torch.tensor([[1.0, 2.0, 0.5, -1.0]])
    p = logits.softmax(-1)[0, [0, 3]].sum()
    assert refusal_score(logits, [0, 3]).item() == pytest.approx(torch.log(p / (1 - p)).item(), abs=1e-6)


def test_refusal_tokens_are_the_first_tokens_of_the_wordings(embedded):
    tokens = refusal_tokens(embedded.tokenizer, ["I cannot", "Sorry, no", "I won't"])
    assert [embedded.tokenizer.decode(t) for t in tokens] == ["I", "Sorry"]


def test_pairs_are_taken_if_one_side_is_answered_and_the_other_refused(embedded):
    fine, bad = load_prompts("harmless", "test"), load_prompts("harmful", "test")
    fine, bad = (table["instruction"].tolist()[:6] for table in (fine, bad))
    tokens = refusal_tokens(embedded.tokenizer)
    scores = [refusal_score(last_logits(embedded, side), tokens) for side in (fine, bad)]
    good = [(a, b) for a, b, low, high in zip(fine, bad, *scores) if low < 0 < high]
    mixed = [(bad[0], bad[1]), *good, (fine[0], fine[1]), (bad[2], fine[2])]
    assert len(good) > 3 and answered_and_refused(embedded, mixed, 3) == good[:3]
    assert answered_and_refused(embedded, mixed, len(good)) == good
    with pytest.raises(ValueError, match=f"only {len(good)} of {len(good) + 1} pairs"):
        answered_and_refused(embedded, mixed, len(good) + 1)


@torch.no_grad()
def test_answer_nll_equals_one_answer_at_a_time_by_hand(llama):
    prompts, answers = ["Why?", "A longer prompt"], ["Because it is.", "Yes."]
    values = answer_nll(llama, prompts, answers)
    for value, prompt, answer in zip(values, prompts, answers):
        ids = encode(llama.tokenizer, [prompt]).input_ids[0].tolist()
        target = llama.tokenizer(answer, add_special_tokens=False)["input_ids"]
        logp = llama.hf(torch.tensor([ids + target])).logits.log_softmax(-1)[0]
        by_hand = -np.mean([logp[len(ids) - 1 + i, t].item() for i, t in enumerate(target)])
        assert value.item() == pytest.approx(by_hand, abs=1e-4)


def test_prompts_that_were_read_are_not_read_again(llama, monkeypatch):
    monkeypatch.setattr(module, "PROMPTS_AT_ONCE", 2)
    prompts, answers = ["Why?", "A longer prompt", "So?", "Why?"], ["Because it is.", "Yes.", "No, not so.", "No."]
    read = list(read_prompts(llama, prompts))
    assert [known.prompts for known in read] == [["Why?", "A longer prompt"], ["So?"]]
    whole = judge(llama, prompts, answers)
    monkeypatch.setattr(module, "encode", None)  # reads no more
    pd.testing.assert_frame_equal(judge(llama, prompts, answers, read), whole)
    pd.testing.assert_frame_equal(judge(llama, prompts[::-1], answers[::-1], read), whole[::-1].reset_index(drop=True))
    with pytest.raises(ValueError, match="1 prompts are not among those in `read`"):
        judge(llama, ["Why?", "Who?"], answers[:2], read)


def test_empty_answers_have_no_surprise_value(llama):
    assert torch.isnan(answer_nll(llama, ["Why?"], [""])).all()


def test_answer_nll_holds_no_more_logits_than_the_budget(llama, monkeypatch):
    prompts, answers = ["Why?"] * 5, ["So", "Because", "No", "It is so", "Yes, it is so"]
    whole = answer_nll(llama, prompts, answers)
    sizes, run = [], module._nll_after
    monkeypatch.setattr(module, "_nll_after", lambda *args: sizes.append([len(t) for t in args[-1]]) or run(*args))
    monkeypatch.setattr(module, "LOGITS", 12 * llama.config.vocab_size * 14)
    torch.testing.assert_close(answer_nll(llama, prompts, answers), whole)
    assert sizes == [[2, 2], [7], [8], [13]] and all(len(row) * row[-1] <= 14 for row in sizes)


def test_answers_are_not_judged_by_a_steered_model(llama):
    vector = SteeringVector(torch.ones(llama.d_model), 1, "DIM", llama.name, llama.revision)
    with pytest.raises(ValueError, match="judge them after the `with steer"), steer(llama, vector):
        judge(llama, ["a"], ["b"])
    with pytest.raises(ValueError, match="judge them after the `with steer"), steer(llama, vector):
        list(read_prompts(llama, ["a"]))
    assert len(judge(llama, ["a"], ["b"])) == 1  # afterwards it is as it was, even after an error


def test_a_page_shows_six_words_of_an_answer_to_a_harmful_prompt_and_no_more():
    answer = " ".join(f"word{i}" for i in range(9))
    assert shown(answer, harmful=True) == "word0 word1 word2 word3 word4 word5 ..."
    assert shown(answer, harmful=False) == answer and shown("I  can't.", harmful=True) == "I can't."


def test_rate_gives_the_wilson_interval():
    share, low, high = rate([True] * 8 + [False] * 2)
    assert (share, round(low, 3), round(high, 3)) == (0.8, 0.490, 0.943)
    with pytest.raises(ValueError, match="empty after filtering"):
        rate([])


def test_paired_difference_by_hand():
    same = [True] * 10
    found = paired_difference(same, [True] * 6 + [False] * 4)  # 5/12 - 1/12 -+ 1.96 sqrt((6/12 - (4/12)^2) / 12)
    assert found == pytest.approx((0.4, -0.0195, 0.6862), abs=1e-3)
    assert paired_difference([1] * 6 + [0] * 4, same) == pytest.approx((-0.4, -0.6862, 0.0195), abs=1e-3)
    assert paired_difference(same, same) == pytest.approx((0, -0.2310, 0.2310), abs=1e-3)  # no flag differs
    both_ways = paired_difference([1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0])  # two up, one down: 3/8 - 2/8
    assert both_ways == pytest.approx((1 / 6, 0.125 - 0.5409, 0.125 + 0.5409), abs=1e-3)
    value, low, high = paired_difference([True] * 2, [False] * 2)
    assert value == high == 1 and -1 < low < 0  # never beyond 1
    for a, b in (([], []), ([True], [True, False])):
        with pytest.raises(ValueError, match="flags beside"):
            paired_difference(a, b)


def test_bootstrap_covers_a_known_mean():
    sample = np.random.default_rng(0).normal(2.0, 1.0, 400)
    value, low, high = bootstrap(np.mean, sample)
    assert value == pytest.approx(sample.mean())
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.2) and low < 2.0 < high


def test_a_vectorized_statistic_gets_the_same_draws():
    part, whole = np.random.default_rng(0).normal(2.0, 1.0, (2, 9))

    def ratio(part, whole, axis=-1):
        return part.sum(axis) / whole.sum(axis)

    found = [bootstrap(ratio, part, whole, seed=3, n=200, vectorized=vectorized) for vectorized in (False, True)]
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_the_bootstrap_leaves_out_draws_in_which_the_statistic_is_not_defined():
    values, marked = np.arange(8.0), np.arange(8) == 7
    value, low, high = bootstrap(lambda v, m: v[m > 0].mean() if m.any() else np.nan, values, marked, n=200)
    assert (value, low, high) == (7, 7, 7)


def test_intervals_over_draws_and_prompts_cover_the_mean_of_all_draws():
    """Means of 5 draws on 30 prompts, of a population of both: 0 in truth. Without draws they cover far less."""
    rng, held, alone = np.random.default_rng(0), [], []
    for _ in range(200):
        drawn = rng.normal(0, 1, (5, 1)) + rng.normal(0, 1, (1, 30)) + rng.normal(0, 1, (5, 30))
        _, low, high = bootstrap_draws(np.mean, drawn, n=200)
        held.append(low <= 0 <= high)
        _, low, high = bootstrap_draws(np.mean, drawn.mean(0)[None], n=200)
        alone.append(low <= 0 <= high)
    assert np.mean(held) > 0.86 and np.mean(alone) < 0.7  # percentiles of five draws are a little short


@pytest.mark.parametrize("draws", [1, 4])
def test_draws_are_drawn_anew_as_a_loop_would(draws):
    rng = np.random.default_rng(0)
    drawn, whole = rng.random((draws, 3, 12)) > 0.4, rng.normal(5, 1, 12)  # [draw, step, prompt]: flags; [prompt]

    def statistic(flags, values, axis):
        return (flags.mean(axis) / values.mean(axis)[..., None]).max(-1)

    found = bootstrap_draws(statistic, drawn, whole, seed=3, n=50)
    rng, looped = np.random.default_rng(3), []
    which, prompts = rng.integers(draws, size=(50, max(draws - 1, 1))), rng.integers(12, size=(50, 12))
    for some, rows in zip(which, prompts):
        looped.append(statistic(drawn[some].mean(0)[:, rows], whole[rows], axis=-1))
    value = statistic(drawn.mean(0), whole, axis=-1)
    np.testing.assert_allclose(found, [value, *np.quantile(looped, [0.025, 0.975])])
    certain = bootstrap_draws(np.mean, np.ones((11, 5)))
    assert certain == (1, 1, 1)  # to the last digit


def test_a_rate_over_draws_by_hand_and_by_coverage():
    flags = np.array([True] * 8 + [False] * 2)
    assert rate_of_draws(flags) == rate_of_draws(flags[None]) == rate(flags)
    value, low, high = rate_of_draws(np.ones((3, 50), bool))
    assert value == high == 1 and low == pytest.approx(rate([True] * 50)[1], abs=0.01)  # no more than 50 flags
    rng, held = np.random.default_rng(0), []
    for _ in range(300):
        drawn = rng.random((3, 40)) < rng.beta(2, 2, (3, 1))  # a draw's own rate is 0.5 in the mean
        _, low, high = rate_of_draws(drawn)
        held.append(low <= 0.5 <= high)
    assert np.mean(held) > 0.9


def test_a_ratio_of_means_is_no_mean_of_ratios():
    assert ratio_of_means([1.0, 1.0], [1.0, 3.0])[0] == 0.5  # the mean of ratios is 2/3
    whole = np.random.default_rng(0).normal(2, 1, 50)
    assert ratio_of_means(0.4 * whole, whole) == pytest.approx((0.4, 0.4, 0.4))  # resampled together
    value, low, high = ratio_of_means(whole + 1, np.full(50, 2.0))
    assert low < value < high


def test_the_jackknife_of_a_mean_has_its_standard_error():
    values = np.random.default_rng(0).normal(3, 2, (30, 2))
    found = jackknife(lambda rows: values[rows].mean(0), 30, draws=4000)
    reach = 1.96 * values.std(0, ddof=1) / np.sqrt(30)
    np.testing.assert_allclose(found[:, 0], values.mean(0))
    np.testing.assert_allclose(found[:, 2] - found[:, 0], reach, rtol=0.05)
    np.testing.assert_allclose(found[:, 0] - found[:, 1], reach, rtol=0.05)


def test_the_jackknife_of_an_overlap_covers_and_is_not_far_too_wide():
    """The overlap of the largest tenth of two means: not smooth, and what doubled prompts would lower."""
    rng, n = np.random.default_rng(1), 24
    truth = rng.standard_t(3, (2, 400))
    truth[1] = 0.6 * truth[0] + 0.8 * truth[1]

    def draw() -> np.ndarray:
        return truth + 4 * rng.normal(size=(n, 2, 400))

    def shared(of: np.ndarray) -> float:
        first, second = (set(np.argsort(-np.abs(row))[:40]) for row in of.mean(0))
        return len(first & second) / 40

    samples = [shared(draw()) for _ in range(300)]
    intervals = np.array([jackknife(lambda rows: [shared(of[rows])], n)[0] for of in (draw() for _ in range(60))])  # noqa: B023
    covered = (intervals[:, 1] <= np.mean(samples)) & (np.mean(samples) <= intervals[:, 2])
    assert covered.mean() >= 0.9
    assert np.mean(intervals[:, 2] - intervals[:, 0]) < 1.6 * 2 * 1.96 * np.std(samples)


def test_few_examples_give_no_interval_and_a_value_that_cannot_be_had_none_either():
    assert np.isnan(jackknife(lambda rows: [rows.mean()], 2)[0, 1:]).all()
    gone = jackknife(lambda rows: [np.nan if 3 not in rows else 1.0, rows.mean()], 6)
    assert gone[0, 0] == 1 and np.isnan(gone[0, 1:]).all() and np.isfinite(gone[1]).all()


def test_the_mean_of_few_draws_has_its_t_interval_and_covers():
    value, low, high = mean_over([1.0, 2.0, 3.0])
    assert value == 2 and high - value == pytest.approx(value - low) == pytest.approx(4.3027 / np.sqrt(3), rel=1e-4)
    draws = np.random.default_rng(0).normal(size=(2000, 4)) + 5
    intervals = np.array([mean_over(row) for row in draws])
    assert np.mean((intervals[:, 1] < 5) & (intervals[:, 2] > 5)) == pytest.approx(0.95, abs=0.015)
    with pytest.raises(ValueError, match="at least two"):
        mean_over([1.0])
