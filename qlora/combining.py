"""Several trained adapters of one base -> one adapter, by PEFT's add_weighted_adapter.

Needs no weights of the base: what is added up are the adapters' own matrices.
"""

import json
import math
import shlex
from pathlib import Path

import torch
from peft import PeftModel

from config import InferSettings
from qlora.adapters import NOTES, WEIGHTS, Adapter, check_keys, fitting, read_adapter
from qlora.cli import UserError, note, require
from qlora.files import seal, sha256_of, staged
from qlora.loading import load_tokenizer
from qlora.shapes import model_config, skeleton
from qlora.weights import linear_layers

DENSITY = 0.5  # of TIES and DARE where none is given: the middle of what their papers try
# What a sum of A and B can't hold.
UNFIT = (
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
)


def read_parts(given: tuple[str, ...]) -> list[tuple[Path, float]]:
    """('a:0.7', 'b') -> [(Path('a'), 0.7), (Path('b'), 1.0)]; raises UsageError."""
    parts = []
    for text in given:
        folder, colon, number = text.rpartition(":")
        if not colon or Path(text).is_dir():  # a name may hold colons
            folder, number = text, "1"
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        require(math.isfinite(weight), f"--combine {text}: {number} is no number; write FOLDER:WEIGHT")
        require(Path(folder).is_dir(), f"--combine {text}: there is no folder {folder}")
        parts.append((Path(folder), weight))
    return parts


def combine(s: InferSettings) -> None:
    """Write the adapters of --combine as one into --output-dir, and say how to score it."""
    parts = read_parts(s.combine)
    adapters = [read_adapter(folder) for folder, _ in parts]
    weights = [weight for _, weight in parts]
    first, ranks = adapters[0], [adapter.config["r"] for adapter in adapters]
    for adapter in adapters:
        check_fits(adapter, first)
    summed = s.combination not in ("cat", "svd")  # A by A and B by B
    alike = f"--combination {s.combination} adds A to A and B to B"
    require(not summed or len(set(ranks)) == 1, f"{alike}: ranks are {ranks}, choose cat or svd")
    sparse, several = s.combination not in ("cat", "svd", "linear"), len(adapters) > 1
    require(several or not sparse, f"--combination {s.combination}: needs two adapters at least")
    density = (s.density or DENSITY) if sparse else None
    show_differences(adapters)
    model = summed_up(adapters, weights, s.combination, density, s.seed)
    with staged(s.output_dir) as made:
        save(model, made, adapters, weights, s, density)
    r = model.peft_config["default"].r
    note(f"written    {s.output_dir}/: {len(adapters)} adapters in one of rank {r} ({s.combination})")
    folders = [*(a.folder for a in adapters), s.output_dir]
    every = " ".join(f"--adapter {shlex.quote(str(folder))}" for folder in folders)
    whole = [a.dataset for a in adapters if "name" in a.dataset and not a.dataset.get("parts")]
    for name in dict.fromkeys(rows["name"] for rows in whole):
        note(f"next       python qlora_inference.py {every} --evaluate --dataset {shlex.quote(name)}")


def check_fits(adapter: Adapter, first: Adapter) -> None:
    """Raises UserError unless an adapter can be added to the first one."""
    name = f"--combine {adapter.folder}"
    if adapter.base is None:
        raise UserError(f"{name}: no {NOTES} in it, so which base it belongs to is unknown")
    if held := [key for key in UNFIT if adapter.config.get(key)]:
        raise UserError(f"{name}: {', '.join(held)} can't be added up; only plain LoRA can")
    for what in ("config_sha256", "revision", "precision"):
        ours, theirs = getattr(adapter.base, what), getattr(first.base, what)
        if ours != theirs:
            bases = f"{adapter.base.name} ({what} {ours[:24]})", f"{first.base.name} ({what} {theirs[:24]})"
            raise UserError(f"{name}: trained on {bases[0]}, {first.folder} on {bases[1]}")
    kinds = {type(a.config.get("target_modules")) for a in (adapter, first)}
    if len(kinds) > 1:
        raise UserError(f"{name}: target_modules is a list in one adapter and a pattern in another")


def show_differences(adapters: list[Adapter]) -> None:
    """Notes of what the combination can't have of all: the prompt, held-out rows."""
    first = adapters[0]
    others = [a.name for a in adapters if a.prompt != first.prompt]
    if others:
        note(f"note       {', '.join(others)}: trained with another prompt; {first.name}'s is kept")
    if len({a.qat for a in adapters}) > 1:
        note("note       trained through different grids (--qat): the combination is used without one")
    seeds: dict[str, set] = {}
    for adapter in adapters:
        seeds.setdefault(adapter.dataset.get("name"), set()).add(adapter.dataset.get("seed"))
    for name in [name for name, drawn in seeds.items() if len(drawn) > 1]:
        what = "rows that one held out the other was trained on"
        note(f"note       {name} was split by different seeds: {what}, and scores on it are too good")


def summed_up(adapters: list[Adapter], weights: list[float], kind: str, density, seed: int):
    """PEFT model whose adapter "default" is the weighted combination, on the CPU in fp32."""
    base, names = frame_of(adapters[0]), [f"part_{i}" for i in range(len(adapters))]
    model = base
    for adapter, name in zip(adapters, names):
        with fitting(adapter, adapter.base):
            if model is base:
                model = PeftModel.from_pretrained(base, adapter.folder, adapter_name=name, torch_device="cpu")
            else:
                model.load_adapter(str(adapter.folder), adapter_name=name, torch_device="cpu")
            check_keys(adapter, model, name)
    # PEFT hands the first one's rsLoRA on, and then scales by sqrt(r) what is scaled already.
    model.peft_config[names[0]].use_rslora = False
    torch.manual_seed(seed)  # DARE drops entries at random
    model.add_weighted_adapter(names, weights, "default", combination_type=kind, density=density)
    return model


def frame_of(adapter: Adapter):
    """The base without its weights: each linear layer has one zero for all of them, so that PEFT fits."""
    frame = skeleton(model_config(adapter.base_model)[0])
    for _, layer in linear_layers(frame):
        layer.weight = torch.nn.Parameter(torch.zeros(1).expand(layer.weight.shape), requires_grad=False)
    return frame


def save(
    model, folder: Path, adapters: list[Adapter], weights: list[float], s: InferSettings, density
) -> None:
    """The adapter in PEFT's format, the first one's tokenizer and notes, and what it was made of; sealed."""
    first = adapters[0].folder
    model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's blank model card
    if (first / "tokenizer_config.json").is_file():
        load_tokenizer(first).save_pretrained(folder)
    parents = [
        {"adapter": a.name, "weight": weight, "sha256": sha256_of(a.folder / WEIGHTS)}
        for a, weight in zip(adapters, weights)
    ]
    about = {"kind": s.combination, "density": density, "seed": s.seed, "parents": parents}
    about["trained_on"] = [rows for a in adapters for rows in (a.dataset, *a.others) if rows]
    grids = {a.qat for a in adapters}  # a sum was trained through none, but it is meant for the same file
    notes = json.loads((first / NOTES).read_text(encoding="utf-8"))
    notes |= {"qat": grids.pop() if len(grids) == 1 else None, "combination": about}
    (folder / NOTES).write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")
    seal(folder)
