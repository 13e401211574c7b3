"""A run's folder: one run at a time, nothing overwritten unasked, settings kept for --resume."""

import contextlib
import dataclasses
import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from config import KEEP_CHECKPOINTS
from qlora import processes
from qlora.cli import CONTINUE, UsageError, UserError, note, require
from qlora.files import (
    PART,
    SEAL,
    as_kind,
    broken_files,
    discard,
    free_bytes,
    lock_folder,
    read_json,
    read_record,
    remove_leftovers,
    write_record,
    write_text,
)
from qlora.settings_file import NOT_WRITTEN, as_yaml

SETTINGS, BEFORE, REPORT = "settings.json", "before.json", "report.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "qlora.json")
CONFIG = "config.yaml"  # the same settings for --config
# All that a run writes besides its settings; --overwrite deletes these and nothing else.
WRITTEN = (
    *(REPORT, SEAL, BEFORE, *ADAPTER, CONFIG, "report.md", "README.md", "curves.png"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json"),
)
TRACKED = ("tensorboard", "trackio", "wandb")  # folders of its trackers, deleted by --overwrite as well
OTHER_FILES = 20_000_000  # bytes beside the weights: tokenizer, plot, records
NOT_KEPT = (*NOT_WRITTEN, "output_dir")
NOT_COMPARED = (*NOT_KEPT, "run_name", "report_to")  # labels: they may change on --resume
EDITED = "give the settings as flags with --overwrite to start again"


class Run:
    """A run in its folder, which is locked as long as `with open_run(settings) as run` lasts."""

    def __init__(self, settings):
        self.settings, self.out = settings, settings.output_dir
        self.started, self.begun = time.perf_counter(), False

    def has_nothing_to_do(self) -> bool:
        """Whether --resume finds a complete run: the report, written last, and the adapter are whole."""
        if not (self.settings.resume and _is_json(self.out / REPORT)):
            return False
        broken = broken_files(self.out)
        if broken is None:  # a run of a version without complete.json
            broken = [name for name in ADAPTER if not (self.out / name).is_file()]
        for name in broken:
            note(f"{self.out / name} is damaged or missing: written again from the last checkpoint")
        return not broken

    @property
    def resume_command(self) -> str:
        count = processes.count()
        launch = "python" if count == 1 else f"torchrun --nproc_per_node {count}"
        return f"{launch} qlora_finetune.py --output-dir {shlex.quote(str(self.out))} --resume"

    @property
    def older(self) -> bool:
        """Whether --resume continues a run that began before --question was a flag."""
        return self.settings.resume and _is_run(self.out) and "question" not in _read(self.out)

    @property
    def dtype(self) -> str | None:
        """In what the run that --resume continues computed ("float32"), if it was written down."""
        return _read(self.out).get("dtype") if self.settings.resume and _is_run(self.out) else None

    def begin(self, settings, dtype, model) -> None:
        """The first change to the folder, after model and data proved usable: a typo costs no earlier run.

        `settings` are kept for --resume, with the model and the precision that `auto` stood for, and the
        torch.dtype of its products. Of several processes the first changes it, the others wait. UserError
        where what `model` trains has no room on the disk.
        """
        if processes.is_first():
            self._require_space(model)
            self._begin(settings, dtype)
        processes.wait()
        self.begun = True

    def _require_space(self, model) -> None:
        """For the checkpoints that are kept, one that is being written, and the adapter."""
        adapter = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
        there = len(list(self.out.glob("checkpoint-*")))
        ahead = max(KEEP_CHECKPOINTS + 1 - there, 1)
        wanted = (3 * ahead + 1) * adapter + (ahead + 1) * OTHER_FILES  # 3: AdamW's two moments as well
        free = free_bytes(self.out)
        if free < wanted:
            sizes = f"needs {wanted / 1e6:,.0f} MB for checkpoints, {free / 1e6:,.0f} MB are free on its disk"
            raise UserError(f"--output-dir {self.out}: {sizes}; free some, or choose another folder")

    def _begin(self, settings, dtype) -> None:
        if self.settings.overwrite:
            for name in WRITTEN:  # but for the settings, which say that the folder is ours
                (self.out / name).unlink(missing_ok=True)
            for folder in [*self.out.glob("checkpoint-*"), *(self.out / name for name in TRACKED)]:
                discard(folder)
        kept = _as_json(settings) | {"dtype": str(dtype).removeprefix("torch.")}
        if self.older:  # stays so for the next --resume
            del kept["question"]
        write_record(self.out / SETTINGS, kept)
        write_text(self.out / CONFIG, as_yaml(settings))

    def kept(self) -> dict:
        """Scores of the base, and its revision, so far: BeforeAfter.score_before writes them.

        Of an older version's file, without a sha256, only the revision: the rest is measured again.
        """
        path = self.out / BEFORE
        if not path.exists():
            return {}
        kept, vouched = read_record(path, f"delete {path}: the base is scored again")
        revision = kept.get("revision")
        return kept if vouched else {"revision": revision} if isinstance(revision, str) else {}

    @property
    def revision(self) -> str | None:
        """The base's hub commit when the run began: the main branch may have moved on since."""
        return self.kept().get("revision") or None if self.settings.resume else None


def saved_settings(out: Path, kind: type):
    """Settings of the run in `out`, to serve as defaults for --resume; None if there is none."""
    if not _is_run(out):
        return None
    kept = _read(out)
    if isinstance(kept.get("dataset"), str):
        kept["dataset"] = [kept["dataset"]]
    saved = as_kind(json.dumps(kept), out / SETTINGS, EDITED, kind)  # keys of other versions are ignored
    return dataclasses.replace(saved, output_dir=out, resume=True)


@contextlib.contextmanager
def open_run(settings) -> Iterator[Run]:
    """Lock the output folder and check what is in it; raises UsageError or UserError.

    Nothing is changed yet: see Run.begin(). Of several processes the first does this, and
    --find-lr needs no folder.
    """
    out: Path = settings.output_dir
    if settings.find_lr or not processes.is_first():
        yield Run(settings)
        return
    # .lock and a part of settings.json can be all that a killed run had time to write.
    names = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    others = [name for name in names if name != ".lock" and not name.startswith((PART, f".{SETTINGS}"))]
    if others and not _is_run(out) and (out / CONFIG).is_file() and (out / ADAPTER[0]).is_file():
        again = f"begin again: qlora_finetune.py --config {shlex.quote(str(out / CONFIG))} --output-dir NEW"
        raise UserError(f"{out / SETTINGS} is missing or damaged, so the run can't be continued; {again}")
    if others and not _is_run(out):
        raise UsageError(f"--output-dir {out}: holds other files ({others[0]}, …); choose an empty folder")
    run = Run(settings)
    with lock_folder(out):
        remove_leftovers(out)
        if _is_run(out):
            _check_earlier(settings)
        try:
            yield run
        except KeyboardInterrupt as stop:
            if not run.begun:  # nothing of it was kept yet
                raise
            resume = f"stopped; what was measured is kept; continue with: {run.resume_command}"
            raise KeyboardInterrupt(str(stop) or resume) from None
        except Exception as error:
            if run.begun:
                error.add_note(f"{CONTINUE}{run.resume_command}")
            raise


def _check_earlier(settings) -> None:
    """Refuse to resume with other settings, and to overwrite unasked."""
    out = settings.output_dir
    if settings.resume:
        # A setting that an older version did not have was at its default.
        before = _as_json(type(settings)()) | {"processes": 1} | _read(out)
        now = _as_json(settings)
        if before["lane"] not in ("auto", now["lane"]):
            lanes = f"--lane {before['lane']} -> {now['lane']}"
            note(f"note       {lanes}: from here on products may round otherwise")
        before["lane"] = now["lane"]
        compared = {k: v for k, v in now.items() if k not in NOT_COMPARED}
        changed = [
            f"--{k.replace('_', '-')} {before[k]} -> {v}" for k, v in compared.items() if before[k] != v
        ]
        what = f"the run in {out} began with other settings ({'; '.join(changed)}); leave them out"
        require(not changed, f"--resume: {what}")
    elif not settings.overwrite:
        ways = "continue it (--resume), delete it (--overwrite), or choose another folder"
        raise UsageError(f"--output-dir {out} holds another run: {ways}")


def _read(out: Path) -> dict:
    return read_record(out / SETTINGS, EDITED)[0]


def _is_json(path: Path) -> bool:
    with contextlib.suppress(OSError, UserError):
        return bool(read_json(path, ""))
    return False


def _is_run(out: Path) -> bool:
    """settings.json alone says little, many programs write one; ours names LoRA's rank."""
    try:
        return "lora_r" in read_json(out / SETTINGS, "")
    except (OSError, UserError):
        return False


def _as_json(settings) -> dict:
    """The settings that a run has to be resumed with, and its processes: they share the batch."""
    fields = dataclasses.asdict(settings).items()
    kept = {k: str(v) if isinstance(v, Path) else v for k, v in fields if k not in NOT_KEPT}
    kept = {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}  # as JSON gives them back
    if len(kept["dataset"]) == 1:  # a word, as it was before there could be several
        kept["dataset"] = kept["dataset"][0]
    return kept | {"processes": processes.count()}
