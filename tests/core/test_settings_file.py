"""--config run.yaml: what a file may hold, what wins, and that a run's own file repeats it."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import ROOT, SMALL_RUN, here

from config import DemoSettings, InferSettings, TrainSettings
from qlora.cli import UsageError, parse
from qlora.settings_file import NOT_WRITTEN, as_yaml, read_settings


@pytest.fixture
def file(tmp_path):
    """A function: text -> path of a file that holds it."""

    def write(text: str):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def train(*words) -> TrainSettings:
    return parse(TrainSettings, [str(word) for word in words], None)


def test_a_file_sets_and_flags_win(file):
    path = file("samples: 100\nlearning-rate: 5e-4\nlora_r: 8\ngradient_checkpointing: true\nlora_alpha:\n")
    s = train("--config", path, "--samples", 7, "--no-gradient-checkpointing")
    assert (s.samples, s.learning_rate, s.lora_r, s.gradient_checkpointing) == (7, 5e-4, 8, False)
    assert s.lora_alpha is None and s.epochs == TrainSettings.epochs
    assert train(f"--config={path}", "--lora_rank=4").lora_r == 4


def test_a_value_that_is_the_name_of_a_setting_is_no_flag(file):
    """Regression: --output-dir packing switched `packing` of the file off."""
    path = file("packing: true\n")
    assert train("--config", path, "--output-dir", "packing").packing
    assert not train("--config", path, "--no-packing").packing


def test_a_list_is_replaced_by_the_flag_not_added_to(file):
    path = file("adapter: [a, b]\nprompt: Hello\n")
    read = [parse(InferSettings, ["--config", str(path), *more], None) for more in ([], ["--adapter", "c"])]
    assert [s.adapter for s in read] == [("a", "b"), ("c",)] and read[0].prompt == "Hello"
    assert parse(DemoSettings, ["--config", str(file("compare: nf4\n"))], None).compare == ("nf4",)


@pytest.mark.parametrize(
    "text, line",
    [
        ("sampels: 5", "line 1: sampels: no such setting; did you mean samples?"),
        ("samples: many", "samples: many should be a valid integer"),
        ("samples: 1.5", "samples: 1.5 should be a valid integer"),
        ("epochs: yes", "epochs: true should be a number"),
        ("dataset: 2024", "dataset: 2024 should be a valid string; put it into quotes"),
        ("precision: nf5", "precision: nf5 should be 'auto'"),
        ("samples: 0", "line 1: samples: 0 must be from 1"),
        ("output_dir: 5", "line 1: output_dir: 5 should be a path"),
        ("seed: 1\nsamples: 5\nseed: 2", "seed stands there twice, in lines 1 and 3"),
        ("lora-r: 1\nlora_r: 2", "stands there twice"),
        ("lora_rank: 4\nr: 8", "line 2: r: lora_r is 4 already"),
        ("dataset:\n  name: imdb", "dataset: settings are flat"),
        ("dataset: [[a], b]", "dataset: settings are flat"),
        ("config: other.yaml", "config: no such setting"),
        ("- samples", "expected lines of `setting: value`"),
        ("samples", "expected lines of `setting: value`"),
        ("", "expected lines of `setting: value`"),
        ("a: 1\n---\nb: 2", "no YAML"),
        ("samples: [1", "line 1: no YAML"),
        ("\tsamples: 1", "no YAML"),
        ("model: !!python/object/apply:os.system [true]", "no YAML"),
        ("model: 2024-99-99", "no YAML"),
        ("[" * 3000, "no YAML|nested far too deep"),
        (b"model: \xff\xfe", "not text in UTF-8"),
        (b"#" * (1 << 21), "larger than 1 MB"),
        ("target_modules: lite\nlora_r: 8", "lite means r 32, --lora-r says 8"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(file, text, line):
    with pytest.raises(UsageError, match=line) as caught:
        train("--config", file(text))
    assert len(str(caught.value).splitlines()) == 1


def test_everything_that_is_wrong_is_told_at_once(file):
    with pytest.raises(UsageError, match="samples: a .*; line 2: seed: b .*; line 4: no_flag") as caught:
        train("--config", file("samples: a\nseed: b\nepochs: 2\nno_flag: 1\nseed: 2\n"))
    assert "seed stands there twice, in lines 2 and 5" in str(caught.value)


@pytest.mark.parametrize(
    "path, said", [("gone.yaml", "no such file; presets are in configs/"), (".", "a folder; name a file")]
)
def test_no_file(path, said):
    with pytest.raises(UsageError, match=said):
        train("--config", path)


def test_words_that_yaml_reads_as_something_else_survive(tmp_path):
    given = TrainSettings(dataset=("5e-4",), question="Yes: no?\n#1 – é", model="on", learning_rate=1e-5)
    (path := tmp_path / "config.yaml").write_text(as_yaml(given), encoding="utf-8")
    assert TrainSettings(**read_settings(path, TrainSettings)[0]) == given


def test_a_runs_own_file_repeats_it(tiny_folder, tmp_path):
    """Begun from a file; its own has every setting; --overwrite and --resume go by it."""
    given, out = tmp_path / "small.yaml", tmp_path / "run"
    given.write_text(f"model: {tiny_folder}\noutput-dir: {out}\nmax_steps: 2\nlora_rank: 4\n")
    done = here("qlora_finetune.py", "--config", given, *SMALL_RUN)
    assert done.returncode == 0, done.stderr
    written = out / "config.yaml"
    again = train("--config", written, "--output-dir", tmp_path / "other")
    assert again.lora_r == 4 and again.max_steps == 2 and again.samples == 16
    assert again.precision == "nf4"  # what `auto` stood for
    left_out = {*NOT_WRITTEN, "run_name"}
    names = {field.name for field in dataclasses.fields(TrainSettings)} - left_out
    assert set(read_settings(written, TrainSettings)[0]) == names
    done = here("qlora_finetune.py", "--config", written, "--resume")
    assert done.returncode == 0 and "nothing to do" in done.stderr
    done = here("qlora_finetune.py", "--config", written, "--resume", "--samples", 17)
    assert done.returncode == 2 and "--samples 16 -> 17" in done.stderr


PRESETS = ("imdb-cpu", "imdb-t4", "instructions", "long-context")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load(name):
    path = ROOT / "configs" / f"{name}.yaml"
    values, not_needed = read_settings(path, TrainSettings)
    assert values and not not_needed and str(values["output_dir"]) == name
    assert all(getattr(train("--config", path), key) == value for key, value in values.items())
    assert f"--config configs/{name}.yaml" in path.read_text()  # says how to use it


def test_every_preset_is_tested():
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == {*PRESETS, "fsdp_qlora"}
