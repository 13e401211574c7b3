"""The kernels as operators of torch, so that a memory plan can run them on tensors without data.

kernels.cpp is compiled once for this processor and kept; without a compiler plain.py does the same in torch.
"""

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from qlora.cpu import plain
from qlora.cpu.compiled import HalfProducts, Kernels

SOURCE, HALF_SOURCE = (Path(__file__).with_name(f"{name}.cpp") for name in ("kernels", "half_products"))
# Not -ffast-math: it would let compilers assume that there is no NaN, and the guards look for it.
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mprefer-vector-width=512")
SECONDS = 120  # a compiler that takes longer is not waited for

OPERATORS = {
    "rms_norm": "Tensor x, Tensor? add, Tensor weight, float eps, Tensor(a!)? total, Tensor(b!) y, "
    "Tensor(c!) scale",
    "rms_backward": "Tensor dy, Tensor total, Tensor weight, Tensor scale, Tensor residual, Tensor(a!) out",
    "gate_up": "Tensor both, Tensor(a!) y",
    "gate_up_backward": "Tensor dy, Tensor both, Tensor(a!) dboth",
    "rotate_in": "Tensor qkv, Tensor place, Tensor cosine, Tensor sine, Tensor(a!) q, Tensor(b!) k, "
    "Tensor(c!) v, int per",
    "rotate_back": "Tensor dq, Tensor dk, Tensor dv, Tensor place, Tensor owner, Tensor cosine, Tensor sine, "
    "Tensor(a!) dqkv, int shared, int per",
    "heads_to_flat": "Tensor heads, Tensor owner, Tensor(a!) flat, int length",
    "flat_to_heads": "Tensor flat, Tensor place, Tensor owner, Tensor(a!) heads",
    "softmax": "Tensor(a!) scores, float scale, Tensor(b!) logsum, int per, int first",
    "softmax_backward": "Tensor(a!) scores, Tensor(b!) dp, float scale, Tensor logsum, int per, int first",
}
PANEL = 96  # outputs whose weights stand together (half_products.cpp: COLUMNS)
# Only where the processor calculates in fp16.
HALF_OPERATORS = {
    "half_pack": "Tensor weights, float largest, Tensor(a!) packed",
    "half_product": "Tensor x, Tensor packed, float largest, Tensor(a!) y",
}


@functools.cache
def load() -> tuple[object, str]:
    """(the operators, how they are computed, in words), compiled if that is possible here."""
    try:
        made, how = Kernels(str(library(SOURCE))), "compiled kernels"
    except (CannotCompile, OSError) as reason:  # OSError: what was compiled can't be loaded
        made, how = plain, f"kernels in torch, slower: {reason}"
    _implement(made, OPERATORS)
    return torch.ops.qlora_cpu, how


@functools.cache
def load_half():
    """(the operators of products in fp16, "") or (None, why they are not to be had)."""
    if not processor_has("avx512_fp16"):
        return None, "this processor does not calculate in fp16 (AVX512-FP16)"
    try:
        _implement(HalfProducts(str(library(HALF_SOURCE))), HALF_OPERATORS)
    except (CannotCompile, OSError) as reason:
        return None, str(reason)
    return torch.ops.qlora_cpu, ""


def packed_size(out: int, inputs: int) -> int:
    """Numbers of a matrix packed by half_pack: whole panels of PANEL outputs."""
    return -(-out // PANEL) * PANEL * inputs


class CannotCompile(Exception):
    """No compiler, or one that fails; says which."""


_defined: list[torch.library.Library] = []  # operators live as long as these


def _implement(functions, operators: dict) -> None:
    defined = torch.library.Library("qlora_cpu", "FRAGMENT")
    _defined.append(defined)
    for name, arguments in operators.items():
        defined.define(f"{name}({arguments}) -> ()")
        defined.impl(name, getattr(functions, name), "CPU")
        torch.library.register_fake(f"qlora_cpu::{name}", lambda *args: None, lib=defined)


def library(source: Path) -> Path:
    """The compiled library: kept in the user's cache, or made in a temporary folder if that can't be used.

    Its name has two hashes: of all that it was made from, and of itself. It is written aside and renamed, so
    that processes that compile at once do not see each other's halves. Raises CannotCompile.
    """
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        raise CannotCompile("no C++ compiler (c++) is installed")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    runtime = openmp()
    made_from = [source.read_text(), *FLAGS, version, _processor(), str(runtime)]
    key = _sha256("\0".join(made_from).encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-kernels"
    with contextlib.suppress(OSError):  # read-only or full: then it is made again in each process
        folder.mkdir(parents=True, exist_ok=True)
        if _is_ours(folder):
            for kept in folder.glob(f"{key}-*.so"):  # to load a damaged one would kill the process
                if kept.stem == f"{key}-{_sha256(kept.read_bytes())}":
                    return kept
            with tempfile.TemporaryDirectory(dir=folder) as aside:
                made = _compile(compiler, source, runtime, Path(aside))
                return made.replace(folder / f"{key}-{_sha256(made.read_bytes())}.so")
    _aside.append(tempfile.TemporaryDirectory())
    return _compile(compiler, source, runtime, Path(_aside[-1].name))


_aside: list[tempfile.TemporaryDirectory] = []  # deleted when the process ends


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _compile(compiler: str, source: Path, runtime: Path | None, folder: Path) -> Path:
    # Linked with torch's own OpenMP: a second one would bring threads that get in the way of the first's.
    parallel, linked = (["-fopenmp"], [str(runtime)]) if runtime else ([], [])
    made, out = folder / "kernels.o", folder / "kernels.so"
    compile_it = [compiler, *FLAGS, *parallel, "-c", str(source), "-o", str(made)]
    for command in compile_it, [compiler, "-shared", str(made), "-o", str(out), *linked]:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise CannotCompile(f"{compiler} took more than {SECONDS} s") from None
        if done.returncode:
            first = next(iter(done.stderr.splitlines()), f"exit status {done.returncode}")
            raise CannotCompile(f"{compiler} failed ({first})")
    return out


def openmp() -> Path | None:
    """The OpenMP library that torch computes with; None where it has none (macOS)."""
    from threadpoolctl import threadpool_info

    found = [Path(lib["filepath"]) for lib in threadpool_info() if lib["user_api"] == "openmp"]
    torchs = [path for path in found if Path(torch.__file__).parent in path.parents]
    return next(iter(torchs + found), None)


def _is_ours(folder: Path) -> bool:
    """Whether nobody else can put a library there."""
    status = folder.stat()
    return not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)


def processor_has(flag: str) -> bool:
    """Whether the processor has these instructions; says nothing of their speed."""
    return flag in _processor().split()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()
