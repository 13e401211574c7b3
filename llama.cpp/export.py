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
from qlora.cli import note, parse, run
from settings import BIN, LESS_MEMORY, ExportSettings


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(ExportSettings, argv, __doc__)
    from gguf_export import llama_cli_flags, make  # torch and transformers: not before the flags are checked
    from qlora.adapters import read_adapter

    first, *others = make(settings)
    lora = f" --lora {shlex.quote(str(others[0]))}" if settings.lora else ""
    flags = llama_cli_flags(read_adapter(settings.adapter))
    note(f"next       {BIN.relative_to(ROOT)}/llama-cli -m {shlex.quote(str(first))}{lora} {flags}")


if __name__ == "__main__":
    run(main, LESS_MEMORY)
