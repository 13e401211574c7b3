"""Is the file that is deployed still the model that was trained? The same reviews to each.

    python llama.cpp/parity.py                              # exports what gguf-out/ lacks, then measures it
    python llama.cpp/parity.py --gguf my-Q4_K_M.gguf        # only this file
    python llama.cpp/parity.py --gguf base.gguf+lora.gguf   # only this pair
    python llama.cpp/parity.py --endpoint http://127.0.0.1:8000/v1    # a server that runs already

GGUF files are asked through llama-server, as a client would. Writes parity.json, parity.md and parity.png;
exits with 1 and the likely cause if a file breaks its bound.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config  # noqa: F401  (first: it says in one line if packages are missing)
from qlora.cli import parse, require, run
from settings import LESS_MEMORY, ParitySettings


def main(argv: Sequence[str] | None = None) -> None:
    s = parse(ParitySettings, argv, __doc__)
    files = bool(s.gguf or s.calibrated or s.imatrix)
    require(not (s.endpoint and files), "--endpoint asks a server: leave --gguf, --calibrated, --imatrix out")
    require(bool(s.endpoint) or s.served_model is None, "--served-model needs --endpoint")
    # These import torch, so they wait until the flags are checked.
    from base_forms import BaseForms
    from calibrated_forms import measure_calibrated
    from gguf_files import canonical
    from ladder import bound, hold_lora_to_q8, result
    from ladder_report import show, write_record
    from qlora.files import lock_folder, scratch
    from reference import ask_trained, read_questions
    from variants import exported, fault, given, measure

    if s.endpoint:
        from doctor import examine

        lock_folder(s.output_dir).release()
        examine(s)
        return
    s = dataclasses.replace(s, types=tuple(map(canonical, s.types)))
    variants = [given(spec) for spec in s.gguf]
    adapter, questions = read_questions(s)
    lock_folder(s.output_dir).release()  # a folder that can't be written is found before the long part
    variants = variants or exported(s, adapter)
    faults = [fault(variant, adapter) for variant in variants]

    # 1. The reference: what was trained, and the same merged to 16 bits, in transformers
    record = s.output_dir / ("parity-given.json" if s.gguf else "parity.json")  # the ladder's own is kept
    title = f"{'NF4' if adapter.base.precision == 'nf4' else adapter.base.precision} + LoRA"
    with scratch(s.output_dir) as aside:
        trained, merged, kept = ask_trained(adapter, questions, title, aside)
        results = [result(title, trained, trained, questions, None)]
        facts = {"dtype": kept.dtype, "kept": dataclasses.asdict(kept)}
        wanted = bound("transformers", "f16", False, adapter.qat)
        results.append(result("merged 16 bit", merged, trained, questions, wanted, **facts))
        # Its drift is rounding, which all merged files have; of --qat it is the grid, which its own file has.
        if not results[-1]["broken"] and not adapter.qat:
            trained.merge_drift = results[-1]["log_odds_shift"]["rms"]

        for method in s.calibrated:
            results.append(measure_calibrated(method, aside, adapter, trained, questions))
            write_record(record, adapter, questions, results)

        # 2. Each file and the base alone in its form, through llama-server
        forms = BaseForms(adapter, questions, aside)
        for variant, broken in zip(variants, faults):
            results.append(broken or measure(variant, adapter, trained, questions, forms))
            write_record(record, adapter, questions, results)

    # 3. The verdict
    hold_lora_to_q8(results)
    write_record(record, adapter, questions, results)
    show(record, results)


if __name__ == "__main__":
    run(main, LESS_MEMORY)
