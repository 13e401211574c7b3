"""--evaluate --shots: the base with examples in its prompt beside the adapter, on the same rows."""

import json
import types

import pytest
from conftest import here

from qlora import data, shots
from qlora.data import Row, RowSet
from qlora.prompts import choose_format, sentiment_prompt

SCRIPT = "qlora_inference.py"


def test_the_table_has_the_training_runs_scores_and_what_does_not_fit(trained):
    done = here(SCRIPT, "--adapter", trained, "--lane", "fp32", "--evaluate", "--shots", 0, 2, 16)
    assert done.returncode == 0, done.stderr
    report = json.loads((trained / "report.json").read_text())["evaluation"]
    header, none, two, many, tuned = done.stdout.splitlines()
    assert header.split() == ["accuracy", "95%", "interval", "tokens", "a", "prompt", "s", "a", "row"]
    assert none.split()[3] == f"{100 * report['base_zero_shot']['accuracy']:.1f}%"
    assert (
        tuned.split()[3] == f"{100 * report['tuned']['accuracy']:.1f}%"
        and tuned.split()[0] == f"{trained.name},"
    )
    tokens, seconds = map(float, two.split()[-2:])
    assert float(none.split()[-2]) < tokens <= 512 and seconds > 0
    # the tiny model reads 512 tokens: 16 examples of 16 tokens and their questions take more
    assert "does not fit" in many and many.split()[-3:] == ["of", "512", "-"]
    assert "and the model reads 512" in done.stderr


@pytest.mark.parametrize(
    "flags, said", [(("--shots", 4), "with --evaluate"), (("--evaluate", "--shots", -1), "from 0")]
)
def test_flags_that_do_not_go_together(flags, said):
    done = here(SCRIPT, *flags)
    assert done.returncode == 2 and said in done.stderr


def test_held_out_rows_are_never_shown(reviews):
    found = RowSet([Row(f"text {i}", i % 2) for i in range(40)], [], "labels", ("a", "b"), "here")
    notes = {"name": "x", "seed": 3, "eval_samples": 20}
    held_out = data.split(found, 1, 20, 3)[1]
    scored = data.split(found, 1, 4, 3)[1]  # --eval-samples 4
    pool = shots.rows_to_show("x", notes, found, scored, (0, 100))
    assert len(pool) == 20 and not {row.text for row in pool} & {row.text for row in held_out}
    # of another dataset only what is scored is held out
    assert len(shots.rows_to_show("y", notes, found, scored, (100,))) == 36


def test_examples_are_balanced_repeatable_and_shortened_to_fit(tokenizer, reviews):
    prompt = choose_format("sentiment", "labels", ("Negative", "Positive"), 64)
    base = types.SimpleNamespace(tokenizer=tokenizer, context_length=1 << 20)
    chosen, tokens = shots.fitting(base, prompt, reviews, 8)
    assert tokens == 64 and sorted(label for _, label in chosen) == [0] * 4 + [1] * 4
    assert chosen == shots.fitting(base, prompt, reviews, 8)[0]
    fewer = {text for text, _ in shots.fitting(base, prompt, reviews, 4)[0]}
    assert fewer < {text for text, _ in chosen}
    base.context_length = shots.length(base, prompt, chosen) - 1
    shorter, tokens = shots.fitting(base, prompt, reviews, 8)
    assert tokens == 48 and shots.length(base, prompt, shorter) <= base.context_length
    asked = max(len(sentiment_prompt(tokenizer, prompt, row.text, shorter)) for row in reviews)
    assert asked <= base.context_length
