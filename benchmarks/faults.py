"""Nothing lost, nobody let in: thousands of faults and attacks, and what came of each.

    python benchmarks/faults.py                    # all kinds; writes results/faults.md and faults.json
    python benchmarks/faults.py --kinds kill disk --trials 10   # kinds named so, ten trials of each
    python benchmarks/faults.py --list                      # the kinds
    python benchmarks/faults.py --cost                      # seconds that hashes and fsync take

Each trial is a real run of a script on a tiny Llama, in a forked process. The same faults are done to a plain
transformers Trainer (trials/plain_trainer.py). Some kinds need root (mounts) or a built llama.cpp; elsewhere
they are skipped, and the table says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from trials import prepare, table  # noqa: E402
from trials.kinds import KINDS  # noqa: E402
from trials.schedule import perform_all, trials_of  # noqa: E402
from trials.verdicts import SURVIVED  # noqa: E402


def read_flags(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", default=[], help="words in their names (all kinds)")
    parser.add_argument("--trials", type=int, help="at most so many of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--systems", nargs="+", default=["qlora", "plain"], choices=["qlora", "plain"])
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "faults", help="writes OUT.md, .json and .jsonl"
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="only --kinds anew; results of the others stay as OUT.jsonl has them",
    )
    parser.add_argument("--list", action="store_true", help="name the kinds and stop")
    parser.add_argument("--cost", action="store_true", help="measure hashes and fsync instead")
    return parser.parse_args(argv)


def chosen(words: list[str]) -> list:
    kinds = [k for k in KINDS if not words or any(word in k.name for word in words)]
    if not kinds:
        raise SystemExit(f"error: no kind is named so; there are: {', '.join(k.name for k in KINDS)}")
    return kinds


def memory_disk() -> str | None:
    """A disk in memory, where there is one with room: fsync costs nothing on it."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > 2 << 30 else None


def main() -> None:
    flags = read_flags()
    if flags.list:
        print("\n".join(f"{kind.name:38} {kind.what}" for kind in KINDS))
        return
    if flags.cost:
        from trials import cost

        return cost.main(flags.out)
    kinds, raw = chosen(flags.kinds), flags.out.with_suffix(".jsonl")
    again = {kind.name for kind in kinds}
    earlier = [json.loads(line) for line in raw.read_text().splitlines()] if flags.again else []
    kept = [result for result in earlier if result["kind"] not in again]
    work = Path(tempfile.mkdtemp(prefix="qlora-faults-", dir=memory_disk()))
    try:
        world = prepare.prepare(work, flags.seed, flags.systems)
        skipped = {kind.name: why for kind in kinds if (why := kind.skip())}
        planned = [
            t
            for k in kinds
            if k.name not in skipped
            for t in trials_of(k, world, flags.trials, flags.systems)
        ]
        print(f"{len(planned)} trials of {len(kinds) - len(skipped)} kinds", file=sys.stderr, flush=True)
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            for setup in {k.setup for k in kinds if k.setup and k.name not in skipped}:
                stack.enter_context(setup(world))
            results = perform_all(world, planned, flags.workers, raw)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    results = kept + results
    raw.write_text("".join(json.dumps(result, default=str) + "\n" for result in results))
    record = table.summary(KINDS if flags.again else kinds, results, skipped, flags)
    table.write(record, flags.out)
    print(table.markdown(record))
    bad = [r for r in results if r["system"] == "qlora" and r["verdict"] != SURVIVED]
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
