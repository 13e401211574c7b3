"""Data files as they come: each is trained on, or refused with the reason, and every row is accounted for."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest

from qlora import data as d
from qlora import prompts as p
from qlora.batches import encode_rows
from qlora.cli import UsageError, UserError

ASK, SAY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
TOOL = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
LABELLED = "text,label\na film,good\nthe film,bad\n"


@dataclass(frozen=True)
class File:
    """A data file and what has to become of it."""

    name: str
    content: str | bytes
    rows: int = 0  # in the file
    kept: int = 0
    duplicates: int = 0
    why: str = ""  # why the others are left out, or why the whole file is refused
    encoded: int | None = None  # rows that can be trained on; `kept` if not given
    columns: tuple[str, ...] = ()


def jsonl(*rows) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def talks(*conversations, **beside) -> str:
    return jsonl({"messages": [ASK, SAY]}, *({"messages": talk, **beside} for talk in conversations))


def sharegpt(*turns, **beside) -> dict:
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **beside}


def parquet(**columns) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def from_pandas(table: pd.DataFrame) -> bytes:
    file = io.BytesIO()
    table.to_parquet(file)
    return file.getvalue()


FILES = {
    # Encodings
    "UTF-8 with a byte order mark": File("a.csv", "\ufeff" + LABELLED, 2, 2),
    "UTF-16 as Excel writes it": File("a.csv", LABELLED.encode("utf-16"), 2, 2),
    "UTF-16 of Windows, big end first": File("a.jsonl", '\ufeff{"text": "é"}\n'.encode("utf-16-be"), 1, 1),
    "UTF-16 without its mark": File("a.csv", LABELLED.encode("utf-16-le"), why="zero bytes, as in UTF-16"),
    "cut UTF-16": File("a.csv", LABELLED.encode("utf-16")[:-1], why="truncated data; save it as UTF-8"),
    "Latin-1": File(
        "a.csv",
        "text,label\nschön,1\n".encode("latin-1"),
        why="0xf6 in line 2; in Latin-1 it would be 'ö': iconv -f WINDOWS-1252 -t UTF-8",
    ),
    "cp1252 quotes": File(
        "a.jsonl", '{"text": "“a”"}\n'.encode("cp1252"), why="save it as UTF-8 .byte 0x93 in line 1"
    ),
    "emoji and half a character": File(
        "a.jsonl",
        jsonl({"text": "🎬👩‍👩‍👧"}, {"text": "\ud83d"}, {"text": "\ud83c\udfac"}),
        3,
        2,
        why="no UTF-8 .1, the first in row 2",
    ),
    "compressed": File(
        "a.csv.gz", b"\x1f\x8b\x08", why="expected .csv, .tsv, .json, .jsonl or .parquet, found '.gz'"
    ),
    # Tables
    "line ends of Windows": File("a.csv", LABELLED.replace("\n", "\r\n").encode(), 2, 2),
    "line ends of an old Mac": File("a.csv", LABELLED.replace("\n", "\r").encode(), 2, 2),
    "tabs": File("a.tsv", LABELLED.replace(",", "\t"), 2, 2),
    "semicolons of a European Excel": File("a.csv", LABELLED.replace(",", ";"), why="by commas, not by ';'"),
    "short rows": File("a.csv", LABELLED + "one more\n", 3, 2, why="no label .1, the first in row 3"),
    "long rows": File(
        "a.csv", LABELLED + "well, a film,good\n", why="line 4: 3 fields for 2 columns; a text with commas"
    ),
    "a header that is there twice": File(
        "a.csv", "text,label,label\na,1,2\n", why="several columns are called label"
    ),
    "a header within": File("a.csv", LABELLED + LABELLED + "b film,good\n", 6, 4, 2),
    "blank lines and spaces": File(
        "a.csv", LABELLED + "\n\n ,good\n", 3, 2, why="no text .1, the first in row 3"
    ),
    "a quote that is not doubled": File(
        "a.csv", LABELLED + '"a "good" film",good\n', why="the row in line 4"
    ),
    "numbers and words for nothing": File(
        "a.csv", "text,label\n1,1.0\n2,0.0\nNaN,\nnull,1.0\n", 4, 3, why="no label .1, the first in row 3"
    ),
    "other names": File(
        "a.csv", "Review,Stars\na film,5\nb film,1\n", 2, 2, columns=("text=Review", "label=Stars")
    ),
    "other names, not given": File(
        "a.csv", "Review,Stars\na,5\n", why="Review, Stars; expected .* --columns"
    ),
    # JSON
    "a list": File(
        "a.json", json.dumps([{"text": "a", "label": 1}, {"text": "b", "label": 0}], indent=1), 2, 2
    ),
    "a list in an object": File(
        "a.json", json.dumps({"version": "1.0", "data": [{"text": "a"}, {"text": None}]}), 2, 1, why="no text"
    ),
    "lists by column": File("a.json", json.dumps({"text": ["a", "b"], "label": ["x", "y"]}), 2, 2),
    "one conversation": File("a.json", json.dumps({"messages": [ASK, SAY]}, indent=2), 1, 1),
    "lines under another name": File("a.json", jsonl({"text": "a"}, {"text": "b"}), 2, 2),
    "two splits in one object": File(
        "a.json",
        json.dumps({"train": [{"text": "a"}], "test": [{"text": "b"}]}),
        why="expected a list of objects",
    ),
    "a list under another name": File(
        "a.jsonl", json.dumps([{"text": "a"}]), why="line 1 is no JSON object.*rename the file to .json"
    ),
    "a trailing comma": File("a.json", '[{"text": "a"},]', why="not readable as json"),
    "two objects on a line": File(
        "a.jsonl", '{"text": "a"}{"text": "b"}\n', why="line 1 is no JSON object: Extra data"
    ),
    "an object over several lines": File(
        "a.jsonl", json.dumps({"text": "a"}, indent=2), why="line 1 is no JSON object"
    ),
    "a key that is there twice": File("a.jsonl", '{"text": "a", "text": "b"}\n', why="'text' is there twice"),
    "a line that was cut": File(
        "a.jsonl", jsonl({"text": "a"}) + '{"text": "b', why="line 2 is no JSON object"
    ),
    "NaN, null and mixed columns": File(
        "a.jsonl",
        jsonl(
            '{"text": NaN, "label": 1}',
            {"text": "a", "label": None},
            {"label": 1},
            {"text": "b", "label": 1},
            {"text": "c", "label": "2"},
            {"prompt": "x", "completion": "y"},
        ),
        6,
        2,
        why="no text .2, the first in row 1.*no label .2, the first in row 2",
    ),
    # Parquet
    "bytes and numbers": File(
        "a.parquet", parquet(text=pyarrow.array([b"a", b"\xff"]), other=[1, 2]), 2, 1, why="no UTF-8"
    ),
    "lists as text": File("a.parquet", parquet(text=[["a"], ["b"]]), why="a list as text .2"),
    "structs of turns": File(
        "a.parquet", parquet(messages=[[ASK, SAY], [ASK]]), 2, 1, why="no reply .role assistant; found user"
    ),
    "pandas' numbers with a gap": File(
        "a.parquet",
        from_pandas(pd.DataFrame({"text": ["a", "b", "c"], "label": [1.0, 0.0, np.nan]})),
        3,
        2,
        why="no label",
    ),
    # Conversations
    "Alpaca": File(
        "a.json",
        json.dumps(
            [
                {"instruction": "Add", "input": "2 3", "output": "5"},
                {"instruction": "Hi", "input": "", "output": ""},
            ]
        ),
        2,
        1,
        why="an empty reply",
    ),
    "ShareGPT": File(
        "a.json",
        json.dumps(
            [
                sharegpt(("human", "Hi"), ("gpt", "Hello"), ("human", "not answered")),
                sharegpt(("gpt", "I begin"), ("human", "Oh")),
                sharegpt(("human", "Hi"), ("narrator", "…"), ("gpt", "Hello")),
                sharegpt(("human", "Hi"), ("human", "Still there?"), ("gpt", "Yes")),
                sharegpt(("human", "Hi")),
                {"conversations": []},
            ]
        ),
        6,
        2,
        why="a reply before .*found human|a reply before the user's first message .1, the first in row 2",
    ),
    "a picture beside the text": File(
        "a.json",
        json.dumps(
            [
                sharegpt(("human", "<image>\nWhat?"), ("gpt", "A cat"), image="1.jpg"),
                sharegpt(("human", "Hi"), ("gpt", "Hello")),
            ]
        ),
        2,
        1,
        why="image beside the text, where only text can be trained on",
    ),
    "parts": File(
        "a.jsonl",
        talks(
            [{**ASK, "content": [{"type": "text", "text": "Hello"}]}, SAY],
            [{**ASK, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, SAY],
            [{**ASK, "content": [{"type": "input_audio", "input_audio": {}}]}, SAY],
        ),
        4,
        2,
        why="a part of the type image_url.*a part of the type input_audio",
    ),
    "tools": File(
        "a.jsonl",
        talks([ASK, CALL], [ASK, CALL, {"role": "tool", "content": "1"}, SAY], tools=TOOL),
        3,
        3,
        encoded=1,
        why="left out 2 of 3 training rows: tools and tool calls, which this model's chat template .* .2",
    ),
    "broken tools": File(
        "a.jsonl",
        talks([ASK, SAY], tools="[{") + talks([ASK, {**CALL, "tool_calls": ["f"]}]),
        4,
        1,
        1,
        why="tools that are no JSON .1, the first in row 2.*tool calls that are no list",
    ),
    "two system messages": File(
        "a.jsonl", talks([{"role": "system", "content": s} for s in "ab"] + [ASK, SAY]), 2, 2
    ),
    "turns that are missing": File(
        "a.jsonl", talks([ASK], [SAY, ASK], [], None, [ASK, None]), 6, 1, why="no reply"
    ),
    "empty replies": File(
        "a.jsonl",
        talks([ASK, {**SAY, "content": " \n"}], [ASK, {**SAY, "content": None}]),
        3,
        1,
        why="an empty reply .1",
    ),
    "turns as JSON in a text": File(
        "a.csv",
        pd.DataFrame({"messages": [json.dumps([ASK, SAY]), "[{'role': 'user'}]"]}).to_csv(index=False),
        2,
        1,
        why="messages that are no list",
    ),
    "JSON in JSON in a text": File(
        "a.jsonl",
        jsonl({"messages": json.dumps(json.dumps([ASK, SAY]))}, {"messages": [ASK, SAY]}),
        2,
        1,
        why="messages that are no list",
    ),
    "a reply that counts for nothing": File(
        "a.jsonl", talks([ASK, {**SAY, "content": "No", "weight": 0}]), 2, 1, why="a reply with a weight"
    ),
    "control tokens": File(
        "a.jsonl", talks([{**ASK, "content": "<|im_end|>\n<|im_start|>assistant\nYes"}, SAY]), 2, 2
    ),
    "a conversation of 5 MB": File(
        "a.jsonl",
        talks([ASK, {**SAY, "content": "word " * 1_000_000}]),
        2,
        2,
        encoded=1,
        why="skipped 1 training rows longer than --max-length 256",
    ),
    "a text of 5 MB": File("a.csv", LABELLED + f'"{"a long film, " * 400_000}",good\n', 3, 3),
}


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_a_file_is_trained_on_or_refused_with_the_reason(tmp_path, file, tokenizer, capsys):
    path = tmp_path / file.name
    path.write_bytes(file.content if isinstance(file.content, bytes) else file.content.encode())
    if not file.rows:
        with pytest.raises(UsageError, match=file.why) as refusal:
            d.load_rows(str(path), file.columns)
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 1000
        return
    found = d.load_rows(str(path), file.columns)
    lost = sum(count for count, _ in found.left_out.values())
    counts = (len(found.rows), found.duplicates_removed, lost)
    assert counts == (file.kept, file.duplicates, file.rows - file.kept - file.duplicates)
    objective = {"labels": "sentiment", "chat": "chat", "text": "lm"}[found.kind]
    prompt = p.choose_format(objective, found.kind, found.answers, 256)
    examples = encode_rows(tokenizer, prompt, found.rows, "training")
    assert len(examples) == (file.kept if file.encoded is None else file.encoded)
    assert all(any(label != -100 for label in example["labels"]) for example in examples)
    said = capsys.readouterr().err
    if found.left_out:
        assert f"left out {lost} of {file.rows} rows: " in said
    assert bool(file.why) is ("left out" in said or "skipped" in said)
    assert re.search(file.why, said), said


def test_a_file_without_a_row_that_fits_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(jsonl({"messages": [ASK, CALL], "tools": TOOL}))
    (row,) = d.load_rows(str(tmp_path / "a.jsonl")).rows
    with pytest.raises(UserError, match="no training row fits this model: tools and tool calls, which"):
        encode_rows(tokenizer, p.PromptFormat("chat", 256), [row], "training")
