"""Preferences (DPO) from pairs, and runs that go on from a trained adapter."""

import dataclasses
import json
import math
import shutil
from contextlib import nullcontext

import pytest
import torch
from conftest import here
from peft import LoraConfig, get_peft_model

from config import TrainSettings
from qlora import batches as b
from qlora import data as d
from qlora.adapters import read_adapter
from qlora.fast import make_fast
from qlora.hardware import detect
from qlora.loading import load_base
from qlora.prompts import PromptFormat
from qlora.training import guards as g
from qlora.training import initial
from qlora.training import preferences as p

WEIGHTS = "adapter_model.safetensors"
ASKED = {"role": "user", "content": "How was it?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Fine, thanks.", "Awful."))
RUN = ("--objective", "preference", "--samples", 12, "--eval-samples", 6, "--max-length", 96)
RUN += ("--batch-size", 2, "--save-steps", 2, "--lane", "fp32", "--learning-rate", 0.002)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """24 pairs of 12 prompts, whose chosen replies praise."""
    rows = [
        {
            "prompt": f"What of film {i % 12}?",
            "chosen": f"I loved all {i} scenes",
            "rejected": f"I hated it {i}",
        }
        for i in range(24)
    ]
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def model(tiny_folder):
    """A tiny fp32 model with LoRA whose B is not zero, on a CPU's own decoder, with DPO's loss (beta 0.5)."""
    base = load_base(str(tiny_folder), "fp32", detect("fp32", lane="fp32"))
    torch.manual_seed(0)
    model = get_peft_model(base.model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    assert "own decoder" in make_fast(model, "fp32")
    p.use_dpo(model, 0.5)
    return model


@pytest.fixture
def halves(model, tokenizer) -> list[dict]:
    """Two encoded pairs; by their references the model prefers 2 nats too much, and 1.5 too little."""
    rows = [
        d.Row(
            "", messages=({"role": "user", "content": text}, GOOD), rejected=(ASKED | {"content": text}, BAD)
        )
        for text in ("How was the film?", "And the book, which you finished on Monday?")
    ]
    halves = b.encode_pairs(tokenizer, PromptFormat("chat", 96), rows, "training")
    log_p = p.log_p_of_labels(model, halves, nullcontext)
    for half, value, off in zip(halves, log_p, (-1.0, 1.0, 0.5, -1.0)):
        half["reference"] = value + off
    return halves


def test_loss_and_scores_of_given_log_probabilities():
    # First pair: (-2 + 3) - (-5 + 4) = 2, second: (-1 + 1) - (-1 + 2) = -1; beta 0.5.
    # -log sigmoid(1.0) = 0.313262, -log sigmoid(-0.5) = 0.974077, mean 0.643669
    found = p.compare([-3.0, -4.0, -1.0, -2.0], [-2.0, -5.0, -1.0, -1.0], beta=0.5)
    assert found["loss"] == pytest.approx(0.643669, abs=1e-5)
    assert found["before"]["correct"] == 2 and found["after"]["correct"] == 1  # a tie is not won
    assert found["reward"]["correct"] == 1 and found["reward"]["mean_margin"] == pytest.approx(0.25)
    # Wilson's interval of 1 in 2, by hand: (0.5 + z²/4 ± z sqrt(0.125 + z²/16)) / (1 + z²/2), z = 1.96
    assert (found["after"]["low"], found["after"]["high"]) == pytest.approx((0.0945, 0.9055), abs=1e-4)


def test_gradient_is_that_of_full_logits(model, halves):
    batch = b.collate(b.in_pairs(halves), 0, 16)
    del batch["real_tokens"]
    model.train()

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([w.grad.flatten() for w in model.parameters() if w.requires_grad])

    mine = model(**batch).loss
    # The paper's formula (7) written down with every logit of the libraries' own forward.
    logs = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    targets = batch["labels"][:, 1:]
    per_token = logs.gather(2, targets.clamp_min(0)[..., None])[..., 0] * (targets != -100)
    c, r, ref_c, ref_r = *per_token.sum(1).view(2, 2).T, *batch["reference"].view(2, 2).T
    plain = -torch.log(torch.sigmoid(0.5 * (c - ref_c) - 0.5 * (r - ref_r))).mean()
    assert mine.item() == pytest.approx(plain.item(), rel=1e-4) and abs(mine.item() - math.log(2)) > 0.01
    one, other = gradients(mine), gradients(plain)
    assert (one - other).norm() < 1e-3 * other.norm()


def test_pairs_that_fill_up_a_batch_count_for_nothing(model, halves):
    def loss(pairs, **count):
        batch = b.collate(pairs, 0, 16)
        return batch.pop("real_tokens"), model(**batch, **count).loss

    first, second = b.in_pairs(halves)
    tokens, alone = loss([first])
    filled = loss([first, b.BLANK_PAIR])
    assert filled[0] == tokens and filled[1].item() == pytest.approx(alone.item(), rel=1e-5)
    blank = loss([b.BLANK_PAIR], num_items_in_batch=3)[1]  # a process that got nothing else
    blank.backward()
    assert blank.item() == 0.0
    # Two batches of an update give what one gives: sums over its two pairs, divided by two.
    parts = sum(loss([pair], num_items_in_batch=2)[1].item() for pair in (first, second))
    assert parts == pytest.approx(loss([first, second])[1].item(), rel=1e-5)


def test_a_reference_of_another_model_is_seen(model, halves):
    log_p = p.log_p_of_labels(model, halves, nullcontext)
    for half, value in zip(halves, log_p):
        half["reference"] = value
    p.starts_at_log_2(guards := g.Guards(), model, halves, nullcontext)
    assert "is 0.69315 (log 2 is 0.69315)" in guards.results[0]["detail"]
    with model.disable_adapter():  # the base's, though training goes on from an adapter
        others = p.log_p_of_labels(model, halves, nullcontext)
    for half, value in zip(halves, others):
        half["reference"] = value
    with pytest.raises(g.GuardError, match="guard 'starts_at_log_2'"):
        p.starts_at_log_2(g.Guards(), model, halves, nullcontext)


def test_pairs_without_a_difference_are_seen(halves):
    p.pairs_differ(guards := g.Guards(), halves)
    assert guards.results[0]["detail"].startswith(
        "2 of 2 pairs have one prompt, 2 replies that differ, 2 from"
    )
    for broken in (halves[:1] * 2, [halves[0], halves[3]]):  # equal replies, two prompts
        with pytest.raises(g.GuardError, match="guard 'pairs_differ'"):
            p.pairs_differ(g.Guards(), broken)


HH = "\n\nHuman: How was it?\n\nAssistant: "


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "How was it?", "chosen": "Fine, thanks.", "rejected": "Awful."},
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},  # TRL
        {"prompt": "How was it?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},  # UltraFeedback
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "messages": [ASKED, GOOD]},
        {"chosen": json.dumps([ASKED, GOOD]), "rejected": json.dumps([ASKED, BAD])},
        {"chosen": HH + "Fine, thanks.", "rejected": HH + "Awful."},  # Anthropic's HH-RLHF
        {"prompt": HH, "chosen": " Fine, thanks.", "rejected": " Awful."},
    ],
)
def test_forms_of_pairs(tmp_path, row):
    found = d.load_rows(str(write(tmp_path / "one.jsonl", [row])))
    spaces = lambda talk: [{**m, "content": m["content"].strip()} for m in talk]
    assert found.kind == "pairs"
    assert spaces(found.rows[0].messages) == [ASKED, GOOD] and spaces(found.rows[0].rejected) == [ASKED, BAD]


def test_broken_pairs_are_left_out_and_counted(tmp_path, capsys):
    good = {"prompt": "How was it?", "chosen": "Fine.", "rejected": "Awful."}
    rows = [
        good,
        good | {"rejected": None},
        good | {"chosen": ""},
        good | {"prompt": None},
        good | {"rejected": " Fine. "},
        {"prompt": None, "chosen": [ASKED, GOOD], "rejected": [ASKED | {"content": "Why?"}, BAD]},
        good | {"chosen": [ASKED, GOOD, ASKED], "rejected": [ASKED, GOOD, ASKED | {"content": "x"}]},
        good | {"chosen": 3.5, "rejected": {"a": 1}},
    ]
    found = d.load_rows(str(write(tmp_path / "broken.jsonl", rows)))
    assert len(found.rows) == 1
    said = capsys.readouterr().err
    assert "left out 7 of 8 rows" in said and "no rejected (1, the first in row 2)" in said, said
    assert (
        "no chosen (1" in said and "no prompt (1" in said and "that are equal (1, the first in row 5)" in said
    )
    only = write(tmp_path / "prompts.jsonl", [rows[5]])
    with pytest.raises(d.UsageError, match="chosen and rejected with different prompts"):
        d.load_rows(str(only))


def test_pairs_that_do_not_fit_are_skipped_with_their_counts(tokenizer, capsys):
    def row(text, chosen, rejected):
        asked = {"role": "user", "content": text}
        return d.Row("", messages=(asked, chosen), rejected=(asked, rejected))

    rows = [row("Hi", GOOD, BAD), row("Hi " * 80, GOOD, BAD), row("Hi", GOOD, GOOD)]
    made = b.encode_rows(tokenizer, PromptFormat("chat", 64), rows, "training")
    assert [tokenizer.decode(half["input_ids"][half["asked"] :]) for half in made] == [
        "Fine, thanks.<|im_end|>",
        "Awful.<|im_end|>",
    ]
    assert all(set(half["labels"][: half["asked"]]) == {-100} for half in made)
    said = capsys.readouterr().err
    assert "skipped 1 of 3 training pairs longer than --max-length 64" in said, said
    assert "skipped 1 of 3 training pairs whose replies are the same tokens" in said, said


def test_a_prompt_stays_on_one_side_of_the_split(pairs_file):
    found = d.load_rows(str(pairs_file))
    for seed in range(5):
        train, held_out = d.split(found, 12, 7, seed)
        assert not {row.asked for row in train} & {row.asked for row in held_out}
        assert d.split(found, 2, 7, seed)[1] == held_out and len(held_out) == 7


@pytest.fixture(scope="module")
def preferred(tmp_path_factory, tiny_folder, pairs_file):
    out = tmp_path_factory.mktemp("preferred") / "run"
    done = here(
        "qlora_finetune.py", "--model", tiny_folder, "--dataset", pairs_file, "--output-dir", out, *RUN
    )
    assert done.returncode == 0, done.stderr
    return out, done


def report(out) -> dict:
    return json.loads((out / "report.json").read_text())


def test_a_run_on_pairs(preferred):
    out, done = preferred
    record = report(out)
    found, detail = record["evaluation"], {each["name"]: each["detail"] for each in record["guards"]}
    assert found["rows"] == 6 and found["prompts"] == 3 and record["data"]["train_rows"] == 12
    assert "step 0 is 0.69315" in detail["starts_at_log_2"] and "12 of 12 pairs" in detail["pairs_differ"]
    assert record["train"]["steps"] == 6 and record["train"]["loss_last"] < math.log(2)
    assert found["pairs"]["reward"]["mean_margin"] > 0 and found["pairs"]["reward"]["correct"] > 3
    assert (
        "after: log P(chosen) > log P(rejected)" in done.stdout
        and "6 held-out pairs (3 prompts" in done.stdout
    )
    card = (out / "README.md").read_text()
    assert "before: log P(chosen) > log P(rejected)" in card and "training pairs, tokens" in card
    scored = here("qlora_inference.py", "--adapter", out, "--evaluate")
    correct = found["pairs"]["after"]["correct"]
    assert f"log P(chosen) > log P(rejected) in {correct} of 6 pairs" in scored.stdout, scored.stderr


def test_a_run_on_pairs_resumes_to_the_same_bytes(preferred, tmp_path):
    out = shutil.copytree(preferred[0], tmp_path / "run")
    for lost in ("report.json", WEIGHTS):
        (out / lost).unlink()
    shutil.rmtree(out / "checkpoint-6")
    done = here("qlora_finetune.py", "--output-dir", out, "--resume")
    assert done.returncode == 0 and "resuming from" in done.stderr, done.stderr
    assert (out / WEIGHTS).read_bytes() == (preferred[0] / WEIGHTS).read_bytes()
    assert report(out)["evaluation"] == report(preferred[0])["evaluation"]


def test_preferences_go_on_from_an_adapter_of_another_task(trained, pairs_file, tmp_path, monkeypatch):
    flags = ("--init-adapter", trained, "--dataset", pairs_file, "--output-dir", tmp_path / "run", *RUN)
    monkeypatch.setattr(initial, "set_peft_model_state_dict", lambda *_, **__: None)  # forgets to
    done = here("qlora_finetune.py", *flags)
    assert done.returncode == 1 and "guard 'starts_as_initial'" in done.stderr, done.stderr
    monkeypatch.undo()
    done = here("qlora_finetune.py", *flags, "--overwrite")
    assert done.returncode == 0 and f"goes on from {trained}" in done.stderr, done.stderr
    record = report(tmp_path / "run")
    detail = {each["name"]: each["detail"] for each in record["guards"]}
    assert "starts_as_base" not in detail and "adapter's by 0 (allowed" in detail["starts_as_initial"]
    assert "step 0 is 0.69315" in detail["starts_at_log_2"]
    assert record["base"] == report(trained)["base"]  # without --model and --precision


def test_the_same_task_goes_on_from_an_adapter(trained, tmp_path):
    flags = ("--dataset", "imdb", "--samples", 8, "--eval-samples", 8, "--max-length", 64, "--max-steps", 2)
    out = ("--output-dir", tmp_path / "run", "--lane", "fp32")
    done = here("qlora_finetune.py", "--init-adapter", trained, *flags, *out)
    assert done.returncode == 0 and "initial adapter" in done.stdout, done.stderr
    before, now = report(trained)["evaluation"], report(tmp_path / "run")["evaluation"]
    assert now["initial"] == {k: before["tuned"][k] for k in now["initial"]}  # where the other run ended
    assert now["base_zero_shot"] == before["base_zero_shot"]


def test_what_the_first_adapter_learned_from_is_not_forgotten(trained, capsys):
    """A second run's notes name the rows of the first one, and a split that differs is told."""
    adapter = read_adapter(trained)
    second = dataclasses.replace(
        adapter, dataset={"name": "pairs.jsonl", "seed": 1}, others=(adapter.dataset,)
    )
    assert second.trained_on("imdb") == adapter.dataset and second.trained_on("pairs.jsonl")["seed"] == 1
    s = TrainSettings(dataset=("imdb:0.5", "rotten_tomatoes:0.5"), eval_samples=8)
    initial.tell_of_rows(second, s)
    assert "held out other rows of imdb" in capsys.readouterr().err
    initial.tell_of_rows(second, TrainSettings(eval_samples=8))
    assert capsys.readouterr().err == ""


def test_an_adapter_that_does_not_fit_is_refused(trained, tiny_folder, pairs_file, tmp_path):
    def said(*flags):
        out = ("--output-dir", tmp_path / "run")
        done = here(
            "qlora_finetune.py", "--init-adapter", trained, "--dataset", pairs_file, *RUN, *out, *flags
        )
        assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
        assert not (tmp_path / "run" / "settings.json").exists()
        return done.stderr.strip().splitlines()[-1]

    other = said("--lora-r", 8, "--target-modules", "q_proj,v_proj")
    assert "--lora-r 16, not 8" in other and "--target-modules down_proj,gate_proj" in other, other
    assert "add --lora-r 16 --lora-alpha 32" in other
    assert "says how a fresh adapter begins" in said("--lora-variant", "eva")
    assert "error: --init-adapter" in said(
        "--init-adapter", tmp_path / "none"
    ) and "is in --output-dir" in said("--output-dir", trained, "--overwrite")
    copy = shutil.copytree(trained, tmp_path / "copy")
    notes = json.loads((copy / "qlora.json").read_text())
    notes["base"]["config_sha256"] = "0" * 64
    (copy / "qlora.json").write_text(json.dumps(notes))
    (copy / "complete.json").unlink()
    wrong = said("--init-adapter", copy)
    assert wrong.startswith(f"error: --init-adapter {copy} was trained on") and "config_sha256" in wrong


@pytest.mark.parametrize(
    "flags, fault",
    [
        (["--dataset", "PAIRS"], "holds pairs (chosen, rejected): add --objective preference"),
        (
            ["--objective", "preference"],
            "--objective preference learns from pairs: --dataset imdb has no columns",
        ),
        (["--beta", "0.2"], "--beta is DPO's: add --objective preference"),
        (["--objective", "preference", "--beta", "0"], "--beta 0.0: must be above 0"),
    ],
)
def test_objective_and_rows_have_to_agree(flags, fault, pairs_file, tiny_folder, tmp_path):
    flags = [pairs_file if flag == "PAIRS" else flag for flag in flags]
    out = ("--samples", 8, "--eval-samples", 4, "--lane", "fp32", "--output-dir", tmp_path / "run")
    done = here("qlora_finetune.py", "--model", tiny_folder, *out, *flags)
    assert done.returncode == 2 and fault in done.stderr.splitlines()[-1], done.stderr


def test_the_rate_depends_on_the_objective():
    from qlora_finetune import read_settings

    assert read_settings([]).learning_rate == 5e-4
    assert read_settings(["--objective", "preference"]).learning_rate == 5e-5
    assert read_settings(["--objective", "preference", "--learning-rate", "1e-4"]).learning_rate == 1e-4
