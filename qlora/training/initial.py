"""--init-adapter: a run that goes on from a trained adapter, of this task or of another one."""

import contextlib
import dataclasses
from collections.abc import Iterator

from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file

from config import LORA_VARIANTS
from qlora import data
from qlora.adapters import WEIGHTS, Adapter, check_base, check_keys, fitting, read_adapter
from qlora.cli import UsageError, UserError, note, require
from qlora.loading import Base
from qlora.variants import Start

# What a fresh adapter of the flags has no place for.
UNFIT = ("modules_to_save", "trainable_token_indices", "rank_pattern", "alpha_pattern", "lora_bias")


def read(s) -> Adapter | None:
    """The checked adapter of --init-adapter; UserError or UsageError where nothing can go on from it."""
    if s.init_adapter is None:
        return None
    one = f"--init-adapter {s.init_adapter} is in --output-dir {s.output_dir}: choose another --output-dir"
    inside = s.init_adapter.resolve()
    require(s.output_dir.resolve() not in (inside, *inside.parents), one)
    fresh = f"--lora-variant {s.lora_variant} says how a fresh adapter begins: leave it out"
    require(s.lora_variant in ("lora", "rslora", "dora"), f"--init-adapter: {fresh}")
    with told_by_flag():
        adapter = read_adapter(s.init_adapter)
    held = [key for key in UNFIT if adapter.config.get(key)]
    require(not held, f"--init-adapter {s.init_adapter}: {', '.join(held)} can't be trained on here")
    return adapter


def with_its_base(s, adapter: Adapter | None):
    """Settings in which `auto` stands for the model and the precision that the adapter was trained on."""
    if adapter and s.model == "auto" and adapter.base_model:
        s = dataclasses.replace(s, model=adapter.base_model)
        if s.precision == "auto" and adapter.base:
            s = dataclasses.replace(s, precision=adapter.base.precision)
    return s


def revision_of_base(s, adapter: Adapter | None) -> str | None:
    """The hub commit that the adapter's base had."""
    return adapter.revision if adapter and s.model == adapter.base_model else None


def begin(model, base: Base, adapter: Adapter, s) -> Start:
    """Put the adapter's matrices into the fresh one in `model`.

    Raises UserError for another base, UsageError where rank, scale, variant or targets are not its own.
    """
    with told_by_flag():
        if warning := check_base(adapter, base.info):
            note(f"note       {warning}")
        check_settings(adapter, model.peft_config["default"], s)
        with fitting(adapter, base.info):
            check_keys(adapter, model, "default")
            set_peft_model_state_dict(model, load_file(adapter.folder / WEIGHTS), adapter_name="default")
    if adapter.qat != s.qat:
        note(f"note       {adapter.name} was trained with --qat {adapter.qat}, this run with --qat {s.qat}")
    note(f"adapter    goes on from {adapter.folder}")
    tell_of_rows(adapter, s)
    return Start(LORA_VARIANTS[s.lora_variant], initial=adapter.folder)


def check_settings(adapter: Adapter, fresh: LoraConfig, s) -> None:
    """Raises UsageError that names every flag by which `fresh` is another adapter."""
    config = adapter.config
    variant = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    its = {
        "--lora-r": config.get("r", 8),
        "--lora-alpha": config.get("lora_alpha", 8),
        "--lora-variant": variant,
    }
    ours = {"--lora-r": fresh.r, "--lora-alpha": fresh.lora_alpha, "--lora-variant": s.lora_variant}
    names = {key.split(".lora_")[0].rsplit(".", 1)[-1] for key in load_file(adapter.folder / WEIGHTS)}
    its["--target-modules"] = ",".join(sorted(names))
    ours["--target-modules"] = ",".join(sorted(fresh.target_modules))
    other = [flag for flag in its if its[flag] != ours[flag]]
    found = ", ".join(f"{flag} {its[flag]}, not {ours[flag]}" for flag in other)
    fix = " ".join(f"{flag} {its[flag]}" for flag in other)
    require(not other, f"--init-adapter {s.init_adapter} was trained with {found}: add {fix}")


def tell_of_rows(adapter: Adapter, s) -> None:
    """A note where rows that are held out now may have taught the adapter before."""
    now = data.identity(s.dataset)
    for rows in adapter.all_rows:
        whole = (rows["name"], rows.get("seed")) == (now["name"], s.seed)
        if whole and (rows.get("eval_samples") or 0) >= s.eval_samples:
            continue
        both = [o for o in data.parts_of(rows) if any(data.same_rows(o, part) for part in data.parts_of(now))]
        if both:
            held = f"--seed {rows.get('seed')} --eval-samples {rows.get('eval_samples')}"
            what = f"{adapter.name} held out other rows of {both[0]['name']} ({held})"
            note(f"note       {what}: it may have seen these")


@contextlib.contextmanager
def told_by_flag() -> Iterator[None]:
    """Errors about --adapter name the flag of this script."""
    try:
        yield
    except UserError as error:
        said = str(error).replace("--adapter ", "--init-adapter ", 1)
        raise (UsageError if isinstance(error, UsageError) else UserError)(said) from None
