"""--preview, and runs on few rows of several files: what is drawn, kept for --resume and found again."""

import json
import re
import shutil

import pytest
from conftest import here

from config import TrainSettings
from qlora.training import preview as p
from qlora.training.run_folder import SETTINGS, saved_settings

SMALL = ("--max-length", 64, "--batch-size", 4, "--lane", "fp32")


def written(tmp_path, name: str, rows: list[dict]) -> str:
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / name)


def reviews_of(tmp_path, name: str, start: int, count: int, words: int = 3) -> str:
    rows = [
        {"text": f"film {i}" + " so so" * words, "label": ("bad", "good")[i % 2]}
        for i in range(start, start + count)
    ]
    return written(tmp_path, name, rows)


def shown(*flags) -> str:
    done = here("qlora_finetune.py", "--preview", *flags, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "\ndtype " not in done.stderr, "it computes nothing"
    return done.stdout


def test_a_preview_shows_what_a_run_would_see_and_writes_nothing(tmp_path, tiny_folder):
    rows = [{"text": f"film {i}" + " so so" * i * 4, "label": i % 2} for i in range(20)]
    rows += [rows[0], {"text": None, "label": 1}, {"text": "no label", "label": None}]
    data, out = written(tmp_path, "rows.jsonl", rows), tmp_path / "out"
    before = sorted(tmp_path.iterdir())
    said = shown(
        "--model", tiny_folder, "--dataset", data, "--output-dir", out, "--epochs", 2, "--grad-accum", 3
    )
    assert sorted(tmp_path.iterdir()) == before
    assert "rows       16 to train on, 4 held out, of 20 different ones" in said
    lost = "left out 2 of 23 rows: no text (1, the first in row 22), no label (1, the first in row 23)"
    assert f"dropped    1 duplicates; {lost}" in said
    # "film 19" and 152 words do not fit into 64 tokens: the row is cut, and its own length is told.
    assert re.search(
        r"longest    64 tokens, 2 learned \(\+\), .*; cut at the text's beginning, whole it has \d+\n", said
    )
    assert re.search(r"shortest   \d+ tokens, 2 learned", said) and re.search(r"middle     \d+ tokens", said)
    assert "Which label fits: 0, 1?" in said and re.search(r"\+ [01]<\|im_end\|>\n", said)
    cut = int(re.search(r"cut        (\d+) of 16 rows", said)[1])
    above = (
        said.partition("--max-length 64\nlengths")[2]
        .partition("--max-length 64\n")[2]
        .partition("learned")[0]
    )
    assert (
        sum(int(re.search(r" (\d+)  #", line + "  #")[1]) for line in above.splitlines() if "to" in line)
        == cut
        > 0
    )
    assert "learned    32 of " in said
    assert "steps      4 (batches of 4, 3 to an update, --epochs 2)" in said  # 16 / 4 = 4 batches: 2 updates


def test_a_preview_of_text_and_of_conversations(tmp_path, tiny_folder):
    texts = written(tmp_path, "texts.jsonl", [{"text": f"line {i}" + " or so" * 6 * i} for i in range(12)])
    said = shown("--model", tiny_folder, "--dataset", texts, "--objective", "lm")
    assert "+ line" in said and "cut at the text's end, whole it has" in said
    talks = [{"prompt": f"ask {i}", "completion": "say so" + " again" * 12 * (i % 5)} for i in range(12)]
    said = shown("--model", tiny_folder, "--dataset", written(tmp_path, "talks.jsonl", talks))
    assert (
        re.search(r"skipped    [1-9] of 10 rows", said)
        and "+ say so<|im_end|>" in said
        and "cut at" not in said
    )


def test_a_histogram_marks_the_limit():
    assert p.histogram([60, 70, 300], 256) == [
        "        33 to 64       1  ########################################",
        "        65 to 96       1  ########################################",
        "       97 to 128       0",
        "      129 to 160       0",
        "      161 to 192       0",
        "      193 to 224       0",
        "      225 to 256       0",
        "---------------- --max-length 256",
        "      257 to 512       1  ########################################",
    ]
    assert p.histogram([9, 8, 10**6], 8)[-1].split()[:4] == ["65", "or", "more", "1"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tiny_folder):
    """A run on 60% of one file and 40% of another; nothing says how many rows."""
    folder = tmp_path_factory.mktemp("mixed")
    names = reviews_of(folder, "a.jsonl", 0, 40) + ":0.6", reviews_of(folder, "b.jsonl", 35, 35) + ":0.4"
    flags = ("--model", tiny_folder, "--dataset", *names, "--output-dir", folder / "run", *SMALL)
    done = here("qlora_finetune.py", *flags)
    assert done.returncode == 0, done.stderr
    return folder / "run", names, done.stderr


def read(path) -> dict:
    return json.loads(path.read_text())


def test_a_mixture_of_few_rows_is_trained_on_scored_and_found_again(mixed):
    out, names, said = mixed
    settings, notes, report = (
        read(out / SETTINGS),
        read(out / "qlora.json")["dataset"],
        read(out / "report.json"),
    )
    # b has 30 rows of its own. At most 40 / 0.6 rows keep to the weights, of which a fifth is held out.
    assert "few rows: 54 to train on and 13 held out" in said
    assert settings["dataset"] == list(names) and (settings["samples"], settings["eval_samples"]) == (54, 13)
    assert [part["weight"] for part in notes["parts"]] == [0.6, 0.4] and notes["eval_samples"] == 13
    assert report["settings"]["dataset"] == " ".join(names) == notes["name"]
    assert report["train"]["steps"] == 14 == p.steps(54, TrainSettings(batch_size=4))
    done = here("qlora_inference.py", "--adapter", out, "--evaluate")
    assert done.returncode == 0 and "13 held-out rows" in done.stderr, done.stderr
    assert f"{100 * report['evaluation']['tuned']['accuracy']:.1f}%" in done.stdout


def test_a_run_on_several_files_is_resumed(mixed, tmp_path):
    out = shutil.copytree(mixed[0], tmp_path / "run")
    weights = (out / "adapter_model.safetensors").read_bytes()
    (out / "report.json").unlink()
    done = here("qlora_finetune.py", "--output-dir", out, "--resume", "--dataset", "imdb")
    assert done.returncode == 2 and "began with other settings (--dataset" in done.stderr
    done = here("qlora_finetune.py", "--output-dir", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert (out / "adapter_model.safetensors").read_bytes() == weights
    assert read(out / SETTINGS) == read(mixed[0] / SETTINGS)


def test_settings_of_one_dataset_are_kept_as_ever(trained):
    # An older version wrote a word, not a list, and reads only that.
    assert (
        read(trained / SETTINGS)["dataset"] == "imdb" == read(trained / "report.json")["settings"]["dataset"]
    )
    assert read(trained / "qlora.json")["dataset"] == {
        "name": "imdb",
        "seed": 42,
        "eval_samples": 8,
        "samples": 16,
    }
    saved = saved_settings(trained, TrainSettings)
    assert saved.dataset == ("imdb",) and saved.samples == 16
