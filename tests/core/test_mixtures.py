"""Several datasets, joined or mixed by weights; how many rows are drawn where nothing was asked for."""

import json
from collections import Counter

import pytest

from qlora import data as d
from qlora.cli import UsageError
from qlora.mixtures import names_of, read_parts
from qlora.splitting import turns


def labelled(tmp_path, name: str, start: int, count: int, labels=("bad", "good")) -> str:
    """A file of the texts "review START", "review START+1", …, its labels in turn."""
    rows = [{"text": f"review {start + i}", "label": labels[i % len(labels)]} for i in range(count)]
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / name)


def texts(rows) -> set[str]:
    return {row.text for row in rows}


def of(rows, start: int, stop: int) -> int:
    return sum(start <= int(row.text.split()[1]) < stop for row in rows)


def test_parts_give_rows_in_turn_by_weight():
    # weight / (2 given + 1): 3 and 1, then 1 and 1 (the first), then 3/5 and 1, then 3/5 and 1/3, then 3/7
    assert turns(5, [3, 1], [9, 9]) == [0, 0, 1, 0, 0]
    assert Counter(turns(1000, [0.7, 0.2, 0.1], [1000] * 3)) == {0: 700, 1: 200, 2: 100}
    assert turns(5, [3, 1], [9, 0]) == [0, 0]  # it ends before the weights would not hold
    longer = turns(997, [0.62, 0.27, 0.11], [1000] * 3)
    assert all(longer[:n] == turns(n, [0.62, 0.27, 0.11], [1000] * 3) for n in (1, 7, 50, 400))


def test_names_and_weights(tmp_path, monkeypatch):
    assert read_parts(["imdb"]) == [("imdb", None)]
    assert read_parts(["imdb:0.7", "C:\\my.csv:3"]) == [("imdb", 0.7), ("C:\\my.csv", 3.0)]
    monkeypatch.chdir(tmp_path)
    labelled(tmp_path, "odd:5", 0, 2)
    assert read_parts(["odd:5"]) == [("odd:5", None)]  # that is its name
    notes = [{"name": "imdb", "weight": 1 / 3}, {"name": "b.csv", "weight": 1e-7}]
    assert [weight for _, weight in read_parts(names_of(notes))] == [1 / 3, 1e-7]


@pytest.mark.parametrize(
    "names, message",
    [
        (["a.jsonl:0.5", "b.jsonl"], "give each of them a weight, or none"),
        (["a.jsonl:0", "b.jsonl:1"], "weights must be above 0"),
        (["a.jsonl:0.5"], "a weight is a share beside others"),
        (["a.jsonl", "b.jsonl", "a.jsonl"], "a.jsonl is named twice"),
        (["a.jsonl", "talk.jsonl"], "a.jsonl holds labelled texts, talk.jsonl conversations; all parts"),
        (
            ["a.jsonl", "other.jsonl"],
            "a.jsonl has the answers bad, good, other.jsonl no, yes; all parts must",
        ),
        (["a.jsonl", "same.jsonl"], "same.jsonl: every row of it is in the others, too"),
        (["a.jsonl", "gone.jsonl"], "gone.jsonl: no such file"),
        ([], "name one, or several"),
    ],
)
def test_parts_that_do_not_fit_together(tmp_path, monkeypatch, names, message):
    monkeypatch.chdir(tmp_path)
    for name, start in (("a.jsonl", 0), ("b.jsonl", 10), ("same.jsonl", 4)):
        labelled(tmp_path, name, start, 10 if name != "same.jsonl" else 4)
    labelled(tmp_path, "other.jsonl", 50, 4, ("yes", "no"))
    (tmp_path / "talk.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UsageError, match=message):
        d.load_rows(tuple(names))


def test_joined_files_are_one_dataset_without_each_others_rows(tmp_path):
    names = labelled(tmp_path, "a.jsonl", 0, 30), labelled(tmp_path, "b.jsonl", 20, 30)  # 10 rows are in both
    found = d.load_rows(names)
    assert len(found.rows) == 50 and found.duplicates_removed == 10 and found.answers == ("bad", "good")
    train, held_out = d.split(found, 40, 10, seed=1)
    assert len(train) == 40 and len(held_out) == 10 and not texts(train) & texts(held_out)
    assert sum(row.label for row in train) == 20 and sum(row.label for row in held_out) == 5
    # as if it had been one file
    whole = labelled(tmp_path, "whole.jsonl", 0, 50)
    assert (train, held_out) == d.split(d.load_rows(whole), 40, 10, seed=1)


def test_a_mixture_gives_each_part_its_share_of_both_sides(tmp_path, capsys):
    a, b = labelled(tmp_path, "a.jsonl", 0, 100), labelled(tmp_path, "b.jsonl", 80, 100)
    found = d.load_rows((f"{a}:0.75", f"{b}:0.25"))  # 80 to 99 are in both, and are a's
    train, held_out = d.split(found, 40, 20, seed=1)
    assert (of(train, 0, 100), of(train, 100, 180)) == (30, 10)
    assert (of(held_out, 0, 100), of(held_out, 100, 180)) == (15, 5)
    assert not texts(train) & texts(held_out) and len(texts(train + held_out)) == 60
    assert of(train[:12], 0, 100) == 9  # also of the first few
    assert f"{b}: 10 rows to train on, 5 held out" in capsys.readouterr().err
    assert "75% file" in found.origin and "25% file" in found.origin
    # Held-out rows do not depend on --samples, and fewer of them are some of these.
    assert d.split(found, 4, 20, seed=1)[1] == held_out and d.split(found, 4, 8, seed=1)[1] == held_out[:8]
    assert d.split(found, 40, 20, seed=2)[1] != held_out


def test_a_share_of_more_rows_than_a_part_has(tmp_path, capsys):
    a, b = labelled(tmp_path, "a.jsonl", 0, 100), labelled(tmp_path, "b.jsonl", 100, 20)
    found = d.load_rows((f"{a}:0.5", f"{b}:0.5"))
    with pytest.raises(UsageError, match="--samples 50: with these weights 33 rows are there to train on"):
        d.split(found, 50, 8, seed=1)
    with pytest.raises(UsageError, match="--eval-samples 60: with these weights 41 rows can be held out"):
        d.split(found, 10, 60, seed=1)
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "two.jsonl").write_text(
        "".join(f'{{"prompt": "{i}", "completion": "b"}}\n' for i in range(9))
    )
    none = d.load_rows((f"{tmp_path}/one.jsonl:9", f"{tmp_path}/two.jsonl:1"))  # the one row is held out
    with pytest.raises(UsageError, match="--samples 1: with these weights 0 rows are there to train on"):
        d.split(none, None, None, seed=1)
    capsys.readouterr()
    train, held_out = d.split(found, None, None, seed=1)  # nothing was asked for: a fifth of 20 + 20
    assert len(held_out) == 8 and len(train) == 33 and of(train, 100, 120) == 16
    assert "few rows: 3" in capsys.readouterr().err


def test_an_adapter_of_a_mixture_is_scored_on_the_same_rows(tmp_path, capsys):
    a, b = labelled(tmp_path, "a.jsonl", 0, 100), labelled(tmp_path, "b.jsonl", 100, 60)
    names = (f"{a}:0.7", f"{b}:0.3")
    train, held_out = d.split(d.load_rows(names), 50, 20, seed=5)
    notes = {**d.identity(names), "seed": 5, "eval_samples": 20, "samples": 50}
    assert notes["name"] == " ".join(names) and [p["weight"] for p in notes["parts"]] == [0.7, 0.3]
    notes = json.loads(json.dumps(notes))
    assert d.held_out_rows(notes["name"], notes, None)[0] == held_out
    assert d.held_out_rows(notes["name"], notes, 6)[0] == held_out[:6]
    with pytest.raises(UsageError, match="training held out 20 rows"):
        d.held_out_rows(notes["name"], notes, 21)
    # Most rows of a part were trained on.
    with pytest.raises(UsageError, match="b.jsonl: a part of what this adapter was trained on"):
        d.held_out_rows(b, notes, None)
    other = labelled(tmp_path, "c.jsonl", 500, 12)
    assert len(d.held_out_rows(other, notes, None)[0]) == 11
    assert "has changed" not in capsys.readouterr().err
    labelled(tmp_path, "b.jsonl", 101, 60)
    d.held_out_rows(notes["name"], notes, None)
    assert "b.jsonl has changed since training" in capsys.readouterr().err
    assert d.identity((b,)).keys() == {"name", "sha256"} and d.identity("imdb") == {"name": "imdb"}


def test_parts_with_a_test_split_of_their_own(tmp_path, monkeypatch):
    train = {"text": [f"review {i}" for i in range(40)], "label": ["bad", "good"] * 20}
    test = {"text": [f"review {i}" for i in range(100, 120)], "label": ["bad", "good"] * 10}
    monkeypatch.setattr(d, "read_hub", lambda name, columns: (train, test))
    own = labelled(tmp_path, "own.jsonl", 90, 20)  # 10 of them are in the hub dataset's test split
    with pytest.raises(UsageError, match="somebody/x has a test split of its own, .*own.jsonl has none"):
        d.load_rows(("somebody/x", own))
    found = d.load_rows(("somebody/x:0.5", f"{own}:0.5"))
    train_rows, held_out = d.split(found, 20, 8, seed=1)
    assert of(held_out, 90, 110) == 4 == of(held_out, 110, 120)  # what both have is for training
    assert of(train_rows, 0, 40) == 10 and not texts(train_rows) & texts(held_out)


@pytest.mark.parametrize(
    "there, asked, drawn",
    [
        (3000, (None, None), (2000, 400)),
        (2400, (None, None), (2000, 400)),
        (2200, (None, None), (1800, 400)),
        (300, (None, None), (240, 60)),
        (12, (None, None), (10, 2)),
        (4, (None, None), (3, 1)),
        (300, (100, None), (100, 60)),
        (300, (290, None), (290, 10)),
        (300, (None, 100), (200, 100)),
        (300, (299, 1), (299, 1)),
    ],
)
def test_few_rows_are_no_error(tmp_path, capsys, there, asked, drawn):
    found = d.load_rows(labelled(tmp_path, "few.jsonl", 0, there))
    train, held_out = d.split(found, *asked, seed=3)
    assert (len(train), len(held_out)) == drawn and not texts(train) & texts(held_out)
    smaller = asked[0] is None and drawn[0] < 2000 or asked[1] is None and drawn[1] < 400
    told = f"few rows: {drawn[0]:,} to train on and {drawn[1]:,} held out (the defaults are 2,000 and 400)"
    assert (told in capsys.readouterr().err) == smaller
    assert held_out == d.split(found, 1, drawn[1], seed=3)[1]  # --evaluate finds them again


@pytest.mark.parametrize(
    "asked, message",
    [
        ((300, None), "--samples 300: at most 299 fit: one row at least is held out"),
        ((None, 300), "--eval-samples 300: the dataset has 300 different rows in all; some have to be left"),
        ((None, 301), "--eval-samples 301: the dataset has 300"),
        ((201, 100), "--samples 201: 200 different rows are left for training"),
    ],
)
def test_what_was_asked_for_is_never_changed(tmp_path, asked, message):
    found = d.load_rows(labelled(tmp_path, "few.jsonl", 0, 300))
    with pytest.raises(UsageError, match=message):
        d.split(found, *asked, seed=3)


def test_no_part_trains_on_a_prompt_that_another_holds_out(tmp_path, capsys):
    """Regression: prompts were compared inside a part only. And a run of that size is drawn again."""
    for name, count in (("a", 60), ("b", 50)):
        rows = [
            {"prompt": f"Film {i % 20}?", "chosen": f"{name} fine {i}", "rejected": f"{name} dull {i}"}
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names = [f"{tmp_path}/a.jsonl:0.5", f"{tmp_path}/b.jsonl:0.5"]
    found = d.load_rows(names)
    train, held_out = d.split(found, None, None, 42)
    assert train and held_out and not {row.asked for row in train} & {row.asked for row in held_out}
    assert "pairs share a prompt with a held-out one" in capsys.readouterr().err
    assert d.split(found, len(train), len(held_out), 42) == (train, held_out)
    with pytest.raises(UsageError, match=f"{len(train)} pairs are left for training"):
        d.split(found, len(train) + 1, len(held_out), 42)
