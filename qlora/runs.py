"""A run's folder: one run at a time, nothing overwritten unasked, settings kept for --resume."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from qlora.cli import UsageError, UserError

SETTINGS, BEFORE = "settings.json", "before.json"
# All that a run writes besides its settings; --overwrite deletes these and nothing else.
WRITTEN = ("report.json", BEFORE, "adapter_config.json", "adapter_model.safetensors", "qlora.json", "report.md",
           "curves.png", "README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
           "vocab.json", "merges.txt", "added_tokens.json")
NOT_COMPARED = ("resume", "overwrite", "output_dir")


def saved_settings(out: Path, kind: type):
    """Settings of the run in `out`, to serve as defaults for --resume; None if there is none."""
    if not is_run(out):
        return None
    data = json.loads((out / SETTINGS).read_text())
    known = {f.name for f in dataclasses.fields(kind)}
    return kind(**{k: v for k, v in data.items() if k in known}, output_dir=out, resume=True)


def write_json(path: Path, data) -> None:
    """Whole or not at all: written beside the target, then renamed."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "w") as file:
            file.write(json.dumps(data, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def claim(settings) -> FileLock:
    """Lock the output folder and decide what may be there; raises UsageError or UserError. Nothing is changed yet: see begin()."""
    out: Path = settings.output_dir
    # .lock and .settings.json.part can be all that a killed run had time to make.
    others = sorted(p.name for p in out.iterdir() if p.name not in (".lock", f".{SETTINGS}.part")) if out.is_dir() else []
    if others and not is_run(out):
        raise UsageError(f"--output-dir {out}: the folder holds other files ({others[0]}, …); take an empty or new folder")
    lock = lock_folder(out)
    ours = is_run(out)
    try:
        if ours and settings.resume:
            # A setting that an older version did not have was at its default.
            before = _as_json(type(settings)()) | json.loads((out / SETTINGS).read_text())
            changed = [f"--{k.replace('_', '-')} {before[k]} -> {v}" for k, v in _as_json(settings).items() if before[k] != v]
            if changed:
                raise UsageError(f"--resume: the run in {out} was started with other settings ({'; '.join(changed)}); leave them out")
        elif ours and not settings.overwrite:
            raise UsageError(f"--output-dir {out} holds another run: go on with it (--resume), delete it (--overwrite), or take another folder")
    except BaseException:
        lock.release()
        raise
    return lock


def lock_folder(out: Path) -> FileLock:
    """Make the folder and lock it; raises UserError where another run has it, UsageError where it can't be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"--output-dir {out}: another run is working in this folder; wait for it or take another folder") from None
    except (PermissionError, FileExistsError, NotADirectoryError, OSError) as error:
        raise UsageError(f"--output-dir {out}: can't be written ({error.strerror or error})") from None
    return lock


def begin(settings) -> None:
    """The first change to the folder, after model and data were found to be usable: a typo costs no earlier run."""
    if settings.overwrite:
        clear(settings.output_dir)
    write_json(settings.output_dir / SETTINGS, _as_json(settings))


def before_scores(out: Path) -> dict:
    """What score_before() kept in before.json so far."""
    kept = out / BEFORE
    return json.loads(kept.read_text()) if kept.exists() else {}


def set_usual_modes(folder: Path) -> None:
    """The modes that new files have: mkdtemp's 700 and safetensors' 600 would shut out the other users of a shared checkout."""
    umask = os.umask(0)
    os.umask(umask)
    with contextlib.suppress(PermissionError):  # file systems without modes
        for path in (folder, *folder.rglob("*")):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def is_run(out: Path) -> bool:
    """settings.json alone says little, many programs write one; ours names LoRA's rank."""
    try:
        return "lora_r" in json.loads((out / SETTINGS).read_text())
    except (OSError, ValueError, TypeError):
        return False


def clear(out: Path) -> None:
    """All but the settings, which say that the folder is ours; begin() replaces them."""
    for name in WRITTEN:
        (out / name).unlink(missing_ok=True)
    for folder in [*out.glob("checkpoint-*"), out / ".staging"]:
        shutil.rmtree(folder, ignore_errors=True)


def _as_json(settings) -> dict:
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items() if k not in NOT_COMPARED}
