"""Adapter -> GGUF files that llama.cpp, Ollama and others run.

    python llama.cpp/export.py                                 # merged: f16 and Q8_0 into gguf-out/
    python llama.cpp/export.py --types Q8_0 Q4_K_M --imatrix   # more types, weighted by the training prompts
    python llama.cpp/export.py --lora                          # base and adapter as two files, nothing merged

Needs llama.cpp/build.sh to have run. A file gets its final name when it is complete, and its chat template,
stop token and BOS are the adapter's; export.json says what each file is. Then: python llama.cpp/parity.py
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import ROOT
from qlora import publishing
from qlora.cards import gguf_card
from qlora.cli import UserError, note, parse, run
from settings import BIN, LESS_MEMORY, ExportSettings


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(ExportSettings, argv, __doc__)
    from gguf_export import llama_cli_flags, make  # torch and transformers: not before the flags are checked
    from qlora.adapters import read_adapter

    if settings.push_to_hub:  # what is wrong with the adapter is told before the hub is asked
        read_adapter(settings.adapter)
    publishing.check(settings)
    first, *others = make(settings)
    lora = f" --lora {shlex.quote(str(others[0]))}" if settings.lora else ""
    adapter = read_adapter(settings.adapter)
    flags = llama_cli_flags(adapter)
    note(f"next       {BIN.relative_to(ROOT)}/llama-cli -m {shlex.quote(str(first))}{lora} {flags}")
    if settings.push_to_hub:
        push(settings, adapter, [first, *others], flags)


def push(s: ExportSettings, adapter, files: list[Path], flags: str) -> None:
    """The GGUF files, what Ollama reads, and a card."""
    from gguf_export import MODELFILES, example_messages

    for file in files:
        if path := written_path(file):
            where = "export it again with a relative --output-dir"
            raise UserError(f"--push-to-hub: {file} holds a path of this machine, {path}; {where}")
    base = adapter.base.public_name if adapter.base else adapter.base_model
    card = gguf_card(s.push_to_hub, base, example_messages(adapter), files, flags)
    modelfile = s.output_dir / MODELFILES[s.lora]
    named = {file.name: file for file in (*files, modelfile)} | {"README.md": card.encode()}
    lora = " --lora" if s.lora else f" --types {shlex.join(s.types)}{' --imatrix' if s.imatrix else ''}"
    where = f" --adapter {shlex.quote(str(s.adapter))} --output-dir {shlex.quote(str(s.output_dir))}"
    forced = " --force" if s.force else ""
    publishing.upload(s, named, s.output_dir, f"python llama.cpp/export.py{where}{lora}{forced}")


def written_path(file: Path) -> str | None:
    """The absolute path that llama-quantize noted of an importance matrix, or None."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    noted = [str(fields[name].contents()) for name in fields if name.startswith("quantize.imatrix.")]
    return next((path for path in noted if Path(path).is_absolute()), None)


if __name__ == "__main__":
    run(main, LESS_MEMORY)
