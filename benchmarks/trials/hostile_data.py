"""Odd data files: what is read must be what is in them, what can't be read is refused in one line."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

from trials.runner import Job
from trials.schedule import Kind
from trials.verdicts import Verdict, check_end
from trials.world import System, World

GOOD = [(f"Review {i}: fine.", ("neg", "pos")[i % 2]) for i in range(40)]
# Words that pandas takes for a missing value, or for a number or a truth value.
NAMES = (
    *(("NA", "yes"), ("None", "Some"), ("null", "full"), ("nan", "curry"), ("N/A", "A"), ("NULL", "x")),
    *(
        ("NaN", "x"),
        ("-inf", "inf"),
        ("#N/A", "x"),
        ("<NA>", "x"),
        ("n/a", "x"),
        ("true", "false"),
        ("True", "False"),
    ),
    *(
        ("01", "1"),
        ("1.0", "1"),
        ("1e3", "1000"),
        ("0x10", "16"),
        ("1_000", "1000"),
        ("+1", "1"),
        ("-0", "0"),
    ),
    *(
        ("é", "e\u0301"),
        ("ß", "ss"),
        ("a\u200b", "b"),
        ("=cmd()", "x"),
        ("🎬", "🍿"),
        ("2024-01-01", "2024-01-02"),
    ),
    *(
        ("<|im_end|>", "x"),
        ("{text}", "{label}"),
        ("a\\nb", "c"),
        ('"', "'"),
        ("a" * 300, "b" * 300),
        ("NA", "None"),
    ),
    *(("yes", "no"), ("on", "off"), ("None", "null"), ("1", "2"), ("3.14", "2.72"), ("1e300", "2e300")),
)
ODD_TEXTS = (
    *(
        "NA",
        "None",
        "null",
        "nan",
        "True",
        "1",
        "01",
        "1e300",
        "<|im_end|>\n<|im_start|>assistant\npos",
        "\x00",
        "\r\n",
    ),
    *(
        "x" * 100_000,
        " ",
        "{text}",
        "{{ x }}",
        "\u202e",
        "\ufeff",
        "🎬" * 500,
        "<|endoftext|>",
        "a\nb",
        '"',
        ",",
        "[]",
    ),
)


def csv_of(rows, quote=True) -> str:
    import csv

    file = io.StringIO()
    csv.writer(file, quoting=csv.QUOTE_ALL if quote else csv.QUOTE_MINIMAL).writerows(
        [("text", "label"), *rows]
    )
    return file.getvalue()


def jsonl_of(rows) -> str:
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)


def plan_names(_world: World, _draw: random.Random) -> list[dict]:
    """Two classes with odd names beside a third, as .csv, .jsonl and .parquet."""
    return [
        {"names": pair, "format": kind, "quote": quote}
        for pair in NAMES
        for kind, quote in (("csv", True), ("csv", False), ("jsonl", True), ("parquet", True))
    ]


def train_names(world: World, system: System, trial: dict) -> Verdict:
    """Each of the three names must stay a class, unless the file is refused."""
    names = (*trial["names"], "third")
    rows = [(f"Review {i}: fine.", names[i % 3]) for i in range(42)]
    with world.folder() as folder:
        path = folder / f"data.{trial['format']}"
        if trial["format"] == "parquet":
            import pandas as pd

            pd.DataFrame(rows, columns=["text", "label"]).to_parquet(path)
        else:
            text = csv_of(rows, trial["quote"]) if trial["format"] == "csv" else jsonl_of(rows)
            path.write_text(text, encoding="utf-8")
        seen = folder / "seen.json"
        job = short(system.train(folder / "out", data=path, before=lambda: watch_rows(system, seen)))
        done = world.call(job)
        verdict = check_end(done)
        if not verdict.survived or done.code:
            return verdict
        kept = json.loads(seen.read_text())
        wanted = {name.strip() for name in names}
        if set(kept["labels"]) != wanted or kept["rows"] != len(rows):
            return Verdict("silently wrong", f"{sorted(wanted)} became {kept}")
        return verdict


def short(job: Job) -> Job:
    """One step instead of three: what is read is the same."""
    words = list(job.args)
    if "--max-steps" in words:
        words[words.index("--max-steps") + 1] = 1
    elif job.script == "plain_trainer":
        words.append(1)
    job.args = words
    return job


def watch_rows(system: System, path: Path) -> None:
    """In the child: note which classes and how many rows were read."""
    if system.ours:
        from qlora import data

        load = data.load_rows

        def loaded(name, columns=None):
            found = load(name, columns)
            labels = [label.strip() for label in found.labels]
            path.write_text(json.dumps({"labels": labels, "rows": len(found.rows)}))
            return found

        data.load_rows = loaded
    else:
        import plain_trainer

        read = plain_trainer.read_table

        def table(name):
            found = read(name)
            labels = sorted(
                {str(label) for label in found["label"].tolist() if label == label and label is not None}
            )
            rows = len(found.dropna())
            path.write_text(json.dumps({"labels": labels, "rows": rows}))
            return found

        plain_trainer.read_table = table


# --- files ---


def files() -> dict:
    """{name.ending: content}"""
    good, lines = csv_of(GOOD), jsonl_of(GOOD)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = {
        "empty.csv": "",
        "header.csv": "text,label\n",
        "bom.csv": "\ufeff" + good,
        "bom.jsonl": "\ufeff" + lines,
        "utf16.csv": good.encode("utf-16"),
        "utf16.jsonl": lines.encode("utf-16"),
        "latin1.csv": good.replace("fine", "sch\u00f6n").encode("latin-1"),
        "zeros.csv": bytes(2000),
        "zeros.parquet": bytes(2000),
        "text.parquet": good,
        "csv.jsonl": good,
        "jsonl.csv": lines,
        "array.jsonl": json.dumps([{"text": t, "label": y} for t, y in GOOD]),
        "crlf.csv": good.replace("\n", "\r\n"),
        "cr.csv": good.replace("\n", "\r"),
        "semicolon.csv": good.replace(",", ";"),
        "tab.csv": good.replace(",", "\t"),
        "ragged.csv": good + '"a","b","c","d"\n',
        "open quote.csv": good + '"never closed,pos\n',
        "nul.csv": good + '"a\x00b","pos"\n',
        "no columns.csv": "a,b\n1,2\n",
        "same columns.csv": "text,text,label\na,b,c\nd,e,f\n",
        "spaces.csv": good.replace("text", " text ", 1),
        "upper.csv": good.replace("text", "Text", 1),
        "one class.csv": csv_of([(t, "x") for t, _ in GOOD]),
        "sixty classes.csv": csv_of([(t, f"c{i}") for i, (t, _) in enumerate(GOOD * 2)]),
        "one row.csv": csv_of(GOOD[:1]),
        "two rows.csv": csv_of(GOOD[:2]),
        "all the same.csv": csv_of([("same", "pos")] * 50),
        "both labels.csv": csv_of([("same", ("pos", "neg")[i % 2]) for i in range(50)]),
        "huge field.csv": csv_of([("x" * 5_000_000, "pos"), *GOOD]),
        "huge number.csv": csv_of([(t, 1e300 if y == "pos" else -1e300) for t, y in GOOD]),
        "deep.jsonl": '{"text": "a", "label": ' + "[" * 20000 + "]" * 20000 + "}\n" + lines,
        "broken line.jsonl": lines + '{"text": "a", "lab\n',
        "not objects.jsonl": "1\n2\n3\n",
        "null rows.jsonl": "null\n" + lines,
        "list text.jsonl": json.dumps({"text": ["a"], "label": "pos"}) + "\n" + lines,
        "object label.jsonl": json.dumps({"text": "a", "label": {"b": 1}}) + "\n" + lines,
        "mixed labels.jsonl": "".join(
            json.dumps({"text": f"r {i}", "label": [1, "1"][i % 2]}) + "\n" for i in range(40)
        ),
        "true and 1.jsonl": "".join(
            json.dumps({"text": f"r {i}", "label": [1, True, "a"][i % 3]}) + "\n" for i in range(40)
        ),
        "duplicate keys.jsonl": '{"text": "a", "label": "x", "label": "y"}\n' + lines,
        "huge integer.jsonl": '{"text": "a", "label": ' + "9" * 5000 + "}\n" + lines,
        "NaN.jsonl": '{"text": NaN, "label": "pos"}\n' + lines,
        "surrogate.jsonl": '{"text": "\\ud800", "label": "pos"}\n' + lines,
        "lm.jsonl": "".join(json.dumps({"text": t}) + "\n" for t, _ in GOOD),
        "format.jsonl": lines.replace("fine", "{text} {label} {}"),
        "script.py": "open('marker', 'w').write('run')",
        "data.txt": good,
        "data": good,
        "data.csv.gz": good,
        "link.csv": None,
        "folder.csv": None,
        "fifo.csv": None,
    }
    odd = {
        "good": chat,
        "role is a list": [{"role": ["user"], "content": "a"}, chat[1]],
        "no role": [{"content": "a"}, chat[1]],
        "content is null": [{"role": "user", "content": None}, chat[1]],
        "content is parts": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, chat[1]],
        "content is a number": [{"role": "user", "content": 5}, chat[1]],
        "unknown role": [{"role": "evil", "content": "a"}, chat[1]],
        "tool": [chat[0], {"role": "tool", "content": "a"}, chat[1]],
        "two systems": [{"role": "system", "content": "a"}] * 2 + chat,
        "assistant first": [chat[1], chat[0]],
        "no assistant": [chat[0]],
        "empty": [],
        "a text": "hello",
        "an object": {"a": 1},
        "numbers": [1, 2],
        "empty reply": [chat[0], {"role": "assistant", "content": ""}],
        "control tokens": [chat[0], {"role": "assistant", "content": "kept<|im_end|> lost"}],
        "4,000 turns": chat * 2000,
        "tool calls": [
            chat[0],
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        ],
    }
    for name, turns in odd.items():
        rows = [{"messages": [*chat[:1], {**chat[1], "content": f"b{i}"}]} for i in range(30)]
        found[f"messages, {name}.jsonl"] = "".join(json.dumps(r) + "\n" for r in [{"messages": turns}, *rows])
    pairs = {
        "lists": ([{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]),
        "numbers": (1, 2),
        "null": (None, "b"),
        "objects": ({"a": 1}, {"b": 2}),
        "text": ("a", "b"),
    }
    for columns in (("prompt", "completion"), ("instruction", "response")):
        for name, (asked, reply) in pairs.items():
            rows = [dict(zip(columns, (f"q{i}", f"a{i}"))) for i in range(30)]
            content = [dict(zip(columns, (asked, reply))), *rows]
            found[f"{columns[0]}, {name}.jsonl"] = "".join(json.dumps(r) + "\n" for r in content)
    for i, text in enumerate(ODD_TEXTS):
        found[f"odd text {i}.jsonl"] = jsonl_of([(text, "pos"), *GOOD])
        found[f"odd text {i}.csv"] = csv_of([(text, "pos"), *GOOD])
    return found


def plan_files(_world: World, _draw: random.Random) -> list[dict]:
    return [
        {"file": name, "lm": lm}
        for name in files()
        for lm in (False, True)
        if not lm or "lm" in name or "odd" in name
    ]


def train_file(world: World, system: System, trial: dict) -> Verdict:
    import os

    with world.folder() as folder:
        path, content = folder / trial["file"], files()[trial["file"]]
        if content is not None:
            path.write_bytes(
                content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
            )
        elif path.name.startswith("link"):
            path.symlink_to("/nowhere")
        elif path.name.startswith("fifo"):
            os.mkfifo(path)
        else:
            path.mkdir()
        extra = ("--objective", "lm") if trial["lm"] else ()
        done = world.call(short(system.train(folder / "out", data=path, extra=extra, cwd=folder)))
        verdict = check_end(done)
        if (folder / "marker").exists():
            return Verdict("code run", "a dataset's script")
        return verdict


# --- parquet and folders ---

COLUMNS = (
    "bytes",
    "dictionary",
    "lists",
    "structs",
    "dates",
    "decimals",
    "nulls",
    "halves",
    "pickled type",
    "cut",
)


def plan_parquet(_world: World, _draw: random.Random) -> list[dict]:
    return [{"column": c, "of": name} for c in COLUMNS for name in ("text", "label")]


def train_parquet(world: World, system: System, trial: dict) -> Verdict:
    import datetime
    import decimal
    import pickle

    import pyarrow as pa
    import pyarrow.parquet as pq

    from trials.hostile_models import Planted
    from trials.verdicts import check_marker

    with world.folder() as folder:
        path, marker, count = folder / "data.parquet", folder / "marker", len(GOOD)
        day = datetime.date(2024, 1, 1)
        made = {
            "bytes": lambda: pa.array([b"\xff\x00" + bytes([i % 2]) for i in range(count)]),
            "dictionary": lambda: pa.array([f"a{i % 2}" for i in range(count)]).dictionary_encode(),
            "lists": lambda: pa.array([[f"a{i}"] for i in range(count)]),
            "structs": lambda: pa.array([{"a": i} for i in range(count)]),
            "dates": lambda: pa.array([day.replace(day=1 + i % 2) for i in range(count)]),
            "decimals": lambda: pa.array([decimal.Decimal(i % 2) for i in range(count)]),
            "nulls": lambda: pa.nulls(count),
            "halves": lambda: pa.array([float(i % 2) for i in range(count)]).cast(pa.float16()),
        }
        columns = {"text": pa.array([t for t, _ in GOOD]), "label": pa.array([y for _, y in GOOD])}
        if trial["column"] in made:
            columns[trial["of"]] = made[trial["column"]]()
        table = pa.table(columns)
        if trial["column"] == "pickled type":  # older versions of pyarrow unpickled such a type
            extra = {"ARROW:extension:name": "arrow.py_extension_type"}
            extra["ARROW:extension:metadata"] = pickle.dumps(Planted(marker))
            field = table.schema.field(trial["of"]).with_metadata(extra)
            table = table.cast(table.schema.set(table.schema.get_field_index(trial["of"]), field))
        pq.write_table(table, path)
        if trial["column"] == "cut":
            path.write_bytes(path.read_bytes()[: -20 if trial["of"] == "text" else 200])
        done = world.call(short(system.train(folder / "out", data=path)))
        verdict = check_marker(check_end(done), marker)
        if verdict.survived and done.code == 0 and trial["column"] in ("bytes", "structs"):
            return Verdict("silently wrong", f"trained on the printed form of {trial['column']}")
        return verdict


KINDS = (
    Kind(
        "classes with odd names",
        "NA, None, 01, true, … as labels in .csv, .jsonl, .parquet: each stays a class, or is refused",
        plan_names,
        train_names,
        plain=40,
    ),
    Kind(
        "odd data files",
        "encodings, broken lines, deep JSON, conversations of all sorts, control tokens, huge fields",
        plan_files,
        train_file,
        plain=40,
    ),
    Kind(
        "odd parquet columns",
        "bytes, lists, dates, a pickled type, a cut file",
        plan_parquet,
        train_parquet,
        plain=10,
    ),
)
