"""Rows: formats, duplicates, the split, batches."""

import pandas as pd
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
    assert "skipped 3 of 4 conversations; the first has a reply before the user's" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no reply .role assistant; found user, gpt"):
        d.load_rows(write(tmp_path, "others.jsonl", rows[3:]))


def test_a_hub_datasets_own_test_split_is_the_exam(monkeypatch):
    import pandas as pd

    train = pd.DataFrame(
        {"text": ["a fine film", "a dull film", "so so", "unlabelled"], "label": ["pos", "neg", "pos", None]}
    )
    test = pd.DataFrame(
        {"text": ["a dull film ", "great", "bad", "great"], "label": ["neg", "pos", "neg", "pos"]}
    )
    monkeypatch.setattr(d, "read_hub", lambda name: (train, test))
    found = d.load_rows("somebody/imdb")
    # A row of the test split that is a training row as well, and one that is there twice, are left out.
    assert (
        [row.text for row in found.held_out] == ["great", "bad"]
        and len(found.rows) == 3
        and found.duplicates_removed == 1
    )
    assert "its own test split" in found.origin and found.answers == ("Negative", "Positive")
    train_rows, held_out = d.split(found, 2, 2, seed=1)
    assert {row.text for row in held_out} == {"great", "bad"} and {row.text for row in train_rows} < {
        row.text for row in found.rows
    }


def test_a_hub_datasets_numbered_labels_get_their_names():
    import datasets

    def part(names):
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        )
        return datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, -1]}, features=features)

    assert d.named_labels(part(["world", "sport"]))["label"].tolist()[:2] == ["world", "sport"]
    assert d.named_labels(part(["neg", "pos"]))["label"].tolist()[:2] == ["neg", "pos"]


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
