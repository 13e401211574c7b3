"""The run of a riddle: its symptoms on the terminal, and the evidence that it leaves in a folder."""

import csv
import json
from pathlib import Path

import numpy as np

from museum.catalogue import BUGS
from museum.exhibit import curves
from museum.job import Job, Run, deploy, train
from museum.labels import new_rows
from museum.riddles import HEALTHY, answer_of
from museum.settings import MuseumSettings
from qlora.cli import UsageError, note
from qlora.data import Row
from qlora.files import staged
from qlora.generation import generate
from qlora.tables import table

REPLIES, REPLY_TOKENS = 4, 8


def pose(s: MuseumSettings) -> None:
    """Train the run of riddle s.riddle, leave its evidence, and print the symptoms."""
    folder = s.output_dir / f"riddle-{s.riddle}"
    if folder.exists():
        raise UsageError(f"{folder} is there already; look into it, or delete it to run the riddle again")
    # The same for all, or a setting would tell; at 56 tokens about half of the reviews have to be shortened.
    usual = Job(s.model, rows=32, steps=32, max_length=56, variant="rslora", alpha=8, seed=100 + s.riddle)
    wrong = answer_of(s.riddle)
    job = usual if wrong == HEALTHY else BUGS[wrong].plant(usual)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staged(folder) as part:
        part.mkdir()
        run = deploy(train(job), job, part / "adapter")
        note("           asking the base, the trained and the deployed model …")
        symptoms = gather(run, part)
    show(symptoms, s.riddle, folder)


def gather(run: Run, folder: Path) -> dict:
    """Write the evidence into `folder`; returns the symptoms."""
    asked, answers = run.asked("deployed"), run.answers()
    log_p = {who: run.scores(who) for who in ("base", "trained", "deployed")}
    with run.acting_as("deployed") as model:
        log_p["deployed_alone"] = np.concatenate([run.job.score(model, [ids], answers) for ids in asked])
    replies = {who: replies_of(run, who) for who in ("trained", "deployed")}
    write_settings(run, folder / "settings.json")
    write_log(run, folder / "log.csv")
    rows = zip(run.train_rows, run.examples)
    dump(folder / "training-rows.json", [{**described(run, row), **example} for row, example in rows])
    first = {name: run.batches[0][name].tolist() for name in ("input_ids", "labels")}
    dump(folder / "first-batch.json", first)
    dump(folder / "held-out-rows.json", held_out(run, asked, log_p))
    dump(folder / "replies.json", replies)
    return {
        "losses": run.losses,
        "right": {who: right_of(scores, run.held_out) for who, scores in log_p.items()},
        "loss": {who: loss_of(scores, run.held_out) for who, scores in log_p.items()},
        "new": run.right("trained", new_rows(run)),
        "replies": {who: texts[0] for who, texts in replies.items()},
    }


def right_of(scores, rows: list[Row]) -> str:
    return f"{sum(int(said) == row.label for said, row in zip(scores.argmax(1), rows))} of {len(rows)}"


def loss_of(scores, rows: list[Row]) -> str:
    return f"{-sum(scores[i, row.label] for i, row in enumerate(rows)) / len(rows):.3f}"


def replies_of(run: Run, who: str) -> list[str]:
    """Greedy replies to the first held-out rows, with their special tokens."""
    ends = {"pad_token_id": run.tokenizer.pad_token_id, "eos_token_id": run.tokenizer.eos_token_id}
    with run.acting_as(who) as model:
        made = generate(model, run.asked(who)[:REPLIES], REPLY_TOKENS, **ends)
    return [until_end(run.tokenizer, ids) for ids in made]


def until_end(tokenizer, ids: list[int]) -> str:
    """Decoded up to and with the end token: what follows it is padding."""
    end = tokenizer.eos_token_id
    return tokenizer.decode(ids[: ids.index(end) + 1] if end in ids else ids)


def described(run: Run, row) -> dict:
    return {"text": row.text, "answer": run.prompt.answers[row.label]}


def held_out(run: Run, asked: list[list[int]], log_p: dict) -> list[dict]:
    names = run.prompt.answers
    return [
        {
            **described(run, row),
            "asked_by_deployed": asked[i],
            "log_p": {who: dict(zip(names, map(float, scores[i]))) for who, scores in log_p.items()},
        }
        for i, row in enumerate(run.held_out)
    ]


def write_settings(run: Run, path: Path) -> None:
    job, base = run.job, run.base.info
    wanted = {name: getattr(job, name) for name in ("precision", "max_length", "steps", "seed")}
    wanted |= {"lora_variant": job.variant, "lora_r": run.model.peft_config["default"].r}
    wanted |= {
        "lora_alpha": job.alpha,
        "learning_rate": job.rate,
        "batch_size": len(run.batches[0]["labels"]),
    }
    dump(path, {"base": base.name, "base_revision": base.revision, **wanted})


def write_log(run: Run, path: Path) -> None:
    names = ("step", "loss", "grad_norm", "learning_rate")
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([[step[name] for name in names] for step in run.log])


def dump(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def show(symptoms: dict, number: int, folder: Path) -> None:
    print(f"Riddle {number}: reviews, positive or negative. No message, no error. Is something wrong?\n")
    print("\n".join(curves({"training": symptoms["losses"]})), end="\n\n")
    names = list(symptoms["right"])
    rows = [
        ["right, held-out rows", *(symptoms["right"][who] for who in names)],
        ["loss at their answers", *(symptoms["loss"][who] for who in names)],
        ["right, new reviews", "", symptoms["new"], "", ""],
    ]
    print(table(["", *names], rows, indent=0), end="\n\n")
    for who, reply in symptoms["replies"].items():
        print(f"a reply of the {who + ' model':15} {reply!r}")
    print(f"\nevidence   {folder}/: settings.json, log.csv, training-rows.json, first-batch.json,")
    print("           held-out-rows.json, replies.json, adapter/ (docs/museum.md says what is in them)")
    print(f"answer     python -m museum --riddle {number} --answer NAME (a bug's name, or healthy)")
