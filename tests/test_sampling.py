"""Our next-token distribution is the one that transformers samples from; greedy and seeded continuations repeat."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from transformers import GenerationConfig

from qlora.hardware import detect
from qlora.loading import load_base
from qlora.sampling import GREEDY, by_transformers, continue_text, draw_distribution, entropy_bits, next_distribution, show_sampling

THREE = torch.tensor([0.5, 0.3, 0.2]).log()


@pytest.fixture(scope="module")
def model(tiny_folder):
    """fp32, and flat enough for samples to differ."""
    return load_base(str(tiny_folder), "fp32", detect("fp32")).model


@pytest.mark.parametrize("ties", [False, True])
def test_the_distribution_is_transformers_own_for_the_whole_grid(ties):
    torch.manual_seed(0)
    logits = 4 * torch.randn(2000)
    logits = logits.bfloat16().float() if ties else logits  # bf16 leaves many equal values
    for temperature, top_k, top_p in itertools.product((0.5, 1.0, 2.0), (0, 1, 50, 5000), (1.0, 0.9, 0.3, 1e-6)):
        ours, theirs = (f(logits, temperature, top_k, top_p) for f in (next_distribution, by_transformers))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert torch.equal(ours > 0, theirs > 0) and ours.sum().item() == pytest.approx(1)


def test_each_setting_does_what_the_arithmetic_says():
    # squares 0.25, 0.09, 0.04 over their sum 0.38
    assert next_distribution(THREE, temperature=0.5).tolist() == pytest.approx([0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38])
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


def test_greedy_is_what_generate_gives(model):
    ids = torch.tensor([5, 6, 7, 8])
    config = GenerationConfig(max_new_tokens=8, do_sample=False, repetition_penalty=1.0, eos_token_id=None, pad_token_id=0)
    expected = model.generate(input_ids=ids[None], generation_config=config)[0, 4:].tolist()
    assert continue_text(model, ids, [GREEDY], 8, seed=1) == [expected]
    assert continue_text(model, ids, [{"top_k": 1}], 8, seed=1) == [expected]


def test_a_seed_repeats_its_samples_and_another_seed_gives_others(model):
    ids, choices = torch.tensor([5, 6, 7]), [{"temperature": 1.0}, {"temperature": 1.5, "top_k": 50}]
    first = continue_text(model, ids, choices, 6, seed=1)
    torch.rand(3)  # what else the process draws must not matter
    assert continue_text(model, ids, choices, 6, seed=1) == first
    assert continue_text(model, ids, choices[::-1], 6, seed=1) == first[::-1]
    other = continue_text(model, ids, choices, 6, seed=2)
    assert other[0] != first[0] and other[1] != first[1]


def test_draws_follow_the_distribution():
    class Fixed(torch.nn.Module):
        def forward(self, input_ids, **_):
            return type("Output", (), {"logits": THREE.expand(len(input_ids), 1, 3), "past_key_values": None})

    drawn = torch.tensor(continue_text(Fixed(), torch.tensor([0]), [{"top_p": 0.7}], 2000, seed=1)[0])
    # 0.625, 0.375 and never the third; the standard error of the share is sqrt(0.625 x 0.375 / 2000) = 0.011
    assert (drawn == 0).float().mean().item() == pytest.approx(0.625, abs=0.05) and (drawn < 2).all()


def test_a_continuation_ends_before_the_end_token(model):
    ids = torch.tensor([5, 6, 7, 8])
    whole = continue_text(model, ids, [GREEDY], 8, seed=1)[0]
    end = whole[4]
    assert continue_text(model, ids, [GREEDY], 8, 1, end_id=end)[0] == whole[: whole.index(end)]


def test_the_lab_prints_grid_and_samples_and_draws_a_picture(model, tokenizer, tmp_path, capsys):
    result = show_sampling(model, tokenizer, "A good film is", seed=7, tokens=3)
    shown = capsys.readouterr().out
    rows = result["distributions"]
    assert len(rows) == 24 and max(row["off_transformers"] for row in rows) < 1e-12
    assert all(row["survivors"] == result["vocabulary"] for row in rows if row["top_k"] == 0 and row["top_p"] == 1)
    assert all(row["survivors"] <= 5 for row in rows if row["top_k"] == 5)
    plain = [row["entropy_bits"] for row in rows if row["top_k"] == 0 and row["top_p"] == 1]
    assert plain == sorted(plain)  # hotter is more uncertain
    assert "drawn again with seed 7: all 7 the same; with seed 8: 1 the same (greedy)" in shown
    assert max(map(len, shown.splitlines())) <= 130
    draw_distribution(tmp_path / "sub" / "next.png", json.loads(json.dumps(result)))
    assert (tmp_path / "sub" / "next.png").read_bytes().startswith(b"\x89PNG")
