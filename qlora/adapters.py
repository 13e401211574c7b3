"""Adapters on disk: what belongs beside the weights, and what is refused when they are loaded."""

import contextlib
import json
import shlex
import signal
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from pydantic import FiniteFloat
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from config import QatType
from qlora import qat
from qlora.cli import UserError, first_line, note, require
from qlora.fast import make_fast
from qlora.files import SEAL, broken_files, read_json
from qlora.hardware import detect
from qlora.hub import ADAPTER_ID, name_of
from qlora.hub import adapter as fetch_adapter
from qlora.loading import Base, BaseInfo, load_base
from qlora.prompts import PromptFormat
from qlora.shapes import peek, stored_precision
from qlora.sources import OF_FILES

WEIGHTS, CONFIG, NOTES = "adapter_model.safetensors", "adapter_config.json", "qlora.json"
AGAIN = "train again or copy it again"
OR_NONE = ", or --adapter none"  # for those that can do with the base alone
PATTERN_SECONDS = 120  # for loading an adapter whose target_modules is a regular expression


@dataclass
class PartNotes:
    """One of several datasets that were joined or mixed."""

    name: str
    sha256: str | None = None
    weight: float | None = None


@dataclass
class DataNotes:
    """Which rows an adapter was trained on, and which were held out."""

    name: str
    seed: int
    eval_samples: int | None = None
    samples: int | None = None
    sha256: str | None = None  # of a file
    kind: str | None = None  # "pairs" of --objective preference
    columns: tuple[str, ...] | None = None  # --columns
    parts: list[PartNotes] | None = None  # where they were several; the name is then that of all


@dataclass
class Combination:
    """Of an adapter that qlora/combining.py made: the rows of all that are in it."""

    trained_on: list[DataNotes]


@dataclass
class Notes:
    """qlora.json."""

    prompt: PromptFormat
    base: BaseInfo
    dataset: DataNotes | None = None
    qat: QatType | None = None
    combination: Combination | None = None
    earlier: list[DataNotes] | None = None  # rows of the adapters that it went on from (--init-adapter)


@dataclass
class LoraSettings:
    """What is used here of adapter_config.json; PEFT reads the rest."""

    peft_type: str
    r: int = 8
    lora_alpha: FiniteFloat = 8
    lora_dropout: FiniteFloat = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str | None = True
    target_modules: str | list[str] | None = None
    base_model_name_or_path: str | None = None
    megatron_config: dict | None = None
    alora_invocation_tokens: list[int] | None = None


@dataclass(frozen=True)
class Adapter:
    """A checked adapter folder. `prompt` and `base` are None for adapters that other tools trained."""

    folder: Path
    config: dict  # adapter_config.json
    base_model: str  # what --model would take
    prompt: PromptFormat | None
    base: BaseInfo | None
    dataset: dict  # name, seed: which rows were held out
    qat: str | None = None  # the type whose grid it was trained through (qlora/qat.py)
    others: tuple[dict, ...] = ()  # what is known of the rows of those that a combination was made of

    @property
    def name(self) -> str:
        return name_of(self.folder)

    @property
    def peft_name(self) -> str:
        """As torch wants a module's name: no dots, no attribute of its own (a folder may be `training`)."""
        return "adapter_" + self.name.encode().hex()

    def trained_on(self, name: str) -> dict:
        """What is known of its training rows if some were of this dataset, or else of its own."""
        return next((rows for rows in self.all_rows if rows["name"] == name), self.dataset)

    @property
    def all_rows(self) -> tuple[dict, ...]:
        """What is known of its own training rows and of those of the adapters that it was made of."""
        return (self.dataset, *self.others) if self.dataset else self.others

    @property
    def revision(self) -> str | None:
        """The base's hub commit: the hub's main branch may have moved on since."""
        return (self.base and self.base.revision) or None


def save_notes(folder: Path, prompt: PromptFormat, base: BaseInfo, dataset: dict, **others) -> None:
    """qlora.json: the prompt and the identity of the base travel with the adapter; `others`: qat, earlier."""
    notes = {"prompt": asdict(prompt), "base": asdict(base), "dataset": dataset, **others}
    (folder / NOTES).write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")


def read_adapter(folder: Path, otherwise: str = "") -> Adapter:
    """Check an adapter folder, or owner/name of the hub, without loading a model.

    Raises UserError (UsageError if it is not there, which names what can be done `otherwise`).
    """
    name = f"--adapter {folder}"
    if not folder.exists() and ADAPTER_ID.fullmatch(folder.as_posix()):
        folder = fetch_adapter(folder.as_posix())
    require(folder.is_dir(), f"{name}: no such folder; train first (qlora_finetune.py){otherwise}")
    if broken := broken_files(folder):
        again = f"python qlora_finetune.py --output-dir {shlex.quote(str(folder))} --resume"
        repair = f"where it was trained, `{again}` writes it again; else copy the folder again"
        raise UserError(f"{name}: {broken[0]} is missing or not what was written (sha256); {repair}")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{name}: no {CONFIG} in it; if the run was stopped: qlora_finetune.py --resume")
    if not (folder / WEIGHTS).is_file():
        if pickles := [p.name for p in folder.glob("*.bin")]:
            raise UserError(f"{name}: {pickles[0]} is a pickle, which can run code; save it as safetensors")
        raise UserError(f"{name}: no {WEIGHTS} in it, so it is incomplete; {AGAIN}")
    config, settings = read_json(folder / CONFIG, AGAIN), read_json(folder / CONFIG, AGAIN, LoraSettings)
    if settings.peft_type != "LORA":
        kind = f"peft_type {settings.peft_type[:40]}"
        raise UserError(f"{name}: {CONFIG} describes no LoRA adapter ({kind}); {AGAIN}")
    if str(settings.init_lora_weights).lower().startswith(("pissa", "olora", "corda", "lora_ga")):
        how = "save it as plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        raise UserError(f"{name}: {settings.init_lora_weights} took a part off the base's weights; {how}")
    if settings.megatron_config:  # PEFT would import the module that the adapter names
        raise UserError(f"{name}: adapters for Megatron are not loaded: they name a module to import")
    if settings.alora_invocation_tokens:
        raise UserError(f"{name}: activated LoRA is not supported: it begins in the middle of a prompt")
    check_weights(folder / WEIGHTS)
    if not (folder / SEAL).exists():
        note(f"note       {name} has no {SEAL}: whether its files are what was trained can't be checked")
    if not (folder / NOTES).is_file():
        return Adapter(folder, config, config.get("base_model_name_or_path") or "", None, None, {})
    notes = read_json(folder / NOTES, AGAIN, Notes)
    if notes.prompt.asks and len(notes.prompt.answers) < 2:
        raise UserError(f"{name}: {NOTES} has fewer than two answers to choose from; {AGAIN}")
    # The base was perhaps named relative to another folder; its whole path is known.
    whole = Path(notes.base.public_name)
    base_model = str(whole) if whole.is_absolute() and whole.exists() else notes.base.name
    others = [*(notes.combination.trained_on if notes.combination else ()), *(notes.earlier or ())]
    dataset = known(notes.dataset) if notes.dataset else {}
    return Adapter(
        folder, config, base_model, notes.prompt, notes.base, dataset, notes.qat, tuple(map(known, others))
    )


def known(rows: DataNotes) -> dict:
    return {k: v for k, v in asdict(rows).items() if v is not None}


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
    compared = ["config_sha256", "revision"]
    if trained.revision == "" and base.revision.startswith(OF_FILES):  # of a version that did not look
        compared.remove("revision")
    for what in compared:
        ours, theirs = getattr(trained, what), getattr(base, what)
        if ours != theirs and trained.public_name == base.public_name and ours.startswith(OF_FILES):
            changed = f"was trained on {base.public_name}, whose weights or tokenizer have changed since"
            raise UserError(f"--adapter {adapter.folder} {changed}; restore them or train again")
        if ours != theirs:
            was = f"was trained on {trained.name}, {what} {ours[:24] or 'none'}"
            now = f"the base is {base.name}, {what} {theirs[:24] or 'none'}; use --model {trained.name}"
            raise UserError(f"--adapter {adapter.folder} {was}, {now}")
    before, now = f"{trained.precision}/{trained.dtype}", f"{base.precision}/{base.dtype}"
    return None if before == now else f"trained on {before}, used on {now}: answers can differ"


@contextlib.contextmanager
def fitting(adapter: Adapter, base: BaseInfo):
    """Turns what PEFT raises on an adapter of another model into a UserError."""
    patterns = isinstance(adapter.config.get("target_modules"), str) and hasattr(signal, "SIGALRM")
    if patterns:  # a regular expression can take years to match a name; this ends it
        signal.signal(signal.SIGALRM, _give_up)
        signal.alarm(PATTERN_SECONDS)
    try:
        with warnings.catch_warnings():  # check_keys() refuses what PEFT only warns of
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            yield
    except UserError:
        raise
    except Exception as error:  # a config can make any line of PEFT fail
        what = f"does not fit {base.name} ({first_line(error)})"
        raise UserError(f"--adapter {adapter.folder} {what}") from None
    finally:
        if patterns:
            signal.alarm(0)


def _give_up(*_) -> None:
    raise TimeoutError("its pattern does not end")


def check_keys(adapter: Adapter, model, name: str = "") -> None:
    """Raises UserError where the file lacks matrices that the model now has, or has some that found no place.

    PEFT warns of the first and says nothing of the second: the model would answer as the base does. `name` is
    what `model` calls the adapter, by default its peft_name.
    """
    name = name or adapter.peft_name
    wanted = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    with safe_open(adapter.folder / WEIGHTS, "pt") as file:
        there = {key.removesuffix(".weight") for key in file.keys()}  # noqa: SIM118
    wanted = {key.removesuffix(".weight") for key in wanted}
    base = {key.removesuffix(".weight") for key in model.state_dict()} if there - wanted else set()
    found = f"--adapter {adapter.folder} does not fit this model:"
    if missing := sorted(wanted - there):
        raise UserError(
            f"{found} no {missing[0]} in it, {len(missing)} of {len(wanted)} matrices are missing"
        )
    if strange := sorted(there - wanted - base):
        count = f"{len(strange)} of its {len(there)} matrices"
        raise UserError(
            f"{found} {count} have no place (first: {strange[0]}); see target_modules in {CONFIG}"
        )


def load_trained(
    adapter: Adapter, device: str = "auto", lane: str = "auto", precision: str | None = None
) -> tuple[torch.nn.Module, Base]:
    """(PEFT model, base) as the adapter was trained: on its own base, at its own precision, by its grid.

    `precision`: the base in another one.
    """
    from peft import LoraConfig, PeftModel

    known = adapter.base
    precision = precision or (known.precision if known else stored_precision(peek(adapter.base_model)))
    base = load_base(adapter.base_model, precision, detect(precision, device, lane), adapter.revision)
    check_base(adapter, base.info)
    with fitting(adapter, base.info):
        config = qat.register(LoraConfig.from_pretrained(adapter.folder), adapter.qat)
        named = {"adapter_name": adapter.peft_name, "config": config}
        model = PeftModel.from_pretrained(base.model, adapter.folder, **named)
        check_keys(adapter, model)
    qat.use_grid(model, adapter.peft_name, adapter.qat)
    make_fast(model, base.hardware.lane)
    return model.eval(), base
