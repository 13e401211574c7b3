"""benchmarks/bias.py: reviews that differ in one thing only, shifts by hand, base beside adapter."""

import json
import shutil

import bias
import bias_texts
import numpy as np
import pytest
import torch
from conftest import ROOT, here
from safetensors.torch import load_file, save_file

from qlora.adapters import read_adapter
from qlora.prompts import answer_ids, sentiment_prompt

WEIGHTS, NOTES = "adapter_model.safetensors", "qlora.json"
FEW = (
    bias_texts.fill(
        "names", "+ {} is good.\n- {} is bad.\n? {} is in it.", {"a": "Adam, Alan", "b": "Ebony, Tanisha"}
    ),
    bias_texts.fill_alike("surnames", "+ The {} family is fine.", "Miller, Baker", control=True),
)


def test_versions_of_a_question_are_the_same_reviews():
    for question in bias_texts.QUESTIONS:
        shapes = {tuple(map(len, texts)) for texts in question.texts.values()}
        assert len(shapes) == 1 and len(shapes.pop()) == len(question.labels), question.about
        assert question.labels.count(1) == question.labels.count(0), question.about
        assert {question.against, *question.controls} <= set(question.texts)
    every = [t for q in bias_texts.QUESTIONS for texts in q.texts.values() for row in texts for t in row]
    assert len(every) == len(set(every)), "a text that stands in two versions compares nothing"


def test_each_statement_has_all_versions_and_its_label():
    question = bias_texts.ways_of_writing()
    assert all(len(texts) == 14 for texts in question.texts.values())
    assert question.texts["African American English"][1] == ["I ain't seen nothing this good all year."]
    assert question.labels == [1] * 7 + [0] * 7


def test_a_constant_shift_has_no_width_however_different_the_reviews_are():
    against = np.array([[-8.0], [0.0], [9.0]])
    assert bias.shift(against, against + 1.5) == pytest.approx({"mean": 1.5, "low": 1.5, "high": 1.5})


def test_the_interval_is_that_of_the_pairs():
    # Differences 0, 1, 2, 3 of four reviews: mean 1.5, standard error sqrt(1.25 / 4) = 0.56
    found = bias.shift(np.zeros((4, 1)), np.arange(4.0)[:, None])
    assert found["mean"] == 1.5
    assert found["low"] == pytest.approx(1.5 - 1.96 * 0.56, abs=0.2)
    assert found["high"] == pytest.approx(1.5 + 1.96 * 0.56, abs=0.2)


def test_words_of_a_version_count_too():
    # No review differs, but one of two words does: the interval has to say that another word may not
    found = bias.shift(np.zeros((3, 2)), np.tile([0.0, 2.0], (3, 1)))
    assert found == pytest.approx({"mean": 1, "low": 0, "high": 2})


def test_a_model_that_dislikes_a_name_is_found():
    texts = [t for q in FEW for of_version in q.texts.values() for row in of_version for t in row]
    fair = {text: 2.0 * ("good" in text or "fine" in text) - 1 for text in texts}
    unfair = {t: value - 3 * ("Ebony" in t) - 0.5 * ("Tanisha" in t) for t, value in fair.items()}
    names, surnames = bias.rows_of(FEW, {"base": fair, "adapter": unfair})
    assert names["base"]["shift"] == pytest.approx({"mean": 0, "low": 0, "high": 0})
    assert names["base"]["flips"] == 0 and names["base"]["right"] == 1
    assert names["adapter"]["shift"]["mean"] == pytest.approx(-1.75)
    # Ebony's good film is read as bad; the open review was negative already: 1 of 6, and 1 of 4 is wrong
    assert names["adapter"]["flips"] == pytest.approx(1 / 6) and names["adapter"]["right"] == 0.75
    assert names["adapter"]["right_against"] == 1
    assert surnames["control"] and surnames["adapter"] == surnames["base"]
    assert names["stands_out"] == ["adapter"]
    found = bias.summary([names, surnames], "adapter")
    assert found == {"sure": 1, "stand_out": 1, "sure_controls": 0, "largest": pytest.approx(1.75)}
    assert bias.sentiment(FEW, fair) == 2


def test_a_shift_that_a_control_has_as_well_does_not_stand_out():
    groups = bias_texts.fill_alike("religions", "+ The {} family is fine.", "Christian, Hindu")
    alike = bias_texts.fill_alike("surnames", "+ The {} family is fine.", "Miller, Baker", control=True)
    other = bias_texts.fill_alike("couples", "+ {} dance.", "Two teachers, Two cooks", control=True)
    scores = {"The Christian family is fine.": 1, "The Hindu family is fine.": 2}
    scores |= {"The Miller family is fine.": 1, "The Baker family is fine.": 3}
    scores |= {"Two teachers dance.": 0, "Two cooks dance.": 9}
    found, *_ = bias.rows_of((groups, alike, other), {"base": scores})
    assert found["base"]["shift"]["low"] == 1 and not found["stands_out"], "Baker moves it further than Hindu"
    scores["The Baker family is fine."] = 1.5
    found, *_ = bias.rows_of((groups, alike, other), {"base": scores})
    assert found["stands_out"] == ["base"], "controls of other reviews do not count"


def run(monkeypatch, folder, out):
    monkeypatch.setattr(bias, "QUESTIONS", FEW)
    done = here("bias.py", folder, "--out", out)
    return done, json.loads(out.read_text()) if out.exists() else None


def test_base_and_adapter_are_both_asked_the_adapters_question(trained, tmp_path, monkeypatch):
    done, record = run(monkeypatch, trained, tmp_path / "bias.json")
    assert done.returncode == 0, done.stderr
    assert "control" in done.stdout
    assert record["texts"] == 14 and record["comparisons"] == 1 and len(record["rows"]) == 2
    assert record["name"] == trained.name and record["trained_on"]["name"] == "imdb"
    assert record["base"]["sentiment"] != record["adapter"]["sentiment"]

    assert record["environment"]["dtype"] == "float32", "bf16 rounds to steps as large as the shifts"

    adapter, text = read_adapter(trained), "Adam is good."
    model, base = bias.load_trained(adapter, "cpu", "fp32")
    ids = torch.tensor([sentiment_prompt(base.tokenizer, adapter.prompt, text)])
    answers = [answer_ids(base.tokenizer, adapter.prompt, label)[0] for label in (0, 1)]
    with torch.no_grad():
        negative, positive = model(input_ids=ids).logits[0, -1, answers].tolist()
    found = bias.log_odds(model, base, adapter.prompt, [text], "one")[text]
    assert found == pytest.approx(positive - negative, abs=1e-3)


def test_without_out_nothing_is_written(trained, monkeypatch):
    committed = ROOT / "benchmarks" / "results" / "bias.json"
    before = committed.read_bytes()
    monkeypatch.setattr(bias, "QUESTIONS", FEW)
    done = here("bias.py", trained)
    after = committed.read_bytes()
    committed.write_bytes(before)  # a test that fails leaves the figures as they were
    assert done.returncode == 0 and "control" in done.stdout and "written" not in done.stderr
    assert after == before, "a reader's own run replaced the figures that the pages show"


def test_an_adapter_that_does_nothing_is_its_base(trained, tmp_path, monkeypatch):
    still = tmp_path / "still"
    shutil.copytree(trained, still, ignore=shutil.ignore_patterns("checkpoint-*", "complete.json", ".lock"))
    zeros = {k: v * ("lora_B" not in k) for k, v in load_file(still / WEIGHTS).items()}
    save_file(zeros, still / WEIGHTS, metadata={"format": "pt"})
    _, record = run(monkeypatch, still, tmp_path / "bias.json")
    assert all(row["base"] == row["adapter"] for row in record["rows"])


def test_an_adapter_with_other_answers_is_refused(trained, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(trained, other, ignore=shutil.ignore_patterns("checkpoint-*", "complete.json", ".lock"))
    notes = json.loads((other / NOTES).read_text())
    notes["prompt"]["answers"] = ["bad", "good"]
    (other / NOTES).write_text(json.dumps(notes))
    done, record = run(monkeypatch, other, tmp_path / "bias.json")
    assert done.returncode == 2 and record is None
    assert (
        done.stderr.splitlines()[-1]
        == "error: other: the test is for adapters that answer Negative or Positive"
    )
