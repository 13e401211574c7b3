"""Files are written whole or not at all, and a folder has one writer at a time."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from qlora.cli import UsageError, UserError

PART = ".part-"  # how the names of unfinished folders begin


@contextlib.contextmanager
def scratch(folder: Path, prefix: str = PART) -> Iterator[Path]:
    """An empty folder inside `folder`, so that a rename is enough to finish a file; deleted afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder, prefix=prefix))
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def staged(final: Path, prefix: str = PART) -> Iterator[Path]:
    """A path for a new file or folder; it becomes `final` if the block succeeds, and is deleted if not."""
    with scratch(final.parent, prefix) as aside:
        yield aside / final.name
        publish(aside / final.name, final)


def publish(part: Path, final: Path) -> None:
    """Give a finished file or folder its final name: flush it to the disk, set the usual modes, rename."""
    for path in [part, *part.rglob("*")]:
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    set_usual_modes(part)
    os.replace(part, final)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left unfinished in a folder that this process has locked."""
    for left in [*folder.glob(f"{PART}*"), *folder.glob(".staging"), *folder.glob(".export-*")]:
        shutil.rmtree(left, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with staged(path) as part:
        part.write_text(text)


def write_json(path: Path, data) -> None:
    write_text(path, json.dumps(data, indent=2) + "\n")


def read_json(path: Path, fix: str) -> dict:
    """The object in a JSON file; a UserError with the `fix` where there is none."""
    with contextlib.suppress(ValueError):
        if isinstance(data := json.loads(path.read_text()), dict):
            return data
    raise UserError(f"{path} is damaged: not a JSON object; {fix}")


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


def free_bytes(folder: Path) -> int:
    """Free space on the disk that `folder` is on, or will be on."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free
