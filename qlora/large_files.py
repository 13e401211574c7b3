"""Data files larger than memory: written once into an Arrow file, of which the disk is read as far as needed.

The system maps that file into memory and takes its pages back when it needs them: what a process holds does
not grow with the file.
"""

import contextlib
import glob
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow.parquet import ParquetFile

from config import MODELS_DIR
from qlora.cells import without_nulls
from qlora.cli import note, progress, require
from qlora.files import free_bytes, sha256_of, staged

KEPT_IN = MODELS_DIR / "rows"
READING = 1  # counts changes of what is written: files of an earlier version are not used
BATCH_ROWS, BATCH_BYTES = 1000, 8 << 20  # what is in memory at once


@dataclass
class Column(Sequence):
    """A column on the disk, as Python values."""

    values: pa.ChunkedArray
    read: Callable = lambda value: value

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator:
        for chunk in self.values.iterchunks():
            yield from map(self.read, chunk.to_pylist())

    def __getitem__(self, i: int):
        return self.read(self.values[i].as_py())

    def then(self, change: Callable) -> "Column":
        return Column(self.values, lambda value: change(self.read(value)))


def read_large(path: Path, rows: Callable[[Path], Iterator] | None) -> tuple[list[str], Callable]:
    """(names of the columns, the values of one, a Column), as the readers of small files give them.

    `rows` yields a file's rows: lists, of which the first names the columns, or dicts. None: it is Parquet.
    The Arrow file's name holds the sha256 of the data file, so that a changed one is read anew. Raises
    ValueError for a file that can't be read, UsageError where the disk has no room for another copy of it.
    """
    of_this_file = f"{path.stem[:60]}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    kept = KEPT_IN / f"{of_this_file}-{sha256_of(path)[:32]}-{READING}{path.suffix.lower()}.arrow"
    try:
        table = _map(kept)
    except (OSError, pa.ArrowException):  # not there yet, or cut short
        for old in KEPT_IN.glob(f"{glob.escape(of_this_file)}-*.arrow"):
            with contextlib.suppress(OSError):
                old.unlink()
        _write(path, rows, kept)
        table = _map(kept)
    as_json = lambda cell: cell and json.loads(cell)
    read = {".jsonl": as_json, ".parquet": without_nulls}.get(path.suffix.lower(), lambda cell: cell)
    return table.column_names, lambda name: Column(table.column(name), read)


def _map(kept: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(kept))).read_all()


def _write(path: Path, rows: Callable[[Path], Iterator] | None, kept: Path) -> None:
    needed = path.stat().st_size if rows else _unpacked(path)
    size, told = needed // 10**6, 0
    free = free_bytes(kept.parent)
    what = f"--dataset {path}: its rows take about {needed / 1e9:.1f} GB in {kept.parent}, which has"
    require(free > needed, f"{what} {free / 1e9:.1f} GB free; make room, or give a part of the file")
    note(f"data       {path} is large: copying its rows to {kept.parent}, about {needed / 1e9:.1f} GB (once)")
    with progress(size, "reading", "MB") as advance, staged(kept) as part:
        batches = _parquet_batches(path) if rows is None else _text_batches(path, rows)
        try:
            first = next(batches)
            with pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, first.schema) as out:
                for batch in itertools.chain([first], batches):
                    out.write_batch(batch)
                    advance(min(file.tell() // 10**6, size) - told)
                    told = min(file.tell() // 10**6, size)
        except pa.ArrowException as error:
            raise ValueError(str(error)) from None


def _unpacked(path: Path) -> int:
    """Bytes of a Parquet file's columns without compression."""
    try:
        groups = ParquetFile(path).metadata
    except pa.ArrowException as error:
        raise ValueError(str(error)) from None
    return sum(groups.row_group(i).total_byte_size for i in range(groups.num_row_groups))


def _parquet_batches(path: Path) -> Iterator[pa.RecordBatch]:
    source = ParquetFile(path, memory_map=True, page_checksum_verification=True)
    plain = [
        f.with_type(getattr(f.type, "value_type", f.type)) if pa.types.is_dictionary(f.type) else f
        for f in source.schema_arrow
    ]
    schema = pa.schema(plain)  # a dictionary of its own for each batch can't be written
    yield pa.RecordBatch.from_pylist([], schema)
    for batch in source.iter_batches(BATCH_ROWS):
        yield batch.cast(schema)


def _text_batches(path: Path, rows: Callable[[Path], Iterator]) -> Iterator[pa.RecordBatch]:
    """Of a .csv or .tsv file its fields, of a .jsonl file each value as JSON; null where there is none."""
    if path.suffix.lower() == ".jsonl":
        names = list(dict.fromkeys(name for row in rows(path) for name in row))
        lines = (
            [None if row.get(name) is None else json.dumps(row[name]) for name in names] for row in rows(path)
        )
    else:
        lines = rows(path)
        names = next(lines, [])
        lines = (
            [field or None for field in row + [""] * (len(names) - len(row))][: len(names)] for row in lines
        )
    schema = pa.schema([(name, pa.string()) for name in names])
    for some in _in_batches(lines):
        columns = [pa.array([line[i] for line in some], pa.string()) for i in range(len(names))]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _in_batches(lines: Iterable[list]) -> Iterator[list[list]]:
    """An empty batch, which has the names, then as many rows at once as fit."""
    yield []
    some, size = [], 0
    for line in lines:
        some.append(line)
        size += sum(len(cell) for cell in line if cell)
        if len(some) == BATCH_ROWS or size > BATCH_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some
