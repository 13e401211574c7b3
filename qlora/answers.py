"""Answers of a whole file as data: the input's columns, then label, probabilities and answer, row by row.

A stopped run goes on where it ended, and its file has the bytes of one that was never stopped: batches begin
at the same rows, each is flushed to the disk, and a batch that is not whole is made again.
"""

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlora import evaluation, files, prompts
from qlora.adapters import NOTES, WEIGHTS
from qlora.cli import UserError, first_line, note, progress, require
from qlora.data import counted, reasons
from qlora.prompt_files import Table, read_table

SCORED_AT_ONCE = 8  # batches of labels: scoring sorts rows by length, and shares what they begin with
# What --answers of an earlier command has to agree with, so that rows of two commands never mix.
SETTINGS = ("model", "precision", "plain", "temperature", "top_p", "top_k", "max_new_tokens", "batch_size")
SETTINGS += ("seed",)


@dataclass
class Job:
    """An answer file, and how much of it is there."""

    out: Path
    table: Table
    adapter: object  # adapters.Adapter, or None: the base alone
    labels: tuple[str, ...]  # of a label adapter; (): free answers only
    names: list[str]  # of all columns
    per_batch: int
    made_of: dict  # see depends_on
    done: int = 0  # rows that are in the file
    end: int = 0  # bytes of them, the header included

    @property
    def is_complete(self) -> bool:
        whole = self.done == len(self.table.rows)
        return self.out.exists() and whole and self.out.stat().st_size == self.end

    def line(self, values: list) -> bytes:
        """A row as it stands in the file: CSV, or a JSON object."""
        if self.out.suffix.lower() == ".csv":
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerow(map(cell, values))
            # Half a character is legal in JSON and no UTF-8: it stays the escape that it was.
            return text.getvalue().encode("utf-8", "backslashreplace")
        row = {name: None if value != value else value for name, value in zip(self.names, values)}
        text = json.dumps(row, ensure_ascii=False, default=cell) + "\n"
        return text.encode("utf-8", "backslashreplace")

    @property
    def header(self) -> bytes:
        return self.line(self.names) if self.out.suffix.lower() == ".csv" else b""


def cell(value) -> str:
    """A value as text in CSV: None -> '', 0.25 -> '0.25', ['a'] -> '["a"]'"""
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return "" if value is None or value != value else str(value)


def open_job(s, adapter) -> Job:
    """Read --prompts and what an earlier command left of --answers; raises UsageError or UserError.

    Nothing is written yet. `adapter`: a checked adapters.Adapter, or None for the base alone.
    """
    name, ending = f"--answers {s.answers}", s.answers.suffix.lower()
    require(ending in (".csv", ".jsonl"), f"{name}: choose a name that ends in .csv or .jsonl")
    require(s.answers.resolve() != s.prompts.resolve(), f"{name}: that is --prompts; choose another name")
    require(s.answers.absolute().parent.is_dir(), f"{name}: there is no folder {s.answers.parent}")
    table = read_table(s.prompts, s.columns)
    labels = adapter.prompt.answers if adapter and adapter.prompt and not s.plain else ()
    new = ["label", *(f"p_{label}" for label in labels)] if labels else []
    names = [*table.names, *(free_name(name, table.names) for name in [*new, "answer"])]
    per_batch = s.batch_size * (SCORED_AT_ONCE if labels else 1)
    made_of = depends_on(s, adapter) | {"columns": names}
    job = Job(s.answers, table, adapter, labels, names, per_batch, made_of)
    take_up(job)
    return job


def free_name(name: str, taken: list[str]) -> str:
    """'label' -> 'predicted_label' where the input has a column of that name"""
    while name in taken:
        name = f"predicted_{name}"
    return name


def depends_on(s, adapter) -> dict:
    """What the answers are made of: other input, adapter or settings give another file."""
    paths = [adapter.folder / name for name in (WEIGHTS, NOTES)] if adapter else []
    made_by = [files.sha256_of(path) for path in paths if path.is_file()]
    settings = {name: getattr(s, name) for name in SETTINGS}
    settings["text"] = list(s.columns or ())
    return {"prompts": files.sha256_of(s.prompts), "adapter": made_by, **settings}


def record_of(out: Path) -> Path:
    """reviews.csv -> reviews.csv.run.json, which says what the answers were made of"""
    return out.with_name(out.name + ".run.json")


def take_up(job: Job) -> None:
    """Find the rows that an earlier command wrote; UsageError where they are not this command's."""
    name, record = f"--answers {job.out}", record_of(job.out)
    if not job.out.exists():
        return
    require(record.exists(), f"{name}: a file of other origin is there; choose another name")
    before = files.read_record(record, f"delete it and {job.out}")[0]
    changed = [f"--{key.replace('_', '-')}" for key in job.made_of if before.get(key) != job.made_of[key]]
    fresh = f"choose another name, or delete {job.out} to begin again"
    require(not changed, f"{name} was begun with another {', '.join(changed)}; {fresh}")
    job.done, job.end = whole_batches(job, job.out.read_bytes(), fresh)


def whole_batches(job: Job, data: bytes, fresh: str) -> tuple[int, int]:
    """(rows, bytes) of the file's beginning that stays; UserError where its rows are not the input's."""
    if not data.startswith(job.header):
        require(job.header.startswith(data), f"--answers {job.out}: its columns were changed; {fresh}")
        return 0, 0  # stopped inside the header
    ends = row_ends(data, job.out.suffix.lower() == ".csv")[bool(job.header) :]
    rows, start = job.table.rows, len(job.header)
    for number, (row, end) in enumerate(zip(rows, ends), 1):
        kept = job.line([*row, None])[:-1] if job.header else job.line(list(row))[:-2]  # no line break, no }
        edited = f"--answers {job.out}: row {number} is not row {number} of the input; was it edited? {fresh}"
        if not data[start:end].startswith(kept):
            raise UserError(edited)
        start = end
    if len(ends) > len(rows):
        raise UserError(f"--answers {job.out} has {len(ends)} rows, the input {len(rows)}; {fresh}")
    whole = len(ends) if len(ends) == len(rows) else len(ends) // job.per_batch * job.per_batch
    return whole, ends[whole - 1] if whole else len(job.header)


def row_ends(data: bytes, is_csv: bool) -> list[int]:
    """Where each whole row ends, in bytes; a row that was cut has no end. b'a,b\\n1,"x' -> [4]"""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts of 128 KiB
    ends, at = [], 0

    def lines():
        nonlocal at
        for line in io.BytesIO(data):
            at += len(line)
            yield line.decode(errors="replace")

    rows = csv.reader(lines(), strict=True) if is_csv else lines()
    try:
        for _ in rows:
            ends.append(at)
    except csv.Error:  # the end of the file inside quotes
        pass
    return ends if data.endswith(b"\n") or not ends or ends[-1] < len(data) else ends[:-1]


def write(job: Job, model, base, ask: Callable, reply: Callable) -> None:
    """Answer the rows that are not in the file yet, a batch at a time, each flushed to the disk.

    `ask`: a text's token ids as a prompt, UserError where it is too long; `reply`: answers to such prompts.
    """
    table, total = job.table, len(job.table.rows)
    left_out = list(table.left_out)
    begin(job, base.hardware.lane)
    with open(job.out, "ab") as file, files.only_writer(job.out), progress(total, "answers") as step:
        file.truncate(job.end)
        if job.end == 0:
            file.write(job.header)
        step(job.done)
        try:
            for first in range(job.done, total, job.per_batch):
                batch = range(first, min(total, first + job.per_batch))
                made = answer_batch(job, model, base, (ask, reply), batch, left_out)
                file.write(b"".join(job.line([*table.rows[i], *made[i]]) for i in batch))
                file.flush()
                os.fsync(file.fileno())
                job.done = batch.stop
                step(len(batch))
        except KeyboardInterrupt:
            there = f"{job.done} of {total} rows are in {job.out}"
            raise KeyboardInterrupt(f"stopped: {there}; the same command again goes on") from None
    if left_out:
        note(f"note       {len(left_out)} of {total} rows have no answer: {reasons(counted(left_out))}")
    note(f"written    {job.out}: {total} rows")


def begin(job: Job, lane: str) -> None:
    """The record of a new file, before its first row; of one that goes on, whether products still agree."""
    record = record_of(job.out)
    if not job.out.exists():
        files.write_record(record, job.made_of | {"lane": lane})
        return
    note(f"answers    {job.out} has {job.done} of {len(job.table.rows)} rows: going on")
    if (before := files.read_record(record, f"delete it and {job.out}")[0].get("lane")) != lane:
        note(f"note       --lane {before} -> {lane}: from here on probabilities may round otherwise")


def answer_batch(job: Job, model, base, ways: tuple, batch: range, left_out: list) -> dict[int, list]:
    """{row: its new cells}; a row without text, or too long, has empty ones."""
    ask, reply = ways
    made = {i: [None] * (len(job.names) - len(job.table.names)) for i in batch}
    asked = {}
    for i in batch:
        if (text := job.table.texts[i]) is None:
            continue
        try:
            asked[i] = ask(text) if not job.labels else label_prompt(job, base, text)
        except UserError as error:
            left_out.append((first_line(error), i + 1))
    if not asked:
        return made
    ids = list(asked.values())
    if job.labels:
        answers = [prompts.answer_ids(base.tokenizer, job.adapter.prompt, i) for i in range(len(job.labels))]
        scores = evaluation.score_labels(model, ids, answers, base.hardware.autocast)
        new = [label_cells(job.labels, row) for row in scores]
    else:
        new = [[text] for text in reply(ids)]
    return made | dict(zip(asked, new))


def label_prompt(job: Job, base, text: str) -> list[int]:
    return prompts.sentiment_prompt(base.tokenizer, job.adapter.prompt, prompts.clean(text))


def label_cells(labels: tuple[str, ...], scores: np.ndarray) -> list:
    """[label, probability of each, label as the answer]: logs of 0.6, 0.2 -> ['Negative', 0.75, 0.25, …]"""
    shares = np.exp(scores.astype(np.float64) - scores.max())
    best = labels[int(scores.argmax())]
    return [best, *(round(float(share), 6) for share in shares / shares.sum()), best]
