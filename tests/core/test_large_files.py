"""Files larger than memory: the same rows as of small ones, nothing stale, little memory."""

import json
import os
import shutil
import tracemalloc

import pandas as pd
import pyarrow as pa
import pytest

from qlora import columns, large_files
from qlora import data as d
from qlora.cli import UsageError


@pytest.fixture(autouse=True)
def kept_in(tmp_path, monkeypatch):
    monkeypatch.setattr(large_files, "KEPT_IN", tmp_path / "kept")
    return tmp_path / "kept"


@pytest.fixture
def large(monkeypatch):
    """Every file is a large one."""
    monkeypatch.setattr(columns, "LARGE_FILE", 0)


# Missing values, words that look like them, spellings of one label, duplicates, line breaks.
ODD = [
    *(
        {"text": f'review number {i}, "quoted"\nand broken', "label": ("1.0", "0.0")[i % 2]}
        for i in range(60)
    ),
    {"text": None, "label": "1.0"},
    {"text": "no label here", "label": None},
    {"text": "NA", "label": "1"},
    {"text": "schön ☕", "label": "0"},
    {"text": ' review number 3, "quoted"\nand broken<br />', "label": "0.0"},
]
TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"ask {i}"},
            {"role": "assistant", "content": ("say", "")[i == 3]},
        ]
    }
    for i in range(20)
]


def written(tmp_path, ending: str) -> str:
    path = tmp_path / f"rows.{ending}"
    if ending == "csv":
        pd.DataFrame(ODD).to_csv(path, index=False)
    elif ending == "parquet":  # as categories: each batch would have a dictionary of its own
        pd.DataFrame(ODD).astype({"label": "category"}).to_parquet(path, row_group_size=7)
    else:
        rows = TALKS if ending == "talks.jsonl" else [{**row, "n": [i]} for i, row in enumerate(ODD)]
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet", "talks.jsonl"])
def test_large_and_small_files_give_the_same_rows(tmp_path, ending, monkeypatch, capsys, kept_in):
    path = written(tmp_path, ending)
    small = d.load_rows(path)
    said = capsys.readouterr().err
    assert isinstance(small.rows, list) and not kept_in.exists()
    monkeypatch.setattr(columns, "LARGE_FILE", 0)
    monkeypatch.setattr(large_files, "BATCH_ROWS", 7)
    found = d.load_rows(path)
    assert not isinstance(found.rows, list) and list(found.rows) == small.rows
    same = ("kind", "answers", "origin", "duplicates_removed", "labels", "left_out")
    assert all(getattr(found, name) == getattr(small, name) for name in same)
    assert "left out" in said and said in capsys.readouterr().err  # what is left out, and the first of them
    for seed in (1, 2):
        assert d.split(found, 9, 4, seed) == d.split(small, 9, 4, seed)


def test_a_changed_file_is_read_anew(tmp_path, large, kept_in):
    # A row cache that went by size and time gave the old rows back
    path = tmp_path / "rows.csv"
    path.write_text("text,label\nfirst film,1\nother film,0\n")
    assert [row.text for row in d.load_rows(str(path)).rows] == ["first film", "other film"]
    before, (old,) = path.stat(), kept_in.iterdir()
    path.write_text("text,label\nfresh film,1\nother film,0\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert [row.text for row in d.load_rows(str(path)).rows] == ["fresh film", "other film"]
    (new,) = kept_in.iterdir()  # no copy of what is no more
    assert new != old
    written_at = new.stat().st_mtime_ns
    os.utime(path)
    d.load_rows(str(path))
    assert new.stat().st_mtime_ns == written_at  # the same content is not written again
    new.write_bytes(new.read_bytes()[:-20])  # cut short
    assert len(d.load_rows(str(path)).rows) == 2


def test_a_file_that_can_not_be_read_leaves_nothing(tmp_path, large, kept_in, monkeypatch):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "a film,1\n" * 2000 + "more, fields, than columns\n")
    with pytest.raises(UsageError, match="not readable as csv .the row in line 2002: 3 fields for 2 columns"):
        d.load_rows(str(path))
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 1}\nno json\n')
    with pytest.raises(UsageError, match="line 2 is no JSON object"):
        d.load_rows(str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(UsageError, match="not readable as parquet"):
        d.load_rows(str(tmp_path / "rows.parquet"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UsageError, match=r"rows.csv: its rows take about .* GB free; make room"):
        d.load_rows(str(path))
    assert not list(kept_in.glob("*"))


def test_a_column_of_texts_is_no_label(tmp_path, large, monkeypatch):
    monkeypatch.setattr(d, "MANY", 60)  # so many are counted, not all of them
    rows = [{"text": f"film {i}", "label": f"label {i}"} for i in range(100)]
    pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(UsageError, match="61 or more different labels, at most 50"):
        d.load_rows(str(tmp_path / "rows.csv"))


def test_small_and_large_files_can_be_mixed(tmp_path, monkeypatch, capsys):
    for name, start, count in (("large.csv", 0, 300), ("small.csv", 290, 40)):
        rows = [{"text": f"film number {i}", "label": i % 2} for i in range(start, start + count)]
        pd.DataFrame(rows).to_csv(tmp_path / name, index=False)
    names = str(tmp_path / "large.csv"), str(tmp_path / "small.csv")
    weighted = tuple(f"{name}:{weight}" for name, weight in zip(names, (3, 1)))
    alone = [d.split(d.load_rows(each), 40, 20, seed=1) for each in (names, weighted)]
    monkeypatch.setattr(columns, "LARGE_FILE", os.path.getsize(names[1]))
    found = d.load_rows(names)
    assert len(found.rows) == 330 and found.duplicates_removed == 10
    assert "large.csv is large" in capsys.readouterr().err
    assert [d.split(each, 40, 20, seed=1) for each in (found, d.load_rows(weighted))] == alone


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, large, monkeypatch, ending):
    path, text = tmp_path / f"rows.{ending}", "a word and another " * 110
    rows = ({"text": f"{i} {text}", "label": i % 2} for i in range(30_000))
    table = pd.DataFrame(rows)
    table.to_csv(path, index=False) if ending == "csv" else table.to_parquet(path, compression=None)
    size = 30_000 * len(text)
    del table, rows
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        train, held_out = d.split(d.load_rows(str(path)), 50, 20, seed=1)
        peak = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert size > 60e6 and len(train) == 50 and len(held_out) == 20
    assert peak < 0.5 * size
