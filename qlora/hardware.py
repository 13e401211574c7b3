"""Which device, which compute dtype, and why."""

import dataclasses
import importlib.metadata
import platform
from contextlib import nullcontext
from dataclasses import dataclass

import psutil
import torch

from config import PRECISIONS
from qlora.cli import UserError, note
from qlora.cpu import kernels, lanes
from qlora.cuda import find_trouble
from qlora.processes import count, is_sharded, local_rank, told_by_first

SIZES = (576, 1536)  # the bundled model's widths


@dataclass(frozen=True)
class Hardware:
    device: str  # "cuda" or "cpu"
    name: str
    dtype: torch.dtype  # of matrix products
    why: str
    memory_gib: float
    capability: tuple[int, int] | None = None  # of a GPU
    not_cuda: str = ""  # why a CPU: "no CUDA device" or "--device cpu"
    unused: str = ""  # what is wrong with a GPU that is here
    lane: str = ""  # of a CPU: how it computes the products of training (qlora/cpu/lanes.py)

    @property
    def loads_to(self) -> str:
        """Where weights are loaded to; a base that one GPU can't hold is sharded from the CPU."""
        return "cpu" if is_sharded() else self.own_device

    @property
    def own_device(self) -> str:
        """This process's device, as torch takes it."""
        return self.device if self.device == "cpu" else f"cuda:{local_rank()}"

    def autocast(self):
        """On a GPU, matrix products in `dtype` although adapters are kept in fp32.

        On a CPU it would only add copies: the model is in `dtype`, and qlora/cpu computes by its lane.
        """
        sixteen = self.device == "cuda" and self.dtype != torch.float32
        return torch.autocast("cuda", dtype=self.dtype) if sixteen else nullcontext()


def detect(precision: str = "nf4", device: str = "auto", lane: str = "auto", sizes=SIZES) -> Hardware:
    """This process's CUDA device if it can be used, else the CPU.

    It computes in a 16 or 32-bit `precision`; else a GPU in bf16 if it can, and a CPU as `lane` says.
    `device`: auto, cuda or cpu. `sizes`: widths of the hidden states and of the MLP, for the trial that
    chooses a lane. Raises UserError where `cuda` can't be had.
    """
    found, name = _detect(device, lane, sizes), PRECISIONS[precision]
    asked = getattr(torch, name) if isinstance(name, str) else found.dtype
    why = found.why if asked == found.dtype else f"--precision {precision} asks for it"
    return dataclasses.replace(found, dtype=asked, why=why)


def like_the_first(mine: Hardware) -> Hardware:
    """With the lane and dtype of the first process: on CPUs each has its own trial, and they may differ."""
    lane, dtype = told_by_first((mine.lane, mine.dtype))
    if mine.device != "cpu" or (lane, dtype) == (mine.lane, mine.dtype):
        return mine
    return dataclasses.replace(mine, lane=lane, dtype=dtype, why="as in the first process")


def as_it_began(mine: Hardware, dtype: str | None) -> Hardware:
    """With the dtype in which the run to be resumed began: --lane libraries finds its own in a trial."""
    began = {str(known): known for known in lanes.DTYPES.values()}.get(f"torch.{dtype}")
    if mine.lane != "libraries" or began in (None, mine.dtype):
        return mine
    return dataclasses.replace(mine, dtype=began, why="as when the run began")


def precision_of(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> 'bf16'"""
    return next(name for name, value in PRECISIONS.items() if value == str(dtype).removeprefix("torch."))


def _detect(device: str = "auto", lane: str = "auto", sizes=SIZES) -> Hardware:
    trouble = find_trouble() if device != "cpu" else None
    if device == "cuda" and trouble:
        raise UserError(f"--device cuda: {trouble.text}")
    if trouble and trouble.card and count() > 1:  # the others may have found theirs
        raise UserError(trouble.text)
    if device == "cpu" or trouble:
        unused = trouble.text if trouble and trouble.card else ""
        why_cpu = "--device cpu" if device == "cpu" else "no CUDA device"
        lane, dtype, why = cpu_lane(lane, sizes)
        memory = psutil.virtual_memory().total / 2**30
        return Hardware("cpu", _cpu_name(), dtype, f"{why_cpu}; {why}", memory, None, why_cpu, unused, lane)
    card = torch.cuda.get_device_properties(local_rank())
    # torch.cuda.is_bf16_supported() also says yes to emulation (T4), which is several times slower than fp16.
    bf16 = (card.major, card.minor) >= (8, 0)
    dtype = torch.bfloat16 if bf16 else torch.float16
    why = f"compute capability {card.major}.{card.minor}: "
    why += "bf16 in hardware" if bf16 else "no bf16, so fp16 with a gradient scaler and fp32 adapters"
    return Hardware("cuda", card.name, dtype, why, card.total_memory / 2**30, (card.major, card.minor))


def cpu_lane(lane: str, sizes: tuple[int, int]) -> tuple[str, torch.dtype, str]:
    """(lane, the dtype in which the libraries compute, why); see qlora/cpu/lanes.py."""
    why = f"--lane {lane} asks for it"
    if lane == "fp16" and (missing := kernels.load_half()[1]):
        raise UserError(f"--lane fp16: {missing}; choose another --lane")
    if lane not in lanes.LANES:
        chosen, why = lanes.choose(*sizes)
        lane = chosen if lane == "auto" else lane
    else:
        chosen = lane
    return lane, lanes.DTYPES.get(chosen, torch.float32), why


def environment(hardware: Hardware) -> dict:
    """Versions and device, as report.json records them."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "device": hardware.device,
        "device_name": hardware.name,
        "device_memory_gib": round(hardware.memory_gib, 1),
        "threads": torch.get_num_threads(),
        "dtype": str(hardware.dtype).removeprefix("torch."),
        "lane": hardware.lane,
        "why": hardware.why,
    }


def show(hardware: Hardware, computes: bool = True) -> None:
    """The first lines of a run: on what, in which arithmetic (if it computes), with which libraries."""
    env = environment(hardware)
    note(f"device     {hardware.name}, {hardware.memory_gib:.0f} GiB")
    if hardware.unused:
        note(f"note       a GPU is not used: {hardware.unused}")
    if computes:
        note(f"dtype      {env['dtype']}: {hardware.why}")
    shown = ("python", "torch", "transformers", "peft", "bitsandbytes")
    note(f"versions   {', '.join(f'{name} {env[name]}' for name in shown)}")


_earlier_peak = 0  # of the CUDA allocator, before it was told to forget


def restart_cuda_peak() -> None:
    """Let torch's count of allocated bytes begin anew; peak_memory_bytes() remembers what came before."""
    global _earlier_peak
    _earlier_peak = max(_earlier_peak, torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes(device: str) -> int:
    """Peak of the whole process so far: of the CUDA allocator on a GPU, its resident set on a CPU."""
    if device == "cuda":
        return max(_earlier_peak, torch.cuda.max_memory_allocated())
    if platform.system() == "Windows":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def return_freed_memory() -> None:
    """Give freed memory back to the system, so that other programs can have it.

    glibc: batches of many lengths fragment its heap by 1 GB. CUDA: torch's allocator keeps what was freed.
    """
    import ctypes

    if torch.cuda.is_available():
        torch.cuda.empty_cache()

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if platform.system() == "Linux" else None
    if trim:
        trim(0)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"
