"""Our next-token distribution is the one that transformers samples from; seeds repeat their samples."""

import itertools
import json
from collections import Counter

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from qlora.generation import Sampling, generate
from qlora.hardware import detect
from qlora.lab.sampling import draw_distribution, entropy_bits, next_distribution, sample, show_sampling
from qlora.loading import load_base

THREE = torch.tensor([0.5, 0.3, 0.2]).log()


@pytest.fixture(scope="module")
def base(tiny_folder):
    """fp32, and flat enough for samples to differ."""
    return load_base(str(tiny_folder), "fp32", detect("fp32"))


def by_transformers(logits, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The distribution by the warpers that `generate` uses."""
    warpers = [TemperatureLogitsWarper(float(temperature))]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    scores = logits.double()[None]
    for warper in warpers:
        scores = warper(None, scores)
    return scores[0].softmax(-1)


@pytest.mark.parametrize("ties", [False, True])
def test_the_distribution_is_transformers_own_for_the_whole_grid(ties):
    torch.manual_seed(0)
    logits = 4 * torch.randn(2000)
    logits = logits.bfloat16().float() if ties else logits  # bf16 leaves many equal values
    for temperature, top_k, top_p in itertools.product(
        (0.5, 1.0, 2.0), (0, 1, 50, 5000), (1.0, 0.9, 0.3, 1e-6)
    ):
        ours, theirs = (f(logits, temperature, top_k, top_p) for f in (next_distribution, by_transformers))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert torch.equal(ours > 0, theirs > 0) and ours.sum().item() == pytest.approx(1)


def test_each_setting_does_what_the_arithmetic_says():
    # squares 0.25, 0.09, 0.04 over their sum 0.38
    assert next_distribution(THREE, temperature=0.5).tolist() == pytest.approx(
        [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38]
    )
    # 0.5 alone is under 0.7, 0.5 + 0.3 reaches it: 0.5/0.8 and 0.3/0.8
    assert next_distribution(THREE, top_p=0.7).tolist() == pytest.approx([0.625, 0.375, 0])
    assert next_distribution(THREE, top_k=2).tolist() == pytest.approx([0.625, 0.375, 0])
    # top-k first: of 0.625 and 0.375 the larger alone reaches 0.6
    assert next_distribution(THREE, top_k=2, top_p=0.6).tolist() == pytest.approx([1, 0, 0])


def test_top_k_keeps_all_logits_equal_to_the_last_one_kept():
    assert next_distribution(torch.tensor([2.0, 1.0, 1.0, 0.0]), top_k=2).count_nonzero() == 3


def test_entropy_is_in_bits_and_a_dropped_token_adds_none():
    # 0.5 x 1 + 2 x 0.25 x 2
    assert entropy_bits(torch.tensor([0.5, 0.25, 0.25, 0.0])) == pytest.approx(1.5)


def test_generate_draws_from_this_distribution(base):
    ids, setting = [5, 6, 7], {"temperature": 0.02, "top_k": 4, "top_p": 0.95}
    with torch.inference_mode():
        p = next_distribution(base.model(input_ids=torch.tensor([ids])).logits[0, -1], **setting)
    drawn = Counter(row[0] for row in generate(base.model, [ids] * 400, 1, Sampling(**setting)))
    # the standard error of a share is at most sqrt(0.5 x 0.5 / 400) = 0.025
    shares = [drawn[token] / 400 for token in p.nonzero().flatten().tolist()]
    assert 1 < len(shares) <= 4 and sum(shares) == pytest.approx(1)
    assert shares == pytest.approx(p[p > 0].tolist(), abs=0.1)


def test_a_continuation_ends_with_the_end_token(base):
    whole = generate(base.model, [[5, 6, 7, 8]], 8)[0]
    end = whole[4]
    assert generate(base.model, [[5, 6, 7, 8]], 8, eos_token_id=end)[0] == whole[: whole.index(end) + 1]


def test_a_seed_repeats_its_sample_and_another_seed_gives_another(base):
    def drawn(setting: dict, seed: int) -> dict:
        return sample(base, [5, 6, 7], setting, seed, tokens=6)

    first = drawn({"temperature": 1.5, "top_k": 50}, 1)
    assert first["repeats"] and not first["same_with_other_seed"]
    assert drawn({"temperature": 1.5, "top_k": 50}, 1) == first
    greedy = drawn({}, 2**32 - 1)  # the largest seed has a neighbour, too
    assert greedy["repeats"] and greedy["same_with_other_seed"]


def test_the_lab_prints_settings_and_samples_and_draws_a_picture(base, tmp_path, capsys):
    result = show_sampling(base, "A good film is", seed=7, tokens=5)
    shown = capsys.readouterr().out
    rows = result["distributions"]
    assert len(rows) == 10
    plain = [row for row in rows if row["top_k"] == 0 and row["top_p"] == 1]
    assert all(row["survivors"] == result["vocabulary"] for row in plain)
    assert all(row["survivors"] <= 5 for row in rows if row["top_k"] == 5)
    entropies = [row["entropy_bits"] for row in plain]
    assert len(plain) == 4 and entropies == sorted(entropies)  # hotter is more uncertain
    assert "4 tokens drawn again with seed 7: all 6 the same; with seed 8: 1 the same (greedy)" in shown
    assert max(map(len, shown.splitlines())) <= 130
    draw_distribution(tmp_path / "sub" / "next.png", json.loads(json.dumps(result)))
    assert (tmp_path / "sub" / "next.png").read_bytes().startswith(b"\x89PNG")
