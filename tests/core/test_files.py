"""Files are whole or absent, also after a power cut; damage is seen; leftovers are deleted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT

from qlora import files
from qlora.cli import UserError


def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_the_next_file(tmp_path, monkeypatch):
    # A power cut 6 s after a run left a whole report.json beside an adapter of zeros
    done, fsync, replace = [], os.fsync, os.replace

    def note_fsync(number):
        done.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{number}"))))
        fsync(number)

    def note_replace(old, new):
        done.append(("rename", os.path.basename(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    out = tmp_path / "out"
    with files.scratch(out) as aside:
        (aside / "weights").write_bytes(b"w")
        files.publish_sealed(aside, out)
    files.write_json(out / "report.json", {})
    names = ["weights", files.SEAL, "report.json"]
    assert done == [step for n in names for step in (("fsync", n), ("rename", n), ("fsync", "out"))]


def test_a_folder_is_flushed_with_all_that_is_in_it(tmp_path, monkeypatch):
    flushed = set()
    monkeypatch.setattr(files, "flush", lambda path: flushed.add(path.name))
    with files.staged(tmp_path / "checkpoint") as part:
        (part / "inner").mkdir(parents=True)
        (part / "inner" / "weights").write_bytes(b"w")
    assert flushed == {"checkpoint", "inner", "weights", tmp_path.name}


def test_damage_is_seen_whatever_it_is(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    assert files.broken_files(tmp_path) is None
    files.seal(tmp_path)
    (tmp_path / "README.md").write_text("mine")  # not sealed: may be edited
    assert files.broken_files(tmp_path) == []
    (tmp_path / "a").write_text("c")
    (tmp_path / "b").unlink()
    assert files.broken_files(tmp_path) == ["a", "b"]
    for content in ("", "[]", '{"a": 1}', "{", "\0"):
        (tmp_path / files.SEAL).write_text(content)
        assert files.broken_files(tmp_path) == [files.SEAL]


def test_a_record_vouches_for_itself(tmp_path):
    path = tmp_path / "settings.json"
    files.write_record(path, {"lora_r": 16, "learning_rate": 5e-4})
    assert files.read_record(path, "") == ({"lora_r": 16, "learning_rate": 5e-4}, True)
    path.write_text(path.read_text().replace("16", "17"))
    with pytest.raises(UserError, match=r"settings.json is damaged or was edited.*; do this"):
        files.read_record(path, "do this")
    path.write_text('{"lora_r": 17}')  # of an older version
    assert files.read_record(path, "") == ({"lora_r": 17}, False)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "\udcff", "[" * 100_000, '{"r": "16"}', '{"r": 16.5}', '{"r": null}', "{}"]
)
def test_json_that_is_not_what_was_asked_for(tmp_path, content):
    @dataclass
    class Settings:
        r: int

    (tmp_path / "x.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"x.json is damaged \(.*\); do this"):
        files.read_json(tmp_path / "x.json", "do this", Settings)


def test_a_pipe_is_not_waited_on(tmp_path):
    os.mkfifo(tmp_path / "settings.json")
    with pytest.raises(UserError, match="settings.json is missing or no file"):
        files.read_json(tmp_path / "settings.json", "")


def test_what_a_killed_process_left_is_deleted_and_what_a_living_one_makes_is_kept(tmp_path):
    code = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from qlora.files import scratch
with scratch(Path({str(tmp_path)!r})) as aside:
    (aside / "half").write_text("h")
    print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    (left,) = tmp_path.iterdir()
    files.remove_leftovers(tmp_path)
    with files.scratch(tmp_path):
        assert left.exists()
    process.kill()
    process.wait()
    with files.scratch(tmp_path):
        assert not left.exists()
    assert not list(tmp_path.iterdir())


def test_a_folder_loses_its_name_before_its_content(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "weights").write_text("w")
    monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: None)  # killed before anything is deleted
    files.discard(folder)
    assert not folder.exists() and json.dumps([p.name for p in tmp_path.iterdir()]).count(files.PART) == 1
    monkeypatch.undo()
    files.remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())
