"""Files are written whole or not at all, and a folder has one writer at a time.

What survives a power cut is what was flushed: a file's content before its new name, the names before the
next file that relies on them (the order of https://www.sqlite.org/atomiccommit.html). complete.json comes
last and holds the sha256 of the others, so damage is seen whatever caused it.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from qlora.cli import UsageError, UserError

try:
    import fcntl
except ImportError:  # Windows: what a killed process left unfinished is not deleted there
    fcntl = None

PART = ".qlora-part-"  # how the names of unfinished folders begin
SEAL = "complete.json"  # {file name: sha256} of the files beside it


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder`, so that a rename is enough to finish a file; deleted afterwards.

    It is locked as long as its process lives: what killed processes left is known by that, and deleted here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    while True:
        aside = Path(tempfile.mkdtemp(dir=folder, prefix=PART))
        lock = _lock(aside)
        if aside.exists():  # else another process took it for a leftover before the lock was there
            break
        os.close(lock)
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def staged(final: Path) -> Iterator[Path]:
    """A path for a new file or folder; it becomes `final` if the block succeeds, and is deleted if not."""
    with scratch(final.parent) as aside:
        yield aside / final.name
        publish(aside / final.name, final)


def publish(part: Path, final: Path) -> None:
    """Give a finished file or folder its final name: flush it to the disk, set the usual modes, rename."""
    for path in [*part.rglob("*"), part]:
        flush(path)
    set_usual_modes(part)
    os.replace(part, final)
    flush(final.parent)  # or a power cut could take the name away, after later files got theirs


def publish_sealed(aside: Path, out: Path) -> None:
    """Move the files of `aside` into `out`, and then complete.json with their hashes."""
    seal(aside)
    for path in sorted(aside.iterdir(), key=lambda path: path.name == SEAL):
        publish(path, out / path.name)


def flush(path: Path) -> None:
    """fsync of a file or, where the system offers it, of a folder's list of names."""
    if fcntl is None and path.is_dir():
        return
    number = os.open(path, os.O_RDWR if fcntl is None else os.O_RDONLY)  # Windows flushes what it may write
    try:
        os.fsync(number)
    finally:
        os.close(number)


def seal(folder: Path) -> None:
    """Write complete.json: the sha256 of each file in the folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    hashes = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
    (folder / SEAL).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")


def broken_files(folder: Path) -> list[str] | None:
    """Files that are missing or not what complete.json says; None where there is no complete.json."""
    if not (folder / SEAL).exists():
        return None
    try:
        hashes = read_json(folder / SEAL, "", dict[str, str])
    except (UserError, OSError):
        return [SEAL]
    return [n for n, h in hashes.items() if not (folder / n).is_file() or sha256_of(folder / n) != h]


def discard(path: Path) -> None:
    """Delete a folder, its name first: half a folder under a good name would be taken for a whole one."""
    if path.exists():
        gone = path.with_name(f"{PART}{secrets.token_hex(4)}")
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the unfinished folders of processes that were killed; those of living ones are locked."""
    for left in folder.glob(f"{PART}*"):
        with contextlib.suppress(OSError):
            lock = _lock(left, wait=False)
            if lock is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)


def _lock(folder: Path, wait: bool = True) -> int | None:
    """The descriptor that holds a lock on a folder; None where folders can't be locked or, with `wait` off,
    another process holds it."""
    if fcntl is None:
        return None
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by another, or a network file system without such locks
        os.close(number)
        return None
    return number


def write_text(path: Path, text: str) -> None:
    with staged(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, data) -> None:
    write_text(path, json.dumps(data, indent=2) + "\n")


def read_json(path: Path, fix: str, kind: type = dict):
    """The content of a JSON file as a `kind`: dict, dict[str, str], a dataclass.

    Raises UserError with the `fix` where it is something else.
    """
    if not path.is_file():  # a pipe would be waited on for ever
        raise UserError(f"{path} is missing or no file; {fix}")
    return as_kind(path.read_bytes(), path, fix, kind)


def as_kind(content: bytes | str, path: Path, fix: str, kind: type):
    """read_json() of what stands in the file, or stood there."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        what = f"{where}: {first['msg']}" if where else "not a JSON object"
        raise UserError(f"{path} is damaged ({what}); {fix}") from None


def write_record(path: Path, data: dict) -> None:
    """JSON that vouches for itself: read_record() sees any change."""
    write_json(path, data | {"sha256": _sha256_of_json(data)})


def read_record(path: Path, fix: str) -> tuple[dict, bool]:
    """(what write_record() wrote, True), or (the object of a file without a sha256, False)."""
    data = read_json(path, fix)
    if (found := data.pop("sha256", None)) is None:
        return data, False
    if found != _sha256_of_json(data):
        raise UserError(f"{path} is damaged or was edited: its sha256 is another; {fix}")
    return data, True


def _sha256_of_json(data: dict) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def set_usual_modes(path: Path) -> None:
    """As umask says: mkdtemp's 700 and safetensors' 600 shut out other users of a shared checkout."""
    umask = os.umask(0)
    os.umask(umask)
    with contextlib.suppress(PermissionError):  # file systems without modes
        for each in (path, *path.rglob("*")):
            each.chmod((0o777 if each.is_dir() else 0o666) & ~umask)


def lock_folder(out: Path) -> FileLock:
    """Make and lock a folder; UserError where another process works in it, UsageError if not writable."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--output-dir {out}: can't be written, it is a file; choose a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        busy = f"--output-dir {out}: another run is working in this folder"
        raise UserError(f"{busy}; wait for it or choose another folder") from None
    except OSError as error:
        raise UsageError(f"--output-dir {out}: can't be written ({error.strerror or error})") from None
    return lock


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Lock a file that is there; UserError where another process writes it."""
    number = os.open(path, os.O_RDWR)
    try:
        if fcntl is not None:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(number)
        raise UserError(f"{path}: another process is writing it; wait for it") from None
    except OSError:  # a network file system without such locks
        pass
    try:
        yield
    finally:
        os.close(number)


def free_bytes(folder: Path) -> int:
    """Free space on the disk that `folder` is on, or will be on."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free
