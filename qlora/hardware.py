"""Which device, which compute dtype, and why."""

import dataclasses
import importlib.metadata
import platform
from contextlib import nullcontext
from dataclasses import dataclass

import psutil
import torch

from config import PRECISIONS
from qlora.cli import note


@dataclass(frozen=True)
class Hardware:
    device: str  # "cuda" or "cpu"
    name: str
    dtype: torch.dtype  # of matrix products
    why: str
    memory_gib: float

    def autocast(self):
        """On a GPU, matrix products in `dtype` although adapters are kept in fp32.

        On a CPU it would only add copies: the model is in `dtype`, and qlora/fast.py casts the adapters.
        """
        sixteen = self.device == "cuda" and self.dtype != torch.float32
        return torch.autocast("cuda", dtype=self.dtype) if sixteen else nullcontext()


def detect(precision: str = "nf4") -> Hardware:
    """The first CUDA device, else the CPU; computes in a 16 or 32-bit `precision`, else in bf16 if it can."""
    found, name = _detect(), PRECISIONS[precision]
    asked = getattr(torch, name) if isinstance(name, str) else found.dtype
    why = found.why if asked == found.dtype else f"--precision {precision} asks for it"
    return dataclasses.replace(found, dtype=asked, why=why)


def precision_of(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> 'bf16'"""
    return next(name for name, value in PRECISIONS.items() if value == str(dtype).removeprefix("torch."))


def _detect() -> Hardware:
    if not torch.cuda.is_available():
        return Hardware("cpu", _cpu_name(), *cpu_dtype(), psutil.virtual_memory().total / 2**30)
    card = torch.cuda.get_device_properties(0)
    # torch.cuda.is_bf16_supported() also says yes to emulation (T4), which is several times slower than fp16.
    bf16 = (card.major, card.minor) >= (8, 0)
    dtype = torch.bfloat16 if bf16 else torch.float16
    why = f"compute capability {card.major}.{card.minor}: "
    why += "bf16 in hardware" if bf16 else "no bf16, so fp16 with a gradient scaler and fp32 adapters"
    return Hardware("cuda", card.name, dtype, why, card.total_memory / 2**30)


def cpu_dtype() -> tuple[torch.dtype, str]:
    """bf16 where the processor multiplies in it, fp32 elsewhere (emulated bf16 is slower than fp32)."""
    if torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "no CUDA device; the processor has AMX, which multiplies in bf16"
    if torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16, "no CUDA device; the processor has AVX512-BF16"
    if platform.machine() in ("arm64", "aarch64") and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16, "no CUDA device; the Arm processor multiplies in bf16"
    return torch.float32, "no CUDA device; the processor has no bf16 arithmetic, so fp32"


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
        "why": hardware.why,
    }


def show(hardware: Hardware) -> None:
    """The first lines of a run: on what, in which arithmetic and why, with which libraries."""
    env = environment(hardware)
    note(f"device     {hardware.name}, {hardware.memory_gib:.0f} GiB")
    note(f"dtype      {env['dtype']}: {hardware.why}")
    shown = ("python", "torch", "transformers", "peft", "bitsandbytes")
    note(f"versions   {', '.join(f'{name} {env[name]}' for name in shown)}")


def peak_memory_bytes(device: str) -> int:
    """Peak so far: of the CUDA allocator on a GPU, of the process (resident set) on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows, where nothing else asks for it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def return_freed_memory() -> None:
    """Give freed pages back to the system (glibc): batches of many lengths fragment its heap by 1 GB."""
    import ctypes

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
