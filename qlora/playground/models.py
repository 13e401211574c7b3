"""What can be chosen on the page: adapters, and the base in one precision at a time."""

import contextlib
import gc
import math
import threading
from pathlib import Path

import psutil
from peft import LoraConfig, PeftModel

from config import BUNDLED, PRECISIONS, PlaygroundSettings
from qlora import adapters, files, hardware, loading, qat
from qlora.adapters import Adapter
from qlora.cli import UserError, require
from qlora.cpu.attach import MEMORY_SHARE
from qlora.fast import make_fast
from qlora.packed import METHODS as PACKED
from qlora.shapes import peek, skeleton, stored_precision

USUAL = "qlora-out"  # where qlora_finetune.py writes
OFFERED = ("nf4", "bf16", "fp32")
# At the most, the copy for a CPU's products included; those that are not named here are not offered.
BYTES_PER_WEIGHT = {"nf4": 4.6, "bf16": 6, "fp32": 4}
ON_GPU = {"nf4": 0.7, "bf16": 2, "fp32": 4}


def find_adapters(s: PlaygroundSettings) -> list[Adapter]:
    """Those of --adapter; by default qlora-out and the others here that have its base. [] is the base alone.

    Raises UserError for one that was named and can't be used; others are left out.
    """
    if s.adapter:
        named = [Path(name) for name in s.adapter if s.adapter != ("none",)]
        chosen = [adapters.read_adapter(path, adapters.OR_NONE) for path in named]
        names = [adapter.name for adapter in chosen]
        require(len(set(names)) == len(names), f"--adapter: two have the same name ({', '.join(names)})")
        return chosen
    here = {
        folder.name: folder for folder in sorted(Path().iterdir()) if (folder / adapters.CONFIG).is_file()
    }
    own = here.pop(USUAL, None)
    found = [adapters.read_adapter(own)] if own else []
    for folder in here.values():
        if not (folder / adapters.NOTES).is_file() or files.broken_files(folder) != []:
            continue
        with contextlib.suppress(UserError):
            adapter = adapters.read_adapter(folder)
            if not found or same_base(adapter, found[0]):
                found.append(adapter)
    return found


def same_base(one: Adapter, other: Adapter) -> bool:
    of = [(a.base.config_sha256, a.base.revision) if a.base else None for a in (one, other)]
    return of[0] == of[1] is not None


class Models:
    """The base in one precision, with all adapters beside it. `lock` is held by whoever uses the model."""

    def __init__(self, s: PlaygroundSettings, chosen: list[Adapter]):
        self.settings, self.adapters = s, {adapter.name: adapter for adapter in chosen}
        first = chosen[0] if chosen else None
        self.name = s.model if s.model != "auto" else first.base_model if first else BUNDLED
        self.revision = first.revision if first and first.base_model == self.name else None
        trained = first.base.precision if first and first.base else stored_precision(peek(self.name))
        self.first = trained if s.precision == "auto" else s.precision
        self.lock, self.precision, self.warnings = threading.RLock(), "", {}
        self.model = self.base = None

    def use(self, precision: str) -> None:
        """Hold the base in this precision from now on; after a UserError in the one that it was in."""
        with self.lock:
            if precision == self.precision:
                return
            before, self.precision, self.model, self.base = self.precision, "", None, None
            gc.collect()
            hardware.return_freed_memory()
            try:
                self.load(precision)
            except UserError:
                if before:
                    self.load(before)
                raise

    def load(self, precision: str) -> None:
        s, chosen = self.settings, list(self.adapters.values())
        machine = hardware.detect(precision, s.device, s.lane)
        base = loading.load_base(self.name, precision, machine, self.revision)
        model, grid = base.model, next((adapter.qat for adapter in chosen if adapter.qat), None)
        for adapter in chosen:
            self.warnings[adapter.name] = adapters.check_base(adapter, base.info) or ""
            config = qat.register(LoraConfig.from_pretrained(adapter.folder), grid)
            with adapters.fitting(adapter, base.info):
                if model is base.model:
                    named = {"adapter_name": adapter.peft_name, "config": config}
                    model = PeftModel.from_pretrained(model, adapter.folder, **named)
                else:
                    if grid:  # PEFT makes the layers by a config that it knows
                        model.add_adapter(adapter.peft_name, config)
                    model.load_adapter(str(adapter.folder), adapter_name=adapter.peft_name)
                adapters.check_keys(adapter, model)
            qat.use_grid(model, adapter.peft_name, adapter.qat)
        make_fast(model, machine.lane)
        self.model, self.base, self.precision = model.eval(), base, precision

    @property
    def precisions(self) -> list[str]:
        """The first one, and what else this memory holds and these weights can be read in."""
        config = peek(self.name)
        if config is None:
            return [self.first]
        weights = sum(math.prod(p.shape) for p in skeleton(config).parameters())
        on_gpu = self.base is not None and self.base.hardware.device == "cuda"
        memory = self.base.hardware.memory_gib * 2**30 if on_gpu else psutil.virtual_memory().total
        sizes = ON_GPU if on_gpu else BYTES_PER_WEIGHT
        packed = stored_precision(config) in PACKED
        kinds = [name for name in OFFERED if not (packed and isinstance(PRECISIONS[name], dict))]
        fits = [name for name in kinds if weights * sizes[name] < MEMORY_SHARE * memory]
        return list(dict.fromkeys([self.first, *fits]))

    def described(self) -> str:
        """'smollm2-135m in nf4, computed in float32'"""
        return f"{self.base.info.name} in {self.precision}, computed in {self.base.info.dtype}"
