"""The notebook is what its script makes, its commands are the scripts', and it runs on the bundled model."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace

import notebook_run
import pytest
from conftest import ROOT
from flag_tables import load
from IPython.core.inputtransformer2 import TransformerManager

import config
from qlora.cli import parse

CELLS = {cell.id: cell.source for cell in notebook_run.read().cells}
SETTINGS = {
    "quant_llama32_4bit_lora.py": config.DemoSettings,
    "qlora_finetune.py": config.TrainSettings,
    "qlora_inference.py": config.InferSettings,
    "llama.cpp/export.py": load(ROOT / "llama.cpp" / "settings.py").ExportSettings,
    "llama.cpp/source.py": None,  # has no flags here
}
BUILT = (ROOT / "llama.cpp" / "build" / "bin" / "llama-quantize").exists()


def run_cells(*names: str, **given) -> tuple[dict, list[str]]:
    """(variables, commands) of cells run here, whose commands are written down instead of being run."""
    variables, commands = dict(given), []

    def system(line: str) -> None:
        commands.append(eval(f"f{line!r}", variables))  # fills in {NAME}, as IPython does
        variables["_exit_code"] = 0

    variables["get_ipython"] = lambda: SimpleNamespace(system=system)
    for name in names:
        exec(TransformerManager().transform_cell(CELLS[name]), variables)
        variables |= given if name == "settings" else {}
    return variables, commands


def test_committed_notebook_is_what_its_script_makes():
    done = subprocess.run([sys.executable, ROOT / "notebooks" / "make_notebook.py", "--check"])
    assert done.returncode == 0


def test_commands_have_known_flags():
    values = run_cells("settings", MODEL="smollm2-135m", quoted="'A review.'", SAMPLES=1000)[0]
    values |= {"EVAL_SAMPLES": 200, "MAX_LENGTH": 256}
    named = set()
    for line in re.findall(r"^\s*!python (\S+\.py.*)$", "\n".join(CELLS.values()).replace("\\\n", " "), re.M):
        program, *flags = shlex.split(eval(f"f{line!r}", values))
        named.add(program)
        assert (ROOT / program).is_file()
        if SETTINGS[program]:
            parse(SETTINGS[program], flags, None)
    assert named == set(SETTINGS)


def test_no_figure_is_claimed_for_a_gpu():
    times = re.findall(r"[^.]*\b\d[\d.]* (?:seconds|minutes)[^.]*\.", "\n".join(CELLS.values()))
    assert times and not [text for text in times if "T4" in text and "measured" not in text]


def installed(patch, **versions) -> None:
    """Only these packages are installed."""

    def version(name):
        if versions.get(name) is None:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    patch.setattr(metadata, "version", version)


@pytest.fixture
def pins(monkeypatch) -> dict[str, str]:
    monkeypatch.chdir(ROOT)
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    return dict(line.split("==") for line in lines if "==" in line)


def test_nothing_is_installed_where_all_is_there(monkeypatch, pins):
    installed(monkeypatch, **pins | {"torch": "2.13.0+cpu"})
    assert run_cells("repository", "packages", WORK="models", REPOSITORY="")[1] == []


def test_the_installed_torch_stays(monkeypatch, pins):
    installed(monkeypatch, **pins | {"torch": "2.9.1+cu126", "transformers": "4.57.0"})
    (command,) = run_cells("repository", "packages", WORK="models", REPOSITORY="")[1]
    assert f" torch==2.9.1+cu126 transformers=={pins['transformers']} " in command


def test_torch_is_installed_where_there_is_none(monkeypatch, pins):
    installed(monkeypatch, numpy=pins["numpy"])
    with pytest.raises(metadata.PackageNotFoundError):  # the last line asks for it: pip was not run here
        run_cells("repository", "packages", WORK="models", REPOSITORY="")


def test_a_torch_outside_the_tested_range_is_told(monkeypatch, pins, capsys):
    installed(monkeypatch, **pins | {"torch": "2.5.1"})
    with pytest.raises(AssertionError, match="torch 2.5.1: 2.6.0 or newer is needed"):
        run_cells("repository", "packages", WORK="models", REPOSITORY="")
    installed(monkeypatch, **pins | {"torch": "9.0.0"})
    run_cells("repository", "packages", WORK="models", REPOSITORY="")
    assert "torch 9.0.0 is newer than" in capsys.readouterr().out


def test_a_torchao_that_peft_refuses_is_removed(monkeypatch, pins):
    # Colab's images have torchao 0.10; PEFT raises ImportError when it sees one older than 0.16
    installed(monkeypatch, **pins | {"torchao": "0.10.0"})
    (command,) = run_cells("repository", "packages", WORK="models", REPOSITORY="")[1]
    assert command == "python -m pip uninstall --quiet --yes torchao"
    installed(monkeypatch, **pins | {"torchao": "0.18.0"})
    assert run_cells("repository", "packages", WORK="models", REPOSITORY="")[1] == []


def model_cell(device: str) -> dict:
    sizes = {"SAMPLES": 8, "EVAL_SAMPLES": 4, "MAX_LENGTH": 64}
    return run_cells("settings", "model", DEVICE=device, os=sys.modules["os"], **sizes)[0]


@pytest.fixture
def hub(monkeypatch) -> SimpleNamespace:
    """A hub that opens Llama to one token, and notes who asked."""
    from huggingface_hub import get_token

    from qlora import hub

    asked = SimpleNamespace(tokens=[])

    def config_file(name):
        assert name in config.MODELS.values()
        asked.tokens.append(get_token())
        if get_token() != "hf_good":
            raise hub.GatedError("gated")

    monkeypatch.setattr(hub, "config_file", config_file)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setitem(sys.modules, "kaggle_secrets", None)
    monkeypatch.setitem(sys.modules, "google.colab", None)
    yield asked
    monkeypatch.delenv("HF_TOKEN", raising=False)


def test_without_a_gpu_the_hub_is_not_asked(hub):
    assert model_cell("cpu")["MODEL"] == config.BUNDLED and hub.tokens == []


def test_without_a_token_the_model_needs_none(hub):
    assert model_cell("cuda")["MODEL"] == config.UNGATED["llama-3.2-1b"] and hub.tokens == [None]


def secrets(get) -> tuple[ModuleType, ModuleType]:
    """(kaggle_secrets, google.colab) whose secrets are `get`."""
    kaggle, colab = ModuleType("kaggle_secrets"), ModuleType("google.colab")
    kaggle.UserSecretsClient = lambda: SimpleNamespace(get_secret=get)
    colab.userdata = SimpleNamespace(get=get)
    return kaggle, colab


@pytest.mark.parametrize("site", ["kaggle_secrets", "google.colab"])
def test_a_token_of_the_secrets_opens_llama_and_is_not_shown(hub, monkeypatch, capsys, site):
    import os

    module = next(m for m in secrets({"HF_TOKEN": "hf_good"}.get) if m.__name__ == site)
    monkeypatch.setitem(sys.modules, site, module)
    if site == "google.colab":
        monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    assert model_cell("cuda")["MODEL"] == "llama-3.2-1b" in config.MODELS
    assert os.environ["HF_TOKEN"] == "hf_good" and "hf_good" not in capsys.readouterr().out


def test_a_secret_that_may_not_be_read_is_no_token(hub, monkeypatch, capsys):
    def refuse(name):
        raise RuntimeError(f"Notebook does not have access to secret {name}")

    monkeypatch.setitem(sys.modules, "kaggle_secrets", secrets(refuse)[0])
    assert model_cell("cuda")["MODEL"] == config.UNGATED["llama-3.2-1b"]
    assert "does not have access to secret HF_TOKEN" in capsys.readouterr().out


def test_elsewhere_the_repository_is_cloned(tmp_path):
    notebook = notebook_run.read(without=(*CELLS.keys() - {"settings", "repository"},))
    ran = notebook_run.execute(notebook, {"REPOSITORY": str(ROOT)}, tmp_path)
    assert notebook_run.output(ran.cells[-1]).endswith(f"{tmp_path}/qlora\n")
    assert (tmp_path / "qlora" / "notebook-run").is_dir()


def test_without_an_address_nothing_is_cloned(tmp_path):
    notebook = notebook_run.read(without=(*CELLS.keys() - {"settings", "repository"},))
    with pytest.raises(Exception, match="write the repository's address into the settings cell"):
        notebook_run.execute(notebook, {"REPOSITORY": ""}, tmp_path)


def as_pinned() -> bool:
    """Whether this Python has the pinned packages; the weekly test has newer ones, which shall stay."""
    lines = re.findall(r"^(\w+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)
    return all(metadata.version(name).partition("+")[0] == pin for name, pin in lines)


OUTPUTS = ("qlora-out", "quant-out", "gguf-out", "notebook-run")
SMALL = {"SIZES": dict.fromkeys(("cuda", "cpu"), (16, 4, 64)), "MODEL": config.BUNDLED}


@pytest.fixture(scope="module")
def ran(tmp_path_factory, bundled_folder, reviews):
    """(the cells after a run on few rows, the folder written to); what can't be run here is left out."""
    folder, before = tmp_path_factory.mktemp("notebook"), [(ROOT / name).exists() for name in OUTPUTS]
    notebook = notebook_run.read(without=("gguf",) * (not BUILT) + ("packages",) * (not as_pinned()))
    notebook_run.execute(notebook, {**SMALL, "WORK": str(folder)}, ROOT / "notebooks")
    assert [(ROOT / name).exists() for name in OUTPUTS] == before
    return {cell.id: cell for cell in notebook.cells}, folder


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(ran):
    cells, folder = ran
    said = {name: notebook_run.output(cell) for name, cell in cells.items() if cell.cell_type == "code"}
    assert "nothing, all was there" in said.get("packages", "nothing, all was there")
    assert re.search(r"^dtype ", said["found"], re.M)
    assert "Architecture" in said["demo"] and "Will it fit?" in said["demo"]
    assert (
        re.search(r"^guards +all \d+ held", said["train"], re.M) and "tuned (this adapter)" in said["train"]
    )
    assert re.search(r"^ +imdb +(Negative|Positive)$", said["review"], re.M)
    assert json.loads((folder / "imdb" / "report.json").read_text())["settings"]["samples"] == 16


@pytest.mark.slow
def test_the_report_is_shown_with_its_picture(ran):
    shown = [part.data for part in ran[0]["report"].outputs]
    assert any("same 4 held-out rows" in data.get("text/markdown", "") for data in shown)
    assert any("image/png" in data for data in shown)


@pytest.mark.slow
@pytest.mark.skipif(not BUILT, reason="llama.cpp/build.sh has not run")
def test_it_ends_with_a_gguf_file(ran):
    assert (ran[1] / "gguf" / "imdb-f16.gguf").read_bytes()[:4] == b"GGUF"
    assert (ran[1] / "gguf" / "Modelfile").is_file()
