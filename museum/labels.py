"""Bugs of rows and labels: what is trained on is not what one thinks."""

import contextlib
from dataclasses import replace

import torch

from museum.bug import Bug, hold
from museum.job import Run, encode, reviews, split_rows
from qlora import batches, data, evaluation
from qlora.control_tokens import end_ids
from qlora.logits import IGNORE
from qlora.training import guards


def cut_at_the_end(tokenizer, prompt, rows) -> list[dict]:
    """The whole text, then the first max_length tokens of each row: long ones lose their answer."""
    most = prompt.max_length
    whole = encode(tokenizer, replace(prompt, max_length=1024), rows)
    return [{name: ids[:most] for name, ids in example.items()} for example in whole]


def rows_with_labels(run: Run) -> dict[str, str]:
    taught = sum(batches.learned_tokens(example) > 0 for example in run.examples)
    return {"rows that teach anything": f"{taught} of {len(run.examples)}", "right": run.right("trained")}


labels_masked = Bug(
    "labels-masked",
    lambda job: replace(job, encode=cut_at_the_end),
    lambda run: guards.labels_present(guards.Guards(), run.examples),
    rows_with_labels,
    lambda job, folder: replace(job, max_length=56),  # about half of the rows are longer
)


def answer_alone(tokenizer, prompt, rows) -> list[dict]:
    """Labels on the words of the answer, as if it had no end."""
    ends = end_ids(tokenizer)
    made = encode(tokenizer, prompt, rows)
    return [{**e, "labels": [IGNORE if label in ends else label for label in e["labels"]]} for e in made]


def ends_supervised(run: Run, examples: list[dict]) -> None:
    guards.end_supervised(guards.Guards(), examples, end_ids(run.tokenizer))


def stops(run: Run) -> dict[str, str]:
    """How likely the model ends after its answer, as a share of probability."""
    ends, answers = run.tokenizer.eos_token_id, run.answers()
    examples = []
    for ids, row in zip(run.asked("trained"), run.held_out):
        reply = answers[row.label][:-1]
        whole = [*ids, *reply, ends]
        examples.append({"input_ids": whole, "labels": [IGNORE] * (len(whole) - 1) + [ends]})
    logs = evaluation.log_p_of_labels(run.model, examples, contextlib.nullcontext)
    likely = torch.tensor(logs).exp().mean().item()
    return {"P(end token) after the answer": f"{likely:.3f}", "right": run.right("trained")}


end_masked = Bug(
    "end-masked",
    lambda job: replace(job, encode=answer_alone),
    lambda run: ends_supervised(run, run.examples),
    stops,
)


def pad_by_id(examples: list[dict], pad_id: int) -> dict:
    """Mask every pad token that is in the batch, wherever it stands."""
    batch = batches.collate(examples, pad_id)
    batch["labels"][batch["input_ids"] == pad_id] = IGNORE
    return batch


def rows_of(batch: dict) -> list[dict]:
    """What a batch holds, as rows again."""
    pairs = zip(batch["input_ids"].tolist(), batch["labels"].tolist())
    return [{"input_ids": ids, "labels": labels} for ids, labels in pairs]


def masked_by_position(run: Run) -> None:
    """The rows hold; what the collator makes of them is looked at with the same guard."""
    ends_supervised(run, [row for batch in run.batches for row in rows_of(batch)])


def labels_on_the_way(run: Run) -> dict[str, str]:
    there = sum(batches.learned_tokens(example) for example in run.examples)
    left = sum(int((batch["labels"] != IGNORE).sum()) for batch in run.batches)
    return {**stops(run), "labels in the rows": str(there), "labels in the batches": str(left)}


masked_by_pad_id = Bug(
    "pad-by-id",
    lambda job: replace(job, collate=pad_by_id),
    masked_by_position,
    labels_on_the_way,
)


def split_with_duplicates(train: int, held_out: int, seed: int) -> tuple[list, list]:
    """A file that has each row twice, shuffled and cut in two."""
    rows = split_rows((train + held_out) // 2, 1, seed)[0]
    twice = rows + [replace(row) for row in rows]
    order = torch.randperm(len(twice), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [twice[i] for i in order]
    return shuffled[held_out : held_out + train], shuffled[:held_out]


def no_row_on_both_sides(run: Run) -> None:
    """Duplicates of both sides together, less those inside each."""
    both, train, held = (
        data.without_duplicates(rows)[1]
        for rows in (run.train_rows + run.held_out, run.train_rows, run.held_out)
    )
    leaked = both - train - held
    hold(not leaked, f"{leaked} of {len(run.held_out)} held-out rows are training rows as well")


def new_rows(run: Run) -> list:
    """Reviews that neither side has seen."""
    known = {row.text for row in run.train_rows + run.held_out}
    unseen = [row for row in reviews().rows[-400:] + reviews().rows[:400] if row.text not in known]
    return unseen[:24] + unseen[-24:]


def held_out_and_new(run: Run) -> dict[str, str]:
    new = new_rows(run)
    return {"right, held out": run.right("trained"), "right, new reviews": run.right("trained", new)}


duplicates_leaked = Bug(
    "duplicates-leaked",
    lambda job: replace(job, split=split_with_duplicates),
    no_row_on_both_sides,
    held_out_and_new,
    lambda job, folder: replace(job, rows=32, held_out=16, steps=24),  # three passes: enough to remember
)
