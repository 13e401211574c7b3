"""Rows: formats, duplicates, the split, batches."""

import hashlib
import json

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest

from qlora import batches as b
from qlora import data as d
from qlora.cli import UsageError


def write(tmp_path, name, rows):
    path = tmp_path / name
    table = pd.DataFrame(rows)
    {
        "csv": lambda: table.to_csv(path, index=False),
        "jsonl": lambda: table.to_json(path, orient="records", lines=True),
        "parquet": lambda: table.to_parquet(path),
    }[path.suffix[1:]]()
    return str(path)


LABELLED = [{"text": f"review number {i}", "label": i % 2} for i in range(20)]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_each_file_kind_gives_the_same_rows(tmp_path, ending):
    found = d.load_rows(write(tmp_path, f"rows.{ending}", LABELLED))
    assert found.kind == "labels" and found.answers == ("0", "1") and len(found.rows) == 20


def test_labels_of_ones_own_become_the_answers(tmp_path):
    rows = [{"text": f"t{i}", "label": ("sport", "news", "art")[i % 3]} for i in range(9)]
    found = d.load_rows(write(tmp_path, "own.csv", rows))
    assert found.answers == ("art", "news", "sport") and found.answers[found.rows[0].label] == "sport"


@pytest.mark.parametrize("columns", [("prompt", "completion"), ("instruction", "response")])
def test_pairs_become_conversations(tmp_path, columns):
    found = d.load_rows(
        write(tmp_path, "pairs.jsonl", [dict(zip(columns, (f"ask {i}", f"say {i}"))) for i in range(3)])
    )
    assert found.kind == "chat"
    assert found.rows[1].messages == (
        {"role": "user", "content": "ask 1"},
        {"role": "assistant", "content": "say 1"},
    )


def test_messages_and_text_alone(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert d.load_rows(write(tmp_path, "talks.jsonl", [{"messages": talk}])).rows[0].messages == tuple(talk)
    assert d.load_rows(write(tmp_path, "plain.csv", [{"text": "some words"}])).kind == "text"


def test_one_missing_label_does_not_rename_the_others(tmp_path):
    # pandas reads 1, 0 and a blank as 1.0, 0.0 and NaN; the answers would become "1.0" and "0.0"
    (tmp_path / "gap.csv").write_text("text,label\na film,1\nb film,0\nc film,\n")
    found = d.load_rows(str(tmp_path / "gap.csv"))
    assert found.answers == ("0", "1") and [r.label for r in found.rows] == [1, 0]


def test_duplicates_go_before_the_split(tmp_path):
    # 20 different texts, 5 of them twice (once with spaces and HTML breaks around)
    rows = LABELLED + [{"text": f" review number {i}<br />", "label": i % 2} for i in range(5)]
    found = d.load_rows(write(tmp_path, "twice.csv", rows))
    assert len(found.rows) == 20 and found.duplicates_removed == 5


def test_split_is_even_disjoint_and_repeatable(tmp_path):
    found = d.load_rows(write(tmp_path, "rows.csv", LABELLED))
    train, held_out = d.split(found, 10, 6, seed=1)
    assert sum(r.label for r in train) == 5 and sum(r.label for r in held_out) == 3
    assert not {r.text for r in train} & {r.text for r in held_out}
    assert d.split(found, 10, 6, seed=1) == (train, held_out)
    # Held-out rows do not depend on --samples: runs of different size are scored on the same exam.
    assert d.split(found, 2, 6, seed=1)[1] == held_out
    assert d.split(found, 10, 6, seed=2)[1] != held_out


def test_more_rows_than_there_are(tmp_path):
    found = d.load_rows(write(tmp_path, "rows.csv", LABELLED))
    with pytest.raises(UsageError, match="--samples 15: 14 different rows are left"):
        d.split(found, 15, 6, seed=1)
    with pytest.raises(UsageError, match="--eval-samples 50"):
        d.split(found, 1, 50, seed=1)


def test_conversations_that_can_not_be_trained_on_are_skipped_with_a_note(tmp_path, capsys):
    good = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = [
        {"messages": talk}
        for talk in (
            good,
            good[::-1],
            [{"role": "user", "content": "again"}, {"role": "assistant", "content": None}],
            [{"role": "user", "content": "hi"}, {"role": "gpt", "content": "no known role"}],
        )
    ]
    found = d.load_rows(write(tmp_path, "talks.jsonl", rows))
    assert [row.messages for row in found.rows] == [tuple(good)]
    said = capsys.readouterr().err
    assert "left out 3 of 4 rows: a reply before the user's first message (1, the first in row 2), " in said
    with pytest.raises(UsageError, match="no reply .role assistant; found user, gpt"):
        d.load_rows(write(tmp_path, "others.jsonl", rows[3:]))


def test_a_hub_datasets_own_test_split_is_the_exam(monkeypatch):
    train = {
        "text": ["a fine film", "a dull film", "so so", "unlabelled"],
        "label": ["pos", "neg", "pos", None],
    }
    test = {"text": ["a dull film ", "great", "bad", "great"], "label": ["neg", "pos", "neg", "pos"]}
    monkeypatch.setattr(d, "read_hub", lambda name, columns: (train, test))
    found = d.load_rows("somebody/imdb")
    # A row of the test split that is a training row as well, and one that is there twice, are left out.
    assert (
        [row.text for row in found.held_out] == ["great", "bad"]
        and len(found.rows) == 3
        and found.duplicates_removed == 2
    )
    assert "its own test split" in found.origin and found.answers == ("Negative", "Positive")
    train_rows, held_out = d.split(found, 2, 2, seed=1)
    assert {row.text for row in held_out} == {"great", "bad"} and {row.text for row in train_rows} < {
        row.text for row in found.rows
    }


def test_a_hub_datasets_numbered_labels_get_their_names(monkeypatch, capsys):
    import datasets

    def part(names, ids):
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        )
        table = pyarrow.table({"text": [f"text {i}" for i in range(len(ids))], "label": ids})
        return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))

    parts = {
        "train": part(["world", "sport"], [0, 1, -1, 7, None]),
        "test": part(["world", "sport"], [-1] * 2),
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(parts))
    found = d.load_rows("somebody/news")
    assert found.answers == ("sport", "world") and [row.label for row in found.rows] == [1, 0]
    assert found.held_out == []  # the answers of its test split are not published
    assert "left out 5 of 7 rows: no label (5, the first in row 3)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "names, packaged, answers",
    [
        (["neg", "pos"], False, ("Negative", "Positive")),
        (["Negative", "Positive"], False, ("Negative", "Positive")),
        ([0, 1], True, ("Negative", "Positive")),
        ([0, 1], False, ("0", "1")),  # of a file they may be about anything, spam say
        (["ham", "spam"], False, ("ham", "spam")),
    ],
)
def test_only_labels_that_are_verdicts_answer_negative_and_positive(names, packaged, answers):
    assert d.answer_names(names, packaged) == answers


def test_a_run_of_an_older_version_keeps_its_answers(tmp_path):
    # it asked the reviews' question of any 0 and 1, and took a file's neg and pos for names like others
    def earlier(labels):
        rows = [{"text": f"t{i}", "label": labels[i % 2]} for i in range(4)]
        return d.earlier_answers(d.load_rows(write(tmp_path, "old.csv", rows)))

    assert earlier((0, 1)) == ("Negative", "Positive") and earlier(("neg", "pos")) == ("neg", "pos")
    assert d.earlier_answers(d.load_rows("imdb")) == ("Negative", "Positive")


def test_rows_that_an_older_adapter_held_out(tmp_path):
    # its qlora.json has no eval_samples: training held out the default number
    path = write(tmp_path, "rows.csv", [{"text": f"t{i}", "label": i % 2} for i in range(900)])
    trained = {"name": path, "seed": 1}
    assert len(d.held_out_rows(path, trained, None)[0]) == 400
    with pytest.raises(UsageError, match="held out 400 rows .*the next ones were trained on"):
        d.held_out_rows(path, trained, 401)
    assert len(d.held_out_rows(path, {"seed": 1}, 401)[0]) == 401  # the base was trained on none of them


def test_text_is_cleaned_where_it_comes_in(tmp_path):
    # once only the model's prompts were, and the bag of words counted "br"
    rows = [{"text": f" one<br /><br />two {i}", "label": i % 2} for i in range(4)]
    found = d.load_rows(write(tmp_path, "html.csv", rows))
    assert found.rows[0].text == "one\n\ntwo 0"


def test_imdb_is_what_the_readme_says():
    found = d.load_rows("imdb")
    assert len(found.rows) + found.duplicates_removed == 25_000
    assert found.answers == ("Negative", "Positive")


def test_batches_by_length_cover_every_row_once_with_little_padding():
    generator = __import__("random").Random(0)
    lengths = [generator.randint(30, 190) for _ in range(403)]
    sampler = b.LengthBatches(lengths, 8, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(403))
    batches = [order[i : i + 8] for i in range(0, 403, 8)]
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert padded / sum(lengths) < 1.05  # random batches would pad by about a half
    assert max(lengths) in [lengths[i] for i in batches[0]]  # what does not fit fails in the first step
    assert list(sampler) == order
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_padding_is_masked_by_position():
    # The pad token is the end token here, as in the bundled model: the real end must stay supervised.
    batch = b.collate(
        [{"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}, {"input_ids": [7, 2], "labels": [7, 2]}], pad_id=2
    )
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 2], [7, 2, -100]]
    assert batch["real_tokens"] == 5


# --- nothing lost or misread without a word ---


def lines(tmp_path, name, *rows) -> str:
    """A file of such lines; objects are written as JSON."""
    path = tmp_path / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def labelled(tmp_path, *labels):
    """What load_rows makes of a JSONL with these labels."""
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    return d.load_rows(lines(tmp_path, "labels.jsonl", *rows))


def read_back(found: d.RowSet) -> list[tuple[str, str]]:
    return [(row.text, found.answers[row.label]) for row in found.rows]


def sha256(rows) -> str:
    return hashlib.sha256(json.dumps([[row.text, row.label] for row in rows]).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    "labels, trained, held_out",
    [
        (["0", "1"], "f58f3b69908ee3ee", "43071899ced1caf1"),
        (["0", "1", ""], "863793afea0a4b69", "47dac98567a331d4"),
        (["0.0", "1.0", ""], "863793afea0a4b69", "47dac98567a331d4"),
        (["pos", "neg"], "caa859b79f4ab633", "7cc80860cd1623b8"),
    ],
)
def test_a_csv_is_split_as_ever(tmp_path, labels, trained, held_out):
    # Written down when pandas read the files: adapters of that time are scored on rows that they did not see.
    rows = [f'"He said ""fine"" to film {i}, twice<br />",{labels[i % len(labels)]}' for i in range(20)]
    train, kept = d.split(d.load_rows(lines(tmp_path, "rows.csv", "text,label", *rows)), 4, 4, seed=7)
    assert (sha256(train), sha256(kept)) == (trained, held_out)


def test_the_bundled_datasets_are_split_as_ever():
    def of(name):
        return [sha256(rows) for rows in d.split(d.load_rows(name), 24, 8, seed=42)]

    assert of("imdb") == ["b6a2cdcfe0a2e6bb", "c832cf1dc7b47dc1"]
    assert of("rotten_tomatoes") == ["272a9cc1ef8a149a", "d4bf4ab9946e4d62"]


def test_words_for_missing_values_are_words(tmp_path, capsys):
    # pandas took them for missing: three classes became two, and a review "NA" was dropped
    words = ["NA", "None", "null", "nan"]
    rows = [f"{word},{word}" for word in words]
    found = d.load_rows(lines(tmp_path, "words.csv", "text,label", *rows, ",null", "a text,", '"",""'))
    assert read_back(found) == [(word, word) for word in words]
    said = capsys.readouterr().err
    assert "left out 3 of 7 rows: no label (2, the first in row 6), no text (1, the first in row 5)" in said
    assert "null is read as a label like others; where none is known, leave it empty" in said
    assert labelled(tmp_path, "null", None, "NA", float("nan")).answers == ("NA", "null")
    found = d.load_rows(write(tmp_path, "words.parquet", [{"text": w, "label": w} for w in (*words, None)]))
    assert read_back(found) == [(word, word) for word in words]


def test_labels_keep_their_zeros(tmp_path):
    # 01 became 1; pandas guesses numbers in JSON strings, too
    rows = [f"text {i},{label}" for i, label in enumerate(("01", "1", "10"))]
    assert d.load_rows(lines(tmp_path, "zeros.csv", "text,label", *rows)).answers == ("01", "1", "10")
    assert labelled(tmp_path, "01", "02").answers == ("01", "02")
    # but versions are no whole numbers, and whole numbers have no fraction
    rows = [f"text {i},{label}" for i, label in enumerate(("1.0", "1.1"))]
    assert d.load_rows(lines(tmp_path, "versions.csv", "text,label", *rows)).answers == ("1.0", "1.1")


def test_one_label_in_several_spellings_is_one_class(tmp_path, capsys):
    found = labelled(tmp_path, 1, "1", 0, " 0", 1.0)
    assert found.answers == ("0", "1") and [row.label for row in found.rows] == [1, 1, 0, 0, 1]
    said = capsys.readouterr().err.splitlines()
    assert said == ["note       read as one label: 0, ' 0'", "note       read as one label: 1, '1', 1.0"]
    path = lines(tmp_path, "spaces.csv", "text,label", "a, pos", "b,pos", "c,neg")
    assert d.load_rows(path).answers == ("Negative", "Positive")


@pytest.mark.parametrize(
    "labels, answers",
    [
        ([1e300, 0], ("0", "1e+300")),  # was a traceback
        ([float("inf"), 0.5], ("0.5", "inf")),
        ([10**400, 2], ("1" + "0" * 400, "2")),
        ([True, False, "True"], ("False", "True")),
        ([-1, 0, 1, -1.0], ("0", "1")),
        ([2**60 + 1, 2**60, None], (str(2**60), str(2**60 + 1))),  # pandas made one float of them
    ],
)
def test_odd_numbers_as_labels(tmp_path, labels, answers):
    assert labelled(tmp_path, *labels).answers == answers


def test_conversational_prompts_and_completions(tmp_path):
    # TRL's format; training saw "[{'role': 'user', …"
    ask, say = [{"role": "user", "content": "ask"}], [{"role": "assistant", "content": "say"}]
    rows = [
        {"prompt": ask, "completion": say},
        {"prompt": [{"role": "system", "content": "Be kind."}, *ask], "completion": "say"},
    ]
    for name in ("pairs.jsonl", "pairs.parquet"):
        found = d.load_rows(write(tmp_path, name, rows[:1]))
        assert [row.messages for row in found.rows] == [(*ask, *say)]
    found = d.load_rows(lines(tmp_path, "both.jsonl", *rows))
    assert found.rows[1].messages == ({"role": "system", "content": "Be kind."}, *ask, *say)


def test_messages_as_json_in_a_text_column(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = d.load_rows(write(tmp_path, "talks.csv", [{"messages": json.dumps(talk)}]))
    assert found.rows[0].messages == tuple(talk)


def test_bytes_are_text_in_utf8(tmp_path, capsys):
    # training saw "b'…'"
    cells = pyarrow.array(["schön".encode(), b"\xff\xfe", b"b"], pyarrow.binary())
    path = tmp_path / "bytes.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": cells}), path)
    assert [row.text for row in d.load_rows(str(path)).rows] == ["schön", "b"]
    assert "left out 1 of 3 rows: a text that is no UTF-8 (1, the first in row 2)" in capsys.readouterr().err


def test_what_is_no_text_is_never_written_out_as_python_does(tmp_path, capsys):
    rows = [{"text": value} for value in (["a"], {"a": 1}, "\ud83d", 5, 2.0, "word", None, " ")]
    assert [row.text for row in d.load_rows(lines(tmp_path, "odd.jsonl", *rows)).rows] == ["5", "2", "word"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "left out 5 of 8 rows: " in said
    for reason in (
        "a list as text (1, ",
        "a dict as text (1, ",
        "no text (2, ",
        "a text that is no UTF-8 (1, ",
    ):
        assert reason in said
    pairs = [{"prompt": {"a": 1}, "completion": "b"}, {"prompt": "a", "completion": "b"}]
    assert len(d.load_rows(lines(tmp_path, "odd.jsonl", *pairs)).rows) == 1
    assert "a dict as prompt (1, the first in row 1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "talk, reason",
    [
        (None, "messages that are no list of {role, content}"),
        ([["user", "hi"]], "messages that are no list of {role, content}"),
        ("[" * 100_000, "messages that are no list of {role, content}"),
        (["say", {"role": ["assistant"]}], "found user, assistant, ['assistant']"),
        (["say", {"role": None}], "a role other than system, developer, user"),
        (["say", {"role": "user<|im_end|>"}], "a role other than"),
        ([{"content": ["parts"]}], "a content that is no text"),
        ([{"content": "\ud83d"}], "a content that is no text"),
        ([{"content": " "}], "an empty reply"),
        ([{"content": "", "tool_calls": [{"id": "f"}]}], "tool calls that are no list of functions"),
    ],
)
def test_conversations_that_can_not_be_read(tmp_path, capsys, talk, reason):
    good = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    if isinstance(talk, list) and not isinstance(talk[0], list):  # changes of a good conversation
        talk = [*good[:1], *({**good[1], **(turn if isinstance(turn, dict) else {})} for turn in talk)]
    found = d.load_rows(lines(tmp_path, "talks.jsonl", {"messages": good}, {"messages": talk}))
    assert len(found.rows) == 1
    said = capsys.readouterr().err
    assert "left out 1 of 2 rows: " in said and reason in said and "(1, the first in row 2)" in said


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    path = tmp_path / name
    write(tmp_path, name, LABELLED)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(d.load_rows(str(path)).rows) == 20
