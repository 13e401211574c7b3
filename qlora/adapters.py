"""Adapters on disk: what belongs beside the weights, and what is refused when they come back."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from qlora.cli import UserError, UsageError
from qlora.loading import BaseInfo
from qlora.prompts import PromptFormat

WEIGHTS, CONFIG, NOTES = "adapter_model.safetensors", "adapter_config.json", "qlora.json"


@dataclass(frozen=True)
class Adapter:
    """A checked adapter folder. `prompt` and `base` are None for adapters that other tools trained."""

    folder: Path
    base_model: str  # what --model would take
    prompt: PromptFormat | None
    base: BaseInfo | None
    dataset: dict  # name, seed: which rows were held out

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def peft_name(self) -> str:
        """A name that torch takes for a module: no dots in it, and none of its own attributes (a folder may be called `training`)."""
        return "adapter_" + self.name.encode().hex()


def save_notes(folder: Path, prompt: PromptFormat, base: BaseInfo, dataset: dict) -> None:
    """qlora.json: the prompt travels with the adapter, and so does the identity of the base it was trained on."""
    notes = {"prompt": prompt.to_json(), "base": asdict(base), "dataset": dataset}
    (folder / NOTES).write_text(json.dumps(notes, indent=2) + "\n")


def read_adapter(folder: Path) -> Adapter:
    """Check an adapter folder without loading a model; raises UserError (UsageError if it is not there)."""
    if not folder.is_dir():
        raise UsageError(f"--adapter {folder}: no such folder; train one with `python qlora_finetune.py` (qlora_inference.py also takes --adapter none: the base alone)")
    if not (folder / CONFIG).is_file():
        raise UserError(f"--adapter {folder}: no {CONFIG} in it; is the training run complete? (python qlora_finetune.py --resume)")
    if not (folder / WEIGHTS).is_file():
        pickles = [p.name for p in folder.glob("*.bin")]
        if pickles:
            raise UserError(f"--adapter {folder}: only {pickles[0]}, a pickle, which can run code; it is not loaded: save it as safetensors")
        raise UserError(f"--adapter {folder}: no {WEIGHTS} in it; the adapter is incomplete: train again or copy it again")
    config = _json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"--adapter {folder}: {CONFIG} describes no LoRA adapter (peft_type {config.get('peft_type')}); train again or copy it again")
    check_weights(folder / WEIGHTS)
    if not (folder / NOTES).is_file():
        return Adapter(folder, config.get("base_model_name_or_path") or "", None, None, {})
    notes = _json(folder / NOTES)
    try:
        base, prompt = BaseInfo(**notes["base"]), PromptFormat.from_json(notes["prompt"])
    except (KeyError, TypeError):
        raise UserError(f"--adapter {folder}: {NOTES} lacks what this version writes; train again") from None
    # A file or folder was perhaps named from another folder; its whole path is known.
    whole = Path(base.public_name)
    return Adapter(folder, base.public_name if whole.is_absolute() and whole.exists() else base.name, prompt, base, notes.get("dataset", {}))


def check_weights(path: Path) -> None:
    """Refuse a file that is cut short, empty, or holds NaN or infinity."""
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"--adapter {path.parent}: {path.name} is damaged or cut short ({error}); train again or copy it again") from None
    if not any(math.prod(t.shape) for t in tensors.values()):
        raise UserError(f"--adapter {path.parent}: {path.name} holds no weights; train again or copy it again")
    bad = [name for name, t in tensors.items() if not torch.isfinite(t.float()).all()]
    if bad:
        raise UserError(f"--adapter {path.parent}: NaN or infinity in {len(bad)} of {len(names)} matrices (first: {bad[0]}); the run diverged, lower --learning-rate")


def check_base(adapter: Adapter, base: BaseInfo) -> str | None:
    """Refuse a base with another architecture or other weights; returns a warning where only the precision differs."""
    trained = adapter.base
    if trained is None:
        return f"{adapter.name} has no {NOTES}: the prompt that it was trained with is unknown"
    if trained.config_sha256 != base.config_sha256:
        raise UserError(
            f"--adapter {adapter.folder} was trained on {trained.name} (config {trained.config_sha256[:12]}), "
            f"but the base is {base.name} (config {base.config_sha256[:12]}); use --model {trained.name}"
        )
    if trained.revision != base.revision:
        raise UserError(
            f"--adapter {adapter.folder} was trained on revision {trained.revision[:24] or '(local folder)'} of {trained.name}, "
            f"but the base is {base.name} at {base.revision[:24] or '(local folder)'}; use --model {trained.name}"
        )
    if (trained.precision, trained.dtype) != (base.precision, base.dtype):
        return f"trained on {trained.precision}/{trained.dtype}, used on {base.precision}/{base.dtype}: answers can differ"
    return None


def _json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: not a JSON object; train again or copy it again") from None
