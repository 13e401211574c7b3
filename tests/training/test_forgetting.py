"""What a run forgot: the loss on a pinned text and four general questions, before and after."""

import json

import pytest
import torch

from qlora import adapters, prompts
from qlora.cli import UserError
from qlora.training import forgetting


@pytest.fixture(scope="module")
def loaded(trained):
    """(model, base) of the run, with the products that it was trained with."""
    return adapters.load_trained(adapters.read_adapter(trained), lane="fp32")


@pytest.fixture(scope="module")
def report(trained):
    return json.loads((trained / "report.json").read_text())["forgetting"]


def test_the_report_has_the_loss_of_base_and_adapter(loaded, report):
    model, base = loaded
    rows = [prompts.lm_example(base.tokenizer, text, 256)[0] for text in forgetting.neutral_paragraphs()]

    def loss():
        total, tokens = 0.0, 0
        for ids in map(torch.tensor, rows):
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
            tokens += len(ids) - 1
        return total / tokens, tokens

    after, tokens = loss()
    with model.disable_adapter():
        before, _ = loss()
    assert report["neutral_tokens"] == tokens
    assert report["neutral_loss"] == pytest.approx({"before": before, "after": after}, rel=1e-4)
    assert abs(before - after) > 3e-4 * before  # or a mix-up could not be seen


def test_answers_before_and_after_stand_side_by_side(trained, loaded, report):
    assert [each["question"] for each in report["questions"]] == list(forgetting.QUESTIONS)
    model, base = loaded
    assert [each["after"] for each in report["questions"]] == forgetting.answers(base, model)
    with model.disable_adapter():
        assert [each["before"] for each in report["questions"]] == forgetting.answers(base, model)
    kept = json.loads((trained / "before.json").read_text())["forgetting"]  # for --resume
    assert kept["answers"] == [each["before"] for each in report["questions"]]
    text = (trained / "report.md").read_text()
    assert "What was forgotten: loss on neutral text" in text and forgetting.QUESTIONS[0] in text


def test_one_line_says_what_changed():
    questions = [
        {"question": "a", "before": "x | y", "after": "z"},
        {"question": "b", "before": "", "after": ""},
    ]
    found = {"neutral_loss": {"before": 3.1, "after": 3.158}, "neutral_tokens": 700, "questions": questions}
    line = "forgotten? loss on neutral text 3.10 -> 3.16; 1 of 2 general questions answered in other words"
    assert forgetting.summary(found) == line
    assert "| a " in forgetting.markdown_parts(found)[1] and "x \\| y" in forgetting.markdown_parts(found)[1]


def test_another_text_is_refused(tmp_path, monkeypatch):
    changed = tmp_path / "neutral.txt"
    changed.write_text(forgetting.NEUTRAL_TEXT.read_text().replace("river", "stream"))
    monkeypatch.setattr(forgetting, "NEUTRAL_TEXT", changed)
    with pytest.raises(UserError, match="not the pinned text"):
        forgetting.neutral_paragraphs()
