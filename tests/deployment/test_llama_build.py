"""llama.cpp/build.sh: what can be missing is told in one line before anything is fetched or built."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / "llama.cpp" / "build.sh"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the script in a checkout of its own, without a source, a build or an environment."""
    (tmp_path / "llama.cpp").mkdir()
    shutil.copy(SCRIPT, tmp_path / "llama.cpp")
    return tmp_path


def build(
    checkout: Path, *flags, tools=("bash", "dirname", "sed", "head", "awk", "df", "cat", "getconf"), **env
):
    """Run the script with nothing but `tools` on the PATH."""
    bin_folder = checkout / "bin"
    bin_folder.mkdir(exist_ok=True)
    for tool in tools:
        link = bin_folder / tool
        if not link.exists():
            link.symlink_to(shutil.which(tool) or "/bin/true")
    return subprocess.run(
        [shutil.which("bash"), checkout / "llama.cpp" / "build.sh", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": str(bin_folder), "CUDA_HOME": "/nowhere", **env},
        timeout=60,
    )


COMMON = ("bash", "dirname", "sed", "head", "awk", "df", "cat", "getconf")


@pytest.mark.parametrize(
    "flags, tools, words, code",
    [
        (["--gpu"], COMMON, "unknown flag --gpu", 2),
        (["--cpu"], COMMON, "cmake is missing", 1),
        (["--cpu"], (*COMMON, "cmake"), "no C++ compiler", 1),
        (["--cuda"], (*COMMON, "cmake", "c++"), "nvcc is missing", 1),
        (["--cpu"], (*COMMON, "cmake", "c++"), "make setup", 1),
    ],
)
def test_what_is_missing_is_one_line(checkout, flags, tools, words, code):
    done = build(checkout, *flags, tools=tools)
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert sorted(p.name for p in (checkout / "llama.cpp").iterdir()) == ["build.sh"]


def test_a_full_disk_is_told_before_the_download(checkout):
    fake = checkout / "bin"
    fake.mkdir()
    (fake / "df").write_text("#!/bin/sh\necho header\necho disk 100 90 10240 90% /\n")
    (fake / "df").chmod(0o755)
    done = build(
        checkout,
        "--cpu",
        tools=("bash", "dirname", "sed", "head", "awk", "cat", "cmake", "c++"),
        PYTHON=shutil.which("python3"),
    )
    assert done.returncode == 1 and "10 MB free" in done.stderr


def test_a_finished_build_is_left_alone(checkout):
    (checkout / "llama.cpp" / "build").mkdir()
    (checkout / "llama.cpp" / "build" / "proved").write_text("cpu\ncpu, for this processor\n")
    done = build(checkout, "--cpu")
    assert done.returncode == 0 and "nothing to do" in done.stderr
    assert "cmake is missing" in build(checkout, "--cuda").stderr  # another backend is another build


# --- a whole build, with pretended tools ---

TOOLS = (*COMMON, "cp", "rm", "mv", "mkdir", "tee", "grep", "tail", "cut", "tr", "mktemp", "ls", "chmod")
NAMES = "llama-cli llama-completion llama-server llama-quantize llama-perplexity llama-bench llama-imatrix"


@pytest.fixture
def pretended(checkout) -> Path:
    """A checkout in which cmake builds tools that say what the file `answer` says; all is fetched already."""
    here, fake = checkout / "llama.cpp", checkout / "bin"
    (here / "build" / "bin").mkdir(parents=True)
    fake.mkdir()
    tool, says = f'"{here}/build/bin/$t"', f'"#!/bin/sh\\ncat {checkout}/answer\\n"'
    tool = f"printf {says} > {tool}; chmod +x {tool}"
    write(
        fake / "cmake",
        f'echo "cmake $*" >> "{checkout}/called"; for t in {NAMES}; do {tool}; done; {checkout}/step',
    )
    write(fake / "c++", "exit 0")
    write(fake / "python", "echo b1; echo model.gguf")
    write(checkout / "step", "echo '-- OpenSSL found: 3.0.1'; echo '[ 50%] Building'")
    (checkout / "answer").write_text(" Paris.")
    return checkout


def write(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def build_pretended(checkout: Path, *flags):
    """(finished process, how cmake was called, lines of the file `proved` or None)."""
    done = build(checkout, "--cpu", *flags, tools=TOOLS, PYTHON=str(checkout / "bin" / "python"))
    called = (checkout / "called").read_text() if (checkout / "called").exists() else ""
    (checkout / "called").unlink(missing_ok=True)
    proved = checkout / "llama.cpp" / "build" / "proved"
    return done, called, proved.read_text().splitlines() if proved.exists() else None


def test_a_build_proves_itself_once_and_downloads_no_web_page(pretended):
    done, called, proved = build_pretended(pretended)
    assert done.returncode == 0, done.stderr
    assert (
        "-DLLAMA_BUILD_NUMBER=1 " in called and "-DGGML_NATIVE=ON" in called and "-DGGML_CUDA=OFF" in called
    )
    assert "-DLLAMA_BUILD_UI=OFF" in called and "-DLLAMA_USE_PREBUILT_UI=OFF" in called
    assert proved == ["cpu", "cpu, for this processor"]
    assert "[ 50%]" in done.stderr and "proved: The capital of France is Paris." in done.stderr
    again, called, _ = build_pretended(pretended)
    assert "nothing to do" in again.stderr and not called


def test_a_build_that_answers_wrong_is_made_again_without_the_newest_instructions(pretended):
    (pretended / "answer").write_text(" !!!!")
    write(
        pretended / "step",
        "echo '-- OpenSSL found: 3.0.1'; "
        f"case $(cat {pretended}/called) in *NATIVE=OFF*) echo Paris > {pretended}/answer ;; esac",
    )
    done, called, proved = build_pretended(pretended)
    assert done.returncode == 0, done.stderr
    assert called.index("-DGGML_NATIVE=ON") < called.index("-DGGML_NATIVE=OFF")
    assert "this build does not work here" in done.stderr and proved == [
        "cpu",
        "cpu, portable instruction sets",
    ]
    (pretended / "llama.cpp" / "build" / "proved").unlink()
    (pretended / "answer").write_text(" !!!!")
    write(pretended / "step", "exit 0")
    done, _, proved = build_pretended(pretended)
    assert done.returncode == 1 and "neither build" in done.stderr.splitlines()[-1] and proved is None


def test_a_build_without_openssl_says_what_it_lacks_and_how_to_get_it(pretended):
    write(pretended / "step", "echo 'CMake Warning: OpenSSL not found, HTTPS support disabled'")
    done, _, proved = build_pretended(pretended)
    assert done.returncode == 0, done.stderr
    said = next(line for line in done.stderr.splitlines() if line.startswith("note: "))
    assert "-hf" in said and "apt install libssl-dev" in said and "rm llama.cpp/build/*proved" in said
    assert proved == ["cpu", "cpu, for this processor, without HTTPS"]
