"""llama.cpp/build.sh with CUDA: for a GPU that is not here, and tried on the machine that has it.

The first half pretends all tools. The second half needs a real nvcc and llama.cpp's source.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from test_llama_build import NAMES, SCRIPT, TOOLS, build, write

ALL_TOOLS = (*TOOLS, "sort", "env", "sleep")
LIST = "75-real;80-real;86-real;89-real;90;120-real"
SEES = 'case "$*" in *--list-devices*) echo "  CUDA0: a card"; exit ;; esac\n'  # what a program answers
PARIS = 'echo " Paris."'
NO_GPU = "failed to initialize CUDA: CUDA driver version is insufficient for CUDA runtime version"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout with a fake nvcc of CUDA 13.0, and a cmake that makes programs from the file `program`."""
    here, fake = tmp_path / "llama.cpp", tmp_path / "bin"
    here.mkdir()
    fake.mkdir()
    shutil.copy(SCRIPT, here)
    shutil.copy(shutil.which("true"), fake / "c++")
    write(fake / "python", "echo b1; echo model.gguf")
    nvcc(tmp_path, "13.0", "75 80 86 87 89 90 100 120")
    write(tmp_path / "program", SEES + PARIS)
    write(tmp_path / "says", "echo '-- OpenSSL found: 3.0.1'")
    copies = f'for t in {NAMES}; do cp "{tmp_path}/program" "{here}/build/bin/$t"; done'
    write(
        fake / "cmake",
        f'echo "$*" >> "{tmp_path}/called"; mkdir -p "{here}/build/bin"; {copies}; {tmp_path}/says',
    )
    return tmp_path


def nvcc(checkout: Path, release: str, known: str) -> None:
    listed = "; ".join(f"echo compute_{arch}" for arch in known.split())
    version = f"echo 'Cuda compilation tools, release {release}, V{release}.1'"
    write(checkout / "bin" / "nvcc", f'case "$1" in --list-gpu-arch) {listed} ;; *) {version} ;; esac')


def card(checkout: Path, capability: str = "8.6", driver: str = "13.0") -> None:
    """Put a GPU (or two of its kind) into the machine."""
    shown = f"echo '| NVIDIA-SMI 580.1   Driver Version: 580.1   CUDA Version: {driver}  |'"
    asked = f"echo {capability}; echo {capability}"
    smi = checkout / "bin" / "nvidia-smi"
    write(smi, f'case "$1" in -L) echo "GPU 0" ;; --query*) {asked} ;; *) {shown} ;; esac')


def run(checkout: Path, *flags, **env):
    """(finished process, how cmake was called, {name: lines} of the files that record a build)."""
    python = str(checkout / "bin" / "python")
    done = build(checkout, *flags, tools=ALL_TOOLS, **{"PYTHON": python, "CUDA_HOME": "/nowhere", **env})
    log = checkout / "called"
    called = log.read_text() if log.exists() else ""
    log.unlink(missing_ok=True)
    records = (checkout / "llama.cpp" / "build").glob("*proved")
    return done, called, {path.name: path.read_text().splitlines() for path in records}


def test_without_a_gpu_the_common_cards_are_built_for_and_nothing_is_proved(checkout):
    done, called, records = run(checkout, "--cuda")
    assert done.returncode == 0, done.stderr
    assert f"-DCMAKE_CUDA_ARCHITECTURES={LIST}\n" in called and "-DGGML_CUDA=ON" in called
    assert "-DGGML_NATIVE=OFF" in called  # the GPU's processor is another one, too
    words = "for any usual processor and compute capability 75;80;86;89;90;120"
    assert records == {"unproved": ["cuda", f"cuda, {words}"]}
    assert "can't be tried without a GPU: run llama.cpp/build.sh on" in done.stderr.splitlines()[-1]
    for flags in ([], ["--cuda"]):  # no flag is no wish for a CPU build in its place
        again, called, records = run(checkout, *flags)
        assert again.returncode == 0 and not called and "unproved" in records
        assert len(again.stderr.splitlines()) == 1 and words in again.stderr


@pytest.mark.parametrize(
    "release, known, expected",
    [
        ("11.5", "75 80 86 87", "75-real;80-real;86"),
        ("12.4", "50 75 80 86 89 90", "75-real;80-real;86-real;89-real;90"),
    ],
)
def test_an_older_nvcc_builds_for_the_cards_that_it_knows(checkout, release, known, expected):
    """The newest also as PTX, from which the driver compiles for newer cards."""
    nvcc(checkout, release, known)
    assert f"-DCMAKE_CUDA_ARCHITECTURES={expected}\n" in run(checkout, "--cuda")[1]


def test_one_kind_of_card_can_be_asked_for(checkout):
    assert "-DCMAKE_CUDA_ARCHITECTURES=75-real\n" in run(checkout, "--cuda", CUDAARCHS="75-real")[1]


def test_the_machine_with_the_gpu_proves_a_build_and_makes_nothing_anew(checkout):
    run(checkout, "--cuda")
    for tool in ("cmake", "c++", "nvcc"):  # as in a container that only runs programs
        (checkout / "bin" / tool).unlink()
    card(checkout)
    done, called, records = run(checkout)
    assert done.returncode == 0, done.stderr
    assert not called and list(records) == ["proved"] and records["proved"][0] == "cuda"
    assert "compute capability 75;80;86;89;90;120" in records["proved"][1]
    assert "proved: The capital of France is Paris." in done.stderr
    assert "nothing to do" in run(checkout, "--cuda")[0].stderr


def test_a_build_that_answers_wrong_on_that_machine_is_made_for_it(checkout):
    write(checkout / "program", SEES + "echo ' !!!!'")
    run(checkout, "--cuda")
    write(checkout / "program", SEES + PARIS)
    card(checkout, "7.5")
    done, called, records = run(checkout)
    assert done.returncode == 0, done.stderr
    assert "building for this machine" in done.stderr and "-DCMAKE_CUDA_ARCHITECTURES=75-real\n" in called
    assert records == {"proved": ["cuda", "cuda, for this processor and compute capability 75"]}


@pytest.mark.parametrize("flags", [[], ["--cuda"]])
def test_with_a_gpu_the_build_is_for_its_kind_alone(checkout, flags):
    card(checkout, "12.0")
    done, called, records = run(checkout, *flags)
    assert done.returncode == 0, done.stderr
    assert "-DGGML_NATIVE=ON -DCMAKE_CUDA_ARCHITECTURES=120-real\n" in called
    assert list(records) == ["proved"]


def test_an_answer_that_the_processor_gave_proves_no_cuda_build(checkout):
    """CUDA programs that find no GPU go on without it, and Paris is right all the same."""
    card(checkout)
    write(
        checkout / "program",
        f'case "$*" in *--list*) echo "{NO_GPU}"; echo "  (none)"; exit ;; esac\n{PARIS}',
    )
    done, _, records = run(checkout, "--cuda")
    assert done.returncode == 1 and not records
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the programs find no GPU") and NO_GPU in last


def test_a_library_that_the_machine_with_the_gpu_lacks_is_named(checkout):
    words = "error while loading shared libraries: libcublas.so.13: cannot open shared object file"
    write(checkout / "program", f"echo '{words}' >&2; exit 127")
    run(checkout, "--cuda")
    card(checkout)
    done, called, records = run(checkout)
    assert done.returncode == 1 and not called and list(records) == ["unproved"]
    last = done.stderr.splitlines()[-1]
    assert "libcublas.so.13" in last and "rm llama.cpp/build/unproved to build here" in last


def test_a_driver_older_than_nvcc_is_told_before_anything_is_built(checkout):
    card(checkout, driver="12.4")
    done, called, _ = run(checkout)
    assert done.returncode == 1 and not called
    assert done.stderr.count("\n") == 1 and "CUDA 12, and nvcc makes those of CUDA 13" in done.stderr


def test_a_gpu_without_nvcc_is_not_passed_over_in_silence(checkout):
    (checkout / "bin" / "nvcc").unlink()
    card(checkout)
    done, called, records = run(checkout)
    assert done.returncode == 0 and "-DGGML_CUDA=OFF" in called and records["proved"][0] == "cpu"
    assert "note: there is a GPU but no nvcc" in done.stderr


@pytest.mark.parametrize(
    "said, words",
    [
        ('CMake Error: Target "ggml-cuda" links to: CUDA::cublas but the target was not found', "no cuBLAS"),
        (
            'CMake Error: Target "ggml-cuda" links to: CUDA::cuda_driver but it was not',
            "no libcuda.so to link with",
        ),
        ("error: #error -- unsupported GNU version! gcc versions later than 15 are", "CUDAHOSTCXX=g++-13"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_60'", "does not know 'compute_60'"),
    ],
)
def test_what_cuda_lacks_is_one_line(checkout, said, words):
    (checkout / "words").write_text(said + "\n")
    write(checkout / "says", f"cat {checkout}/words; exit 1")
    done, _, records = run(checkout, "--cuda")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and not records
    assert last.startswith("error: cmake failed: ") and words in last and "llama.cpp/build.log" in last


# --- with a real nvcc ---

SOURCE = ROOT / "llama.cpp" / "source"
real = pytest.mark.skipif(
    not (SOURCE.is_dir() and all(map(shutil.which, ("nvcc", "cmake", "make", "cc")))),
    reason="needs nvcc, cmake, make and llama.cpp's source",
)

# cuBLAS is 400 MB that CI does not have. Most of llama.cpp's CUDA files use no more of it than these names.
CUBLAS = """#pragma once
typedef struct cublasContext * cublasHandle_t;
typedef enum { CUBLAS_STATUS_SUCCESS } cublasStatus_t;
typedef enum { CUBLAS_TF32_TENSOR_OP_MATH } cublasMath_t;
extern "C" {
const char * cublasGetStatusString(cublasStatus_t);
cublasStatus_t cublasCreate(cublasHandle_t *);
cublasStatus_t cublasDestroy(cublasHandle_t);
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t);
cublasStatus_t cublasSetStream(cublasHandle_t, struct CUstream_st *);
}
"""


@pytest.fixture
def nearly_real(tmp_path) -> Path:
    """A checkout with llama.cpp's source, in which nothing is pretended but cuBLAS and the driver's library.

    cmake configures all of it, and compiles one small CUDA file instead of everything. OpenSSL is not found.
    """
    here, fake, cublas = (tmp_path / name for name in ("llama.cpp", "bin", "cublas"))
    for folder in (here, fake, cublas):
        folder.mkdir()
    shutil.copy(SCRIPT, here)
    (here / "source").symlink_to(SOURCE)
    (cublas / "cublas_v2.h").write_text(CUBLAS)
    library = cublas / "libempty.so"
    subprocess.run(["cc", "-shared", "-o", library, "-xc", os.devnull], check=True)
    given = f"-DCUDA_cublas_LIBRARY={library} -DCUDA_cuda_driver_LIBRARY={library}"
    given += " -DCMAKE_DISABLE_FIND_PACKAGE_OpenSSL=ON"
    one = 'make -C "$2/ggml/src/ggml-cuda" arange.cu.o'
    configure = f'{shutil.which("cmake")} -G "Unix Makefiles" "$@" {given}'
    write(fake / "cmake", f'case "$1" in --build) {one} ;; *) {configure} ;; esac')
    write(fake / "nvidia-smi", "exit 1")
    write(fake / "python", "echo b1; echo model.gguf")
    return tmp_path


def run_nearly_real(checkout: Path, **env) -> subprocess.CompletedProcess:
    env |= {"PATH": f"{checkout}/bin:{os.environ['PATH']}", "PYTHON": f"{checkout}/bin/python"}
    env |= {"CPATH": str(checkout / "cublas")}
    command = ["bash", checkout / "llama.cpp" / "build.sh", "--cuda"]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=400)


@real
@pytest.mark.slow
def test_cmake_and_nvcc_take_the_list_of_cards(nearly_real):
    """It failed here: CUDA_ARCHITECTURES is set to "native", but no GPU was detected."""
    done = run_nearly_real(nearly_real)
    build = nearly_real / "llama.cpp" / "build"
    assert done.returncode == 0, done.stderr
    assert list(build.glob("ggml/src/ggml-cuda/**/arange.cu.o"))
    assert "can't be tried without a GPU" in done.stderr.splitlines()[-1]
    assert "apt install libssl-dev" in done.stderr
    backend, words = (build / "unproved").read_text().splitlines()
    assert backend == "cuda" and words.endswith(", without HTTPS")


@real
def test_nvcc_refuses_a_compiler_that_is_too_new(nearly_real):
    compiler = nearly_real / "bin" / "g++-99"
    write(compiler, f'exec {shutil.which("c++")} -U__GNUC__ -D__GNUC__=99 "$@"')
    done = run_nearly_real(nearly_real, CUDAHOSTCXX=str(compiler), CUDAARCHS="75-real")
    assert done.returncode == 1
    assert "nvcc refuses this C++ compiler as too new" in done.stderr.splitlines()[-1]
