"""Several processes, one GPU each (torchrun, accelerate launch): who am I, and what do we agree on.

Only the first one fetches, prints and writes. Nothing of torch is imported until the processes meet.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator

import psutil

from qlora.cli import note, require, set_process

LONGEST_FETCH = datetime.timedelta(hours=3)  # the others wait while the first one downloads a model

ALONE = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
_launched, _sharded = ALONE, False  # as read_environment() found it


def rank() -> int:
    """0 of the first process, and of the only one."""
    return _launched["RANK"]


def local_rank() -> int:
    """Number of this process on its machine: the number of its GPU."""
    return _launched["LOCAL_RANK"]


def count() -> int:
    return _launched["WORLD_SIZE"]


def is_first() -> bool:
    return rank() == 0


def is_sharded() -> bool:
    """Whether `accelerate launch` was given FSDP: the base is shared out (qlora/training/sharding.py)."""
    return _sharded and count() > 1


def read_environment() -> None:
    """Check what a launcher set, and drop what would change the run behind its settings' back.

    Only training asks: whoever does not call this is alone. Raises UsageError where a launcher was asked for
    several processes and started one: it would train with another batch size than it was told.
    """
    global _launched, _sharded
    given = {name: os.environ.get(name) or "0" for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    for name, value in given.items():
        number = value.isascii() and value.isdigit() and len(value) < 6
        require(number, f"{name}={value[:20]!r} was set by no launcher: unset it")
    found = {name: int(value) for name, value in given.items()}
    number, several = found["RANK"], found["WORLD_SIZE"]
    set_process(number if several > 1 else 0)
    asked = asked_of_accelerate()
    lost = f"accelerate launch was asked for {asked} processes and started one (it does with --cpu): use"
    require(several > 1 or asked < 2, f"{lost} torchrun --nproc_per_node {asked} qlora_finetune.py …")
    missing = [n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
    alone = f"WORLD_SIZE={several} but no {', '.join(missing)}: unset it, or use torchrun"
    require(several < 2 or not missing, alone)
    require(number < max(1, several), f"RANK={number} but WORLD_SIZE={several}: unset them, or use torchrun")
    _launched = found if several > 1 else ALONE
    _sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    for name in list(os.environ):
        # accelerate would compute in another dtype, accumulate other steps, or wait for other processes.
        if name.startswith(("ACCELERATE_", "FSDP_")) or name in given and several < 2:
            del os.environ[name]


def asked_of_accelerate() -> int:
    """The --num_processes of the `accelerate launch` that started this process; 0 if none did."""
    with contextlib.suppress(psutil.Error):
        words = psutil.Process().parent().cmdline()
        if "launch" in words and any("accelerate" in word for word in words[: words.index("launch")]):
            for word, value in zip(words, words[1:] + [""]):
                name, _, given = word.partition("=")
                if name in ("--num_processes", "--num-processes"):
                    return int(given or value) if (given or value).isdigit() else 0
    return 0


def meet(device: str) -> None:
    """Open the channel between the processes: NCCL between GPUs, gloo between CPUs."""
    import torch
    from accelerate import PartialState

    if count() == 1:
        if device == "cuda" and (gpus := torch.cuda.device_count()) > 1:
            both = f"torchrun --nproc_per_node {gpus} qlora_finetune.py"
            note(f"note       one of {gpus} GPUs is used; for all of them: {both}")
        return
    if device == "cuda":
        torch.cuda.set_device(local_rank())
    PartialState(cpu=device == "cpu", timeout=LONGEST_FETCH)


def wait() -> None:
    """Until every process is here."""
    if count() > 1:
        import torch

        torch.distributed.barrier()


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """The block runs in the first process of each machine, then in the others, which find what it fetched."""
    if count() > 1 and local_rank() > 0:
        wait()
    yield
    if count() > 1 and local_rank() == 0:
        wait()


def told_by_first(value):
    """What the first process passed, in all of them."""
    if count() == 1:
        return value
    import torch

    told = [value]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


def my_share(rows: list) -> list:
    """Every count()-th row; all of them with a sharded base, where all make the same forward passes."""
    return rows if is_sharded() else rows[rank() :: count()]


def shared_out(rows: list, work: Callable[[list], list]) -> list:
    """work(rows), each process doing its share; the whole result in all of them."""
    if count() == 1 or is_sharded():
        return work(rows)
    import torch

    parts: list = [None] * count()
    mine = my_share(rows)
    torch.distributed.all_gather_object(parts, list(work(mine)) if mine else [])
    whole: list = [None] * len(rows)
    for number, part in enumerate(parts):
        whole[number :: count()] = part
    return whole


def added_up(numbers: list[float], device) -> list[float]:
    """The sums over all processes."""
    if count() == 1:
        return numbers
    import torch

    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return total.tolist()
