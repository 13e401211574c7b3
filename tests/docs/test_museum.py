"""The museum of bugs: planted, caught, and found again by who reads what a run leaves behind."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, here
from transformers import LlamaForCausalLM

from museum import riddles
from museum.bug import message_of
from museum.texts import TEXTS
from qlora.training import guards

PAGE = (ROOT / "docs" / "museum.md").read_text()
# What the real guard says; the rest of its sentence are figures. The last three make a model of their own.
# Two bugs do not show on so small a model: their measurements are tested on numbers made by hand, below.
SAID = {
    "labels-masked": "guard 'labels_present': ",
    "end-masked": "guard 'end_supervised': 0 of 64 answers end with a supervised end token",
    "pad-by-id": "guard 'end_supervised': 0 of 64 answers end with a supervised end token",
    "duplicates-leaked": "held-out rows are training rows as well",
    "doubled-bos": "BOS is doubled: the file puts '<|im_start|>' before a prompt that begins with it",
    "wrong-template": "another chat template: at token 0 the file has '### Instruction:",
    "adapter-not-applied": "28 of 28 matrices are missing",
    "rslora-unscaled": "it acts like 0.25 times what was trained",
    "fp16-overflow": "guard 'finite': loss is nan at step",
    "eval-repacks": "guard 'nothing_repacked': an evaluation changed LoRA gradients",
    "merged-into-wrong-base": "whose weights or tokenizer have changed since",
}
OWN_MODEL = list(SAID)[-3:]


def museum(*flags):
    return here("museum.__main__", *flags)


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", SAID)
def test_a_bug_is_planted_and_caught(name, tiny_folder):
    done = museum(name, *([] if name in OWN_MODEL else ["--model", tiny_folder]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert SAID[name] in one_line(done.stdout)
    assert "caught" in done.stdout and "missed" not in done.stdout


class ByHand:
    """A run whose models, by who asks, are given."""

    def __init__(self, tokenizer=None, score=None, **models):
        self.tokenizer, self.job, self.models = tokenizer, SimpleNamespace(score=score), models

    def acting_as(self, who):
        return contextlib.nullcontext(self.models[who])

    def asked(self, who, rows=12):
        return [[5] * (1 + row) for row in range(rows)]

    def answers(self):
        return [[7], [8]]


class Losing(torch.nn.Module):
    """Its loss at each token (nats) is given."""

    def __init__(self, loss: float):
        super().__init__()
        self.at_each = torch.nn.Parameter(torch.tensor(loss))

    def forward(self, labels, num_items_in_batch, **_):
        return SimpleNamespace(loss=self.at_each * (labels[:, 1:] != -100).sum() / num_items_in_batch)


@pytest.mark.parametrize(
    "before, after, forgotten", [(3.94, 4.06, False), (3.0, 2.0, False), (3.0, 4.1, True)]
)
def test_a_model_that_forgot_is_told_by_its_loss(tokenizer, before, after, forgotten):
    from museum.arithmetic import little_forgotten

    said = message_of(little_forgotten, ByHand(tokenizer, base=Losing(before), trained=Losing(after)))
    expected = f"loss on neutral text {before:.2f} -> {after:.2f}: the model has unlearned its language"
    assert said == (expected if forgotten else "")


@pytest.mark.parametrize("moved, seen", [(0, False), (0.04, False), (0.06, True), (-1.47, True)])
def test_a_row_that_sees_its_neighbours_is_told_by_its_log_odds(moved, seen):
    from museum.asking import same_beside_others

    def score(model, asked, answers):
        scores = np.array([[-1.0 - len(ids), -2.0] for ids in asked])
        scores[1:2, 1] += moved  # the second row, if it is not alone
        return scores

    said = message_of(same_beside_others, ByHand(score=score, deployed=None))
    assert said.startswith(f"log-odds of a row move by up to {abs(moved):.2f} when") if seen else said == ""


def test_padding_is_attended_to_only_where_it_was_planted(tiny_folder):
    from museum.asking import padding_attended, same_beside_others
    from museum.job import Job

    model = LlamaForCausalLM.from_pretrained(tiny_folder).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(50)  # random weights hardly prefer one token
    healthy = Job()
    planted = padding_attended.plant(healthy)
    assert message_of(same_beside_others, ByHand(score=healthy.score, deployed=model)) == ""
    said = message_of(same_beside_others, ByHand(score=planted.score, deployed=model))
    assert "it sees their padding" in said


def test_the_rate_is_planted_a_hundred_times_too_high():
    from museum.arithmetic import rate_too_high
    from museum.job import Job

    assert rate_too_high.plant(Job()).rate == 100 * Job().rate


def test_without_the_kernel_its_effect_is_planted_and_said(monkeypatch):
    from museum import arithmetic

    monkeypatch.setattr(arithmetic, "has_avx512bf16", lambda: False)
    done = museum("eval-repacks")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 layers repacked" in one_line(done.stdout) and "planted by hand" in one_line(done.stdout)


def test_a_guard_that_is_off_is_seen(tiny_folder, monkeypatch):
    monkeypatch.setattr(guards, "labels_present", lambda *_: None)
    done = museum("labels-masked", "--model", tiny_folder)
    assert done.returncode == 1
    assert "missed   nothing: no guard said a word" in done.stdout


def test_a_guard_that_fires_on_a_healthy_run_is_seen(tiny_folder, monkeypatch):
    def always(*_):
        raise guards.GuardError("guard 'labels_present': as always")

    monkeypatch.setattr(guards, "labels_present", always)
    done = museum("labels-masked", "--model", tiny_folder)
    assert done.returncode == 1
    assert "the healthy run is accused, too" in one_line(done.stdout)


def test_bugs_and_their_words_belong_together():
    from museum.catalogue import BUGS

    assert list(BUGS) == list(TEXTS) and len(BUGS) == 13


def test_each_bug_is_in_the_docs():
    for name in TEXTS:
        assert f"`python -m museum {name}`" in PAGE, name


def test_each_guard_is_in_its_file():
    for name, text in TEXTS.items():
        file, what = re.match(r"(\S+\.py): (\w+)", text.guard).groups()
        source = (ROOT / file).read_text()
        assert re.search(rf"def {what}\b", source), f"{name}: {file} has no {what}"


def test_the_recorded_run_caught_all():
    recorded = json.loads((ROOT / "benchmarks/results/museum.json").read_text())["bugs"]
    assert [bug["name"] for bug in recorded if bug["caught"]] == list(TEXTS)
    assert max(bug["seconds"] for bug in recorded) < 120
    overflow = next(bug for bug in recorded if bug["name"] == "fp16-overflow")
    finite, steps = map(int, overflow["planted"]["key"].split(" of "))
    assert steps / 2 < finite < steps  # most steps are healthy, or the curve would not look so


# Riddles


def test_riddles_are_ten_bugs_one_of_them_twice_and_a_healthy_run():
    answers = [riddles.answer_of(number) for number in range(1, riddles.COUNT + 1)]
    times = sorted(map(answers.count, {*riddles.ASKED, riddles.HEALTHY}))
    assert len(answers) == 12 and times == [1] * 10 + [2] and answers.count(riddles.HEALTHY) == 1
    assert answers != sorted(answers, key=[*TEXTS, riddles.HEALTHY].index)


def test_an_answer_is_right_or_is_told_how_to_check_it():
    for number in (riddle_of("end-masked"), riddle_of(riddles.HEALTHY)):
        right = riddles.answer_of(number)
        done = museum("--riddle", number, "--answer", right)
        assert done.returncode == 0 and done.stdout.startswith("right: ")
        for wrong in {*TEXTS, riddles.HEALTHY} - {right}:
            done = museum("--riddle", number, "--answer", wrong)
            assert done.returncode == 1 and wrong in done.stdout
            assert right == riddles.HEALTHY or not ({right} & names_in(done.stdout))
            assert right == riddles.HEALTHY or TEXTS[right].hint not in done.stdout
            assert wrong not in riddles.ASKED or TEXTS[wrong].hint in done.stdout


def riddle_of(bug: str) -> int:
    return next(number for number in range(1, riddles.COUNT + 1) if riddles.answer_of(number) == bug)


def read(folder: Path, name: str):
    return json.loads((folder / f"{name}.json").read_text())


def find(folder: Path) -> str:
    """The table "Which measurement tells which bug" of docs/museum.md, line by line."""
    rows, held_out = read(folder, "training-rows"), read(folder, "held-out-rows")
    batch, settings = read(folder, "first-batch"), read(folder, "settings")
    end = read(folder / "adapter", "tokenizer_config")["eos_token"]
    end = next(t["id"] for t in read(folder / "adapter", "tokenizer")["added_tokens"] if t["content"] == end)
    labels = [[label for label in row["labels"] if label != -100] for row in rows]
    log_p = {
        who: np.array([list(row["log_p"][who].values()) for row in held_out]) for who in held_out[0]["log_p"]
    }
    odds = {who: np.diff(values, axis=1) for who, values in log_p.items()}
    off = lambda one, other: np.abs(odds[one] - odds[other]).max()
    if not all(labels):
        return "labels-masked"
    if any(kept[-1] != end for kept in labels):
        return "end-masked"
    in_batch = sum(label != -100 for row in batch["labels"] for label in row)
    if in_batch != sum(map(len, labels[: len(batch["labels"])])):
        return "pad-by-id"
    if {row["text"] for row in rows} & {row["text"] for row in held_out}:
        return "duplicates-leaked"
    if settings["learning_rate"] > 0.01:
        return "rate-too-high"
    asked, read_in_training = held_out[0]["asked_by_deployed"], rows[0]["input_ids"]
    if asked[0] == asked[1]:
        return "doubled-bos"
    if asked[:4] != read_in_training[:4]:
        return "wrong-template"
    if off("deployed", "deployed_alone") > 1e-3:
        return "padding-attended"
    if off("deployed_alone", "base") < 1e-4:
        return "adapter-not-applied"
    return "rslora-unscaled" if off("deployed_alone", "trained") > 1e-3 else "healthy"


def rows_without_a_label(folder: Path) -> int:
    return sum(set(row["labels"]) == {-100} for row in read(folder, "training-rows"))


def pose(number: int, model: Path, out: Path):
    return museum("--riddle", number, "--model", model, "--output-dir", out)


def names_in(text: str) -> set[str]:
    return {name for name in TEXTS if name in text}


@pytest.mark.parametrize("number", range(1, riddles.COUNT + 1))
def test_a_riddle_leaves_what_is_needed_and_does_not_tell(number, tiny_folder, tmp_path):
    done = pose(number, tiny_folder, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / f"riddle-{number}"
    files = [path for path in folder.rglob("*") if path.suffix in (".json", ".csv", ".md")]
    told = "".join(path.read_text() + str(path.relative_to(folder)) for path in files)
    assert not names_in(told + done.stdout + done.stderr)
    with open(folder / "log.csv", newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, 33))
    assert find(folder) == riddles.answer_of(number)
    assert (
        find(folder) != "labels-masked" or rows_without_a_label(folder) >= 8
    )  # a quarter: not to be overlooked
    again = pose(number, tiny_folder, tmp_path)
    assert again.returncode == 2 and "is there already" in again.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        (["endmasked"], "no bug is named endmasked; did you mean end-masked?"),
        (["zzz"], "no bug is named zzz; there are labels-masked,"),
        (["--riddle", "13"], "--riddle 13: there are 12, from 1 to 12"),
        (["--riddle", "x"], "--riddle x: must be a whole number"),
        (["--riddle", "1", "--answer", "wrong-templat"], "did you mean wrong-template?"),
        (["--riddle", "1", "--answer", "health"], "did you mean healthy?"),
        (["healthy"], "no bug is named healthy; "),
        (["--answer", "end-masked"], "--answer needs --riddle K"),
        (["end-masked", "--all"], "one thing at a time"),
        (["--json", "x.json"], "--json needs a bug or --all"),
    ],
)
def test_mistakes_get_one_line(flags, words):
    done = museum(*flags)
    assert done.returncode == 2 and words in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout


@pytest.mark.parametrize(
    "content, words",
    [
        ("not JSON", "is damaged"),
        ('{"rows": [{"name": "a"}]}', "holds no records of the museum"),
        ('{"bugs": [{"title": "a"}]}', "holds no records of the museum"),
        ('["bugs"]', "is damaged"),
        (None, "there is no folder"),
    ],
)
def test_a_file_that_can_not_be_kept_is_told_before_training(content, words, tmp_path, monkeypatch):
    monkeypatch.setattr("museum.exhibit.visit", lambda *_: pytest.fail("it trains"))
    path = tmp_path / "kept.json" if content else tmp_path / "missing" / "kept.json"
    if content:
        path.write_text(content)
    done = museum("end-masked", "--json", path)
    assert done.returncode in (1, 2) and words in done.stderr and str(path) in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout
    assert (path.read_text() == content) if content else not path.parent.exists()


def test_a_record_takes_the_place_of_its_earlier_one(tmp_path, tiny_folder):
    path, other = tmp_path / "kept.json", {"name": "padding-attended", "seconds": 1}
    path.write_text(json.dumps({"bugs": [other, {"name": "end-masked", "seconds": 1}]}))
    assert museum("end-masked", "--model", tiny_folder, "--json", path).returncode == 0
    kept = json.loads(path.read_text())["bugs"]
    assert [each["name"] for each in kept] == ["end-masked", "padding-attended"]
    assert kept[0]["caught"] and kept[1] == other


def test_the_list_names_all():
    done = museum()
    assert done.returncode == 0 and names_in(done.stdout) == set(TEXTS)
