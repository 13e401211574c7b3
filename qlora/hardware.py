"""Which device, which compute dtype, and why."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from contextlib import nullcontext
from dataclasses import dataclass

import torch

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

        On a CPU the model is in `dtype` already and qlora/fast.py casts the adapters itself; autocast would only add copies.
        """
        sixteen = self.device == "cuda" and self.dtype != torch.float32
        return torch.autocast("cuda", dtype=self.dtype) if sixteen else nullcontext()


def detect(precision: str = "nf4") -> Hardware:
    """The first CUDA device if there is one, else the CPU; bf16 wherever the chip computes in it.

    A 16 or 32-bit `precision` asked for by name is also what is computed in.
    """
    found = _detect()
    asked = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.get(precision, found.dtype)
    return found if asked == found.dtype else dataclasses.replace(found, dtype=asked, why=f"--precision {precision} asks for it")


def _detect() -> Hardware:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = (properties.major, properties.minor)
        # torch.cuda.is_bf16_supported() also says yes to emulation (T4), which is several times slower than fp16.
        bf16 = capability >= (8, 0)
        return Hardware(
            device="cuda",
            name=properties.name,
            dtype=torch.bfloat16 if bf16 else torch.float16,
            why=f"compute capability {capability[0]}.{capability[1]}: "
            + ("bf16 in hardware" if bf16 else "no bf16 in hardware, so fp16 with a gradient scaler and fp32 adapters"),
            memory_gib=properties.total_memory / 2**30,
        )
    dtype, why = cpu_dtype()
    memory = _cpu_memory_bytes() / 2**30
    return Hardware("cpu", _cpu_name(), dtype, why, memory)


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
    note(f"versions   python {env['python']}, torch {env['torch']}, transformers {env['transformers']}, peft {env['peft']}, bitsandbytes {env['bitsandbytes']}")


def peak_memory_bytes(device: str) -> int:
    """Peak so far: of the CUDA allocator on a GPU, of the process (resident set) on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows, where nothing else asks for it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def return_freed_memory() -> None:
    """Give freed pages back to the system (glibc only): batches of ever new lengths fragment its heap by a gigabyte."""
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


def _cpu_memory_bytes() -> int:
    import psutil

    return psutil.virtual_memory().total
