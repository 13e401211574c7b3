"""--answers: a file of prompts becomes a file of answers, which a killed run goes on with."""

import csv
import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import here

from qlora import adapters, answers, evaluation, prompts
from qlora.prompt_files import read_table

SCRIPT = "qlora_inference.py"
TEXTS = [
    f'Film {i} is {"dull" if i % 3 else "fine"}, says "the {"very " * i}critic".\nReally.' for i in range(19)
]
TEXTS[4] = TEXTS[11] = ""


@pytest.fixture(scope="module")
def loaded(trained):
    """(model, base) of the run, with the products that it was trained with."""
    return adapters.load_trained(adapters.read_adapter(trained), lane="fp32")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Nineteen rows with quotes and line breaks, two of them without text."""
    path = tmp_path_factory.mktemp("prompts") / "reviews.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [("id", "label", "text"), *((f"0{i}", i % 2, t) for i, t in enumerate(TEXTS))]
        )
    return path


def ask(adapter, prompts_file, out, *flags):
    flags = ("--adapter", adapter, "--lane", "fp32", "--batch-size", 1, *flags)
    return here(SCRIPT, *flags, "--prompts", prompts_file, "--answers", out)


@pytest.fixture(scope="module")
def answered(trained, table):
    """The answers of a run that was never stopped, in three batches of eight rows."""
    out = table.with_name("whole.csv")
    done = ask(trained, table, out)
    assert done.returncode == 0, done.stderr
    assert "2 of 19 rows have no answer: no text (2, the first in row 5)" in done.stderr
    return out


def test_rows_are_kept_and_get_label_probabilities_and_answer(trained, loaded, table, answered):
    given, made = (pd.read_csv(path, dtype=str, keep_default_na=False) for path in (table, answered))
    assert list(made) == ["id", "label", "text", "predicted_label", "p_Negative", "p_Positive", "answer"]
    assert made[list(given)].equals(given)
    (model, base), prompt = loaded, adapters.read_adapter(trained).prompt
    asked = [i for i, text in enumerate(TEXTS) if text]
    ids = [prompts.sentiment_prompt(base.tokenizer, prompt, TEXTS[i]) for i in asked]
    scores = np.exp(evaluation.score_answers(base, model, prompt, ids, "here"))
    wanted = scores / scores.sum(1, keepdims=True)
    found = made.iloc[asked]
    np.testing.assert_allclose(found[["p_Negative", "p_Positive"]].astype(float), wanted, atol=1e-5)
    assert list(found["predicted_label"]) == [prompt.answers[i] for i in wanted.argmax(1)]
    assert (found["answer"] == found["predicted_label"]).all()
    assert (made.iloc[[4, 11], 3:] == "").all(axis=None)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.61, 0.999])
def test_a_stopped_run_goes_on_to_the_same_bytes(trained, table, answered, tmp_path, share, monkeypatch):
    whole, out = answered.read_bytes(), tmp_path / "out.csv"
    out.write_bytes(whole[: int(share * len(whole))])
    shutil.copy(answers.record_of(answered), answers.record_of(out))
    rows, score = [], evaluation.score_labels
    monkeypatch.setattr(
        evaluation, "score_labels", lambda m, ids, *rest: rows.extend(ids) or score(m, ids, *rest)
    )
    done = ask(trained, table, out)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == whole
    there = {0.61: 7, 0.999: 14}.get(share, 0)  # rows with text of the batches that were whole
    assert len(rows) == 17 - there
    assert "nothing to do" in ask(trained, table, out).stderr


def test_ctrl_c_says_how_much_is_there(trained, table, answered, tmp_path, monkeypatch):
    out, score, calls = tmp_path / "out.csv", evaluation.score_labels, []

    def stop_in_the_second(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*given)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "score_labels", stop_in_the_second)
        done = ask(trained, table, out)
    assert done.returncode == 130 and "stopped: 8 of 19 rows are in" in done.stderr
    assert answered.read_bytes().startswith(out.read_bytes())
    assert ask(trained, table, out).returncode == 0 and out.read_bytes() == answered.read_bytes()


def test_a_row_that_was_cut_anywhere_is_seen():
    rows = [["a", "b"], ['He said "no".\n', "1"], ["", ""], ["x\r\ny\rz", "ä"], [",\n\n", '"'], ["", "end"]]
    text, ends = io.StringIO(), []
    for row in rows:
        csv.writer(text, lineterminator="\n").writerow(row)
        ends.append(len(text.getvalue().encode()))
    data = text.getvalue().encode()
    for cut in range(len(data) + 1):
        assert answers.row_ends(data[:cut], True) == [end for end in ends if end <= cut]
    assert answers.row_ends(b'{"a": 1}\n{"a"', False) == [9]


def test_an_answer_file_of_something_else_is_refused(trained, table, answered, tmp_path):
    def refused(code, *flags, prompts_file=table, out=answered, adapter=trained):
        before = out.read_bytes() if out.exists() else None
        done = ask(adapter, prompts_file, out, *flags)
        assert done.returncode == code and done.stderr.count("\n") == 1, done.stderr
        assert (out.read_bytes() if out.exists() else None) == before
        return done.stderr

    other = tmp_path / "other.csv"
    other.write_text("text\nA film.\n")
    assert "begun with another --prompts, --columns" in refused(2, prompts_file=other)
    assert "begun with another --batch-size" in refused(2, "--batch-size", 2)
    again = shutil.copytree(trained, tmp_path / "again", ignore=lambda *_: ["complete.json", ".lock"])
    notes = json.loads((again / "qlora.json").read_text())
    (again / "qlora.json").write_text(json.dumps(notes))
    done = ask(again, table, answered)
    assert done.returncode == 2 and "begun with another --adapter" in done.stderr
    foreign = tmp_path / "foreign.csv"
    foreign.write_text("mine\n")
    assert "a file of other origin is there" in refused(2, out=foreign)
    edited = tmp_path / "edited.csv"
    edited.write_bytes(answered.read_bytes().replace(b"Film 2", b"Film two"))
    shutil.copy(answers.record_of(answered), answers.record_of(edited))
    assert "row 3 is not row 3 of the input" in refused(1, out=edited)
    assert "ends in .csv or .jsonl" in refused(2, out=tmp_path / "out.txt")
    assert "that is --prompts" in refused(2, out=table)
    assert "there is no folder" in refused(2, out=tmp_path / "no" / "out.csv")
    columns = tmp_path / "columns.csv"
    columns.write_text("a,b\n1,2\n")
    found = refused(2, prompts_file=columns, out=tmp_path / "new.csv")
    assert "found the columns 'a', 'b'; expected one called text or review" in found
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{\n")
    assert "not readable as jsonl (line 1" in refused(2, prompts_file=broken, out=tmp_path / "new.csv")


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--answers", "a.csv"), "name the file of --prompts"),
        (("--prompts", "{}"), "for a data file add --answers"),
        (("--prompts", "{}", "--answers", "a.csv", "--compare"), "without --compare"),
    ],
)
def test_flags_that_do_not_go_together(table, flags, said):
    done = here(SCRIPT, *(flag.format(table) for flag in flags))
    assert done.returncode == 2 and said in done.stderr


def test_free_answers_in_json_lines(trained, tmp_path):
    # Half a character is legal in JSON: the row is kept as it is, and not answered.
    rows = [
        {"prompt": "Hello", "n": 1.5},
        {"prompt": "\ud83d", "n": [1]},
        {"n": None},
        {"prompt": 7, "more": "ü"},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = ask(trained, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--plain", "--max-new-tokens", 2)
    assert done.returncode == 0, done.stderr
    made = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if v is not None and k != "answer"} for row in made] == [
        {k: v for k, v in row.items() if v is not None} for row in rows
    ]
    assert [bool(row["answer"]) for row in made] == [True, False, False, True] and list(made[0])[
        -1
    ] == "answer"
    assert (
        "a prompt that is no UTF-8 (1, the first in row 2), no prompt (1, the first in row 3)" in done.stderr
    )


def test_columns_and_plain_text(tmp_path):
    pd.DataFrame({"review": ["Good.", None], "text_id": [1, 2]}).to_parquet(tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet").texts == ["Good.", None]
    (tmp_path / "a.csv").write_text("anything\nA film.\n")  # the only column
    assert read_table(tmp_path / "a.csv").texts == ["A film."]
    (tmp_path / "b.csv").write_text("text,body\nno,A film.\n")
    assert read_table(tmp_path / "b.csv", ("text=body",)).texts == ["A film."]
    (tmp_path / "c.csv").write_text("instruction,input\nAdd.,1 and 2\nSing.,\n")
    assert read_table(tmp_path / "c.csv").texts == ["Add.\n\n1 and 2", "Sing."]
    (tmp_path / "lines.txt").write_text("One.\n\nThree.\n")
    lines = read_table(tmp_path / "lines.txt")
    assert lines.rows == [(1, "One."), (2, ""), (3, "Three.")] and lines.texts == ["One.", None, "Three."]
