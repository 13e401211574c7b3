"""Adapters on disk: what belongs beside the weights, and what is refused when they are loaded."""

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from qlora.cli import UserError, first_line, require
from qlora.fast import make_fast
from qlora.files import read_json
from qlora.hardware import detect
from qlora.loading import LOCAL, Base, BaseInfo, load_base
from qlora.prompts import PromptFormat

WEIGHTS, CONFIG, NOTES = "adapter_model.safetensors", "adapter_config.json", "qlora.json"
AGAIN = "train again or copy it again"


@dataclass(frozen=True)
class Adapter:
    """A checked adapter folder. `prompt` and `base` are None for adapters that other tools trained."""

    folder: Path
    config: dict  # adapter_config.json
    base_model: str  # what --model would take
    prompt: PromptFormat | None
    base: BaseInfo | None
    dataset: dict  # name, seed: which rows were held out

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def peft_name(self) -> str:
        """As torch wants a module's name: no dots, no attribute of its own (a folder may be `training`)."""
        return "adapter_" + self.name.encode().hex()

    @property
    def revision(self) -> str | None:
        """The base's hub commit: the hub's main branch may have moved on since."""
        return (self.base and self.base.revision) or None


def save_notes(folder: Path, prompt: PromptFormat, base: BaseInfo, dataset: dict) -> None:
    """qlora.json: the prompt and the identity of the base travel with the adapter."""
    notes = {"prompt": asdict(prompt), "base": asdict(base), "dataset": dataset}
    (folder / NOTES).write_text(json.dumps(notes, indent=2) + "\n")


def read_adapter(folder: Path) -> Adapter:
    """Check an adapter folder without loading a model; raises UserError (UsageError if it is not there)."""
    name = f"--adapter {folder}"
    require(folder.is_dir(), f"{name}: no such folder; train first (qlora_finetune.py), or --adapter none")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{name}: no {CONFIG} in it; if the run was stopped: qlora_finetune.py --resume")
    if not (folder / WEIGHTS).is_file():
        if pickles := [p.name for p in folder.glob("*.bin")]:
            raise UserError(f"{name}: {pickles[0]} is a pickle, which can run code; save it as safetensors")
        raise UserError(f"{name}: no {WEIGHTS} in it, so it is incomplete; {AGAIN}")
    config = read_json(folder / CONFIG, AGAIN)
    if (kind := config.get("peft_type")) != "LORA":
        raise UserError(f"{name}: {CONFIG} describes no LoRA adapter (peft_type {kind}); {AGAIN}")
    check_weights(folder / WEIGHTS)
    if not (folder / NOTES).is_file():
        return Adapter(folder, config, config.get("base_model_name_or_path") or "", None, None, {})
    notes = read_json(folder / NOTES, AGAIN)
    try:
        base, prompt = BaseInfo(**notes["base"]), PromptFormat.from_json(notes["prompt"])
    except (KeyError, TypeError):
        raise UserError(f"{name}: {NOTES} lacks what this version writes; train again") from None
    # The base was perhaps named relative to another folder; its whole path is known.
    whole = Path(base.public_name)
    base_model = base.public_name if whole.is_absolute() and whole.exists() else base.name
    return Adapter(folder, config, base_model, prompt, base, notes.get("dataset", {}))


def check_weights(path: Path) -> None:
    """Refuse a file that is cut short, empty, or holds NaN or infinity."""
    name = f"--adapter {path.parent}: {path.name}"
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{name} is damaged or cut short ({error}); {AGAIN}") from None
    if not any(t.numel() for t in tensors.values()):
        raise UserError(f"{name} holds no weights; {AGAIN}")
    if bad := [key for key, t in tensors.items() if not torch.isfinite(t.float()).all()]:
        found = f"NaN or infinity in {len(bad)} of {len(tensors)} matrices (first: {bad[0]})"
        raise UserError(f"{name}: {found}; the run diverged, lower --learning-rate")


def check_base(adapter: Adapter, base: BaseInfo) -> str | None:
    """Refuse a base of another architecture or revision; return a warning where the precision differs."""
    trained = adapter.base
    if trained is None:
        return f"{adapter.name} has no {NOTES}: the prompt that it was trained with is unknown"
    for what in ("config_sha256", "revision"):
        ours, theirs = getattr(trained, what), getattr(base, what)
        if ours != theirs:
            was = f"was trained on {trained.name}, {what} {ours[:24] or 'none'}"
            now = f"the base is {base.name}, {what} {theirs[:24] or 'none'}; use --model {trained.name}"
            raise UserError(f"--adapter {adapter.folder} {was}, {now}")
    before, now = f"{trained.precision}/{trained.dtype}", f"{base.precision}/{base.dtype}"
    return None if before == now else f"trained on {before}, used on {now}: answers can differ"


@contextlib.contextmanager
def fitting(adapter: Adapter, base: BaseInfo):
    """Turns what PEFT raises on an adapter of another model into a UserError."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        what = f"does not fit {base.name} ({first_line(error)})"
        raise UserError(f"--adapter {adapter.folder} {what}") from None


def load_trained(adapter: Adapter) -> tuple[torch.nn.Module, Base]:
    """(PEFT model, base) as the adapter was trained: on its own base, at its own precision."""
    from peft import PeftModel

    precision = adapter.base.precision if adapter.base else "nf4"
    base = load_base(adapter.base_model, precision, detect(precision), adapter.revision)
    check_base(adapter, base.info)
    with fitting(adapter, base.info):
        model = PeftModel.from_pretrained(base.model, adapter.folder, adapter_name=adapter.peft_name)
    make_fast(model)
    return model.eval(), base


def adapter_tokenizer(folder: Path):
    """The tokenizer saved with an adapter; raises UserError where its files are incomplete."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, **LOCAL)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: tokenizer files missing or broken; copy the base's") from None
