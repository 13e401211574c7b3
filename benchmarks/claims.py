"""Shows what is right where the usual teaching material is wrong (docs/claims.md), one claim after the other.

    python benchmarks/claims.py          # all, half a minute on one slow core; exit code 1 if one fails
    python benchmarks/claims.py 2 11     # some
    python benchmarks/claims.py --json   # all, and writes results/claims.json, which the page shows

What can be computed or measured in seconds is; the rest is read from results of longer runs, or said to be
documentation. The functions are in benchmarks/truths.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT / "benchmarks"), str(ROOT)) if path not in sys.path]

import qlora  # noqa: F401, E402, I001  (first: it sets what torch reads when it is imported)
from truths import Truth, adapters, counting, holding, records, training  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "claims.json"
# Number in docs/claims.md -> what shows the truth.
CLAIMS = {
    1: adapters.scale_and_shapes,
    2: counting.count_on_q_and_v,
    3: counting.four_bit_model,
    4: counting.shrinking,
    5: records.bf16_of_a_t4,
    6: holding.four_bits_on_a_cpu,
    7: records.speed,
    8: counting.memory_against_parameters,
    9: counting.adapter_size,
    10: records.accuracy_on_imdb,
    11: adapters.untrained_is_the_base,
    12: records.gptq_against_nf4,
    13: holding.dtype_of_plain_loading,
    14: holding.defaults_of_four_bits,
    15: training.labels_that_are_input_ids,
    16: adapters.merging,
    17: training.straight_through,
    18: adapters.no_w_o_in_llama,
    19: holding.two_dtypes_in_one_run,
    20: adapters.alpha_and_rate,
    21: records.training_in_four_bits,
    22: holding.memory_comes_back,
    23: counting.seventy_billion,
    24: holding.logits_are_no_probabilities,
    25: counting.largest_adapter,
    26: adapters.forgetting,
    27: training.text_is_no_batch,
    28: counting.seven_million_parameters,
    29: holding.command_of_the_hub,
    30: holding.gguf_is_a_container,
    31: holding.levels_of_nf4,
    32: records.base_under_an_adapter,
    33: holding.range_of_fp16,
}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def show(number: int) -> dict:
    """Print what is true of this claim; {number, holds, text, source, seconds}."""
    began = time.perf_counter()
    try:
        truth = CLAIMS[number]()
    except LookupError as error:  # a longer measurement is not there
        truth = Truth(False, str(error), "nothing")
    print(
        f"{number:>2} {'' if truth.holds else 'NOT AS IT SHOULD BE: '}{truth.text} [{truth.source}]",
        flush=True,
    )
    return {
        "number": number,
        **vars(truth),
        "holds": bool(truth.holds),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main(argv: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("number", nargs="*", type=int, help="of claims; none: all")
    flags.add_argument("--json", action="store_true", help="all, and write results/claims.json")
    asked = flags.parse_args(argv)
    if unknown := [str(number) for number in asked.number if number not in CLAIMS]:
        flags.error(f"no claim {', '.join(unknown)}; there are {min(CLAIMS)} to {max(CLAIMS)}")
    if asked.json and asked.number:
        flags.error("--json is of all claims: name none")
    found = [show(number) for number in asked.number or CLAIMS]
    wrong = [claim["number"] for claim in found if not claim["holds"]]
    if asked.json:
        versions = {name: version(name) for name in PACKAGES}
        OUT.write_text(json.dumps({"versions": versions, "claims": found}, indent=1) + "\n")
    print(f"{len(found) - len(wrong)} of {len(found)} are as docs/claims.md says")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
