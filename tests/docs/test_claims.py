"""docs/claims.md and claims.py: each wrong claim has a row, a real command, and a truth that holds."""

from __future__ import annotations

import json
import re
import shlex

import claims
import pytest
import truths
from conftest import ROOT
from peft.tuners.lora import LoraLayer

from config import DemoSettings, TrainSettings
from qlora.cli import parse

PAGE = (ROOT / "docs" / "claims.md").read_text()
ROWS = {int(number): cells for number, cells in re.findall(r"^\| (\d+) \| (.*) \|$", PAGE, re.M)}
SETTINGS = {"quant_llama32_4bit_lora.py": DemoSettings, "qlora_finetune.py": TrainSettings}


def test_each_claim_of_the_page_has_its_truth_and_figures():
    assert list(ROWS) == list(claims.CLAIMS) == list(range(1, len(ROWS) + 1)) and len(ROWS) >= 22
    assert len(set(claims.CLAIMS.values())) == len(ROWS)
    for number, cells in ROWS.items():
        shown = re.findall(r"<!--fig claims.json claims\[number=(\d+)\]\.(text|source) text-->", cells)
        assert shown == [(str(number), "text"), (str(number), "source")], number


@pytest.mark.parametrize("number", ROWS)
def test_the_command_of_a_row_is_real(number):
    [command] = re.findall(r"`(python [^`]+)`", ROWS[number])
    program, *flags = shlex.split(command.removeprefix("python "))
    if program == "benchmarks/claims.py":
        assert flags == [str(number)]
    else:
        parse(SETTINGS[program], flags, None)


def test_all_truths_hold_and_the_page_shows_a_record_of_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(claims, "OUT", tmp_path / "claims.json")
    assert claims.main(["--json"]) == 0, capsys.readouterr().out
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ROWS) + 1 and not any("|" in line for line in lines)
    for path in (tmp_path, truths.RESULTS):
        found = json.loads((path / "claims.json").read_text())["claims"]
        assert [claim["number"] for claim in found] == list(ROWS)
        assert all(claim["holds"] is True for claim in found)


def test_a_planted_falsehood_is_found(monkeypatch, tmp_path, capsys):
    start = LoraLayer.reset_lora_parameters

    def not_zero(layer, name, *rest):
        start(layer, name, *rest)
        layer.lora_B[name].weight.data.fill_(0.1)

    monkeypatch.setattr(LoraLayer, "reset_lora_parameters", not_zero)
    assert claims.main(["24", "11"]) == 1
    out = capsys.readouterr().out
    assert "11 NOT AS IT SHOULD BE" in out and "24 smallest logit" in out and "1 of 2 are as" in out
    # One that is read from a record: a perfect score.
    record = json.loads((truths.RESULTS / "long_run_8000.json").read_text())
    record["evaluation"]["tuned"] |= {"accuracy": 1.0, "low": 0.998, "high": 1.0}
    (tmp_path / "long_run_8000.json").write_text(json.dumps(record))
    monkeypatch.setattr(truths, "RESULTS", tmp_path)
    assert claims.main(["10"]) == 1
    (tmp_path / "long_run_8000.json").unlink()
    assert claims.main(["10"]) == 1 and "there is no benchmarks/results/long_run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "asked, words", [(["99"], "no claim 99; there are 1 to"), (["--json", "3"], "name none")]
)
def test_mistakes_are_one_line(asked, words, capsys):
    with pytest.raises(SystemExit) as stop:
        claims.main(asked)
    assert stop.value.code == 2 and words in capsys.readouterr().err
