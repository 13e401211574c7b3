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


def build(checkout: Path, *flags, tools=("bash", "dirname", "sed", "head", "awk", "df", "cat", "getconf"), **env):
    """Run the script with nothing but `tools` on the PATH."""
    bin_folder = checkout / "bin"
    bin_folder.mkdir(exist_ok=True)
    for tool in tools:
        link = bin_folder / tool
        if not link.exists():
            link.symlink_to(shutil.which(tool) or "/bin/true")
    return subprocess.run([shutil.which("bash"), checkout / "llama.cpp" / "build.sh", *flags], capture_output=True, text=True,
                          env={**os.environ, "PATH": str(bin_folder), **env}, timeout=60)


COMMON = ("bash", "dirname", "sed", "head", "awk", "df", "cat", "getconf")


@pytest.mark.parametrize("flags, tools, words, code", [
    (["--gpu"], COMMON, "unknown flag --gpu", 2),
    (["--cpu"], COMMON, "cmake is missing", 1),
    (["--cpu"], (*COMMON, "cmake"), "no C++ compiler", 1),
    (["--cuda"], (*COMMON, "cmake", "c++"), "nvcc is missing", 1),
    (["--cpu"], (*COMMON, "cmake", "c++"), "make setup", 1),
])
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
    done = build(checkout, "--cpu", tools=("bash", "dirname", "sed", "head", "awk", "cat", "cmake", "c++"), PYTHON=shutil.which("python3"))
    assert done.returncode == 1 and "10 MB free" in done.stderr


def test_a_finished_build_is_left_alone(checkout):
    (checkout / "llama.cpp" / "build").mkdir()
    (checkout / "llama.cpp" / "build" / "proved").write_text("cpu\ncpu, for this processor\n")
    done = build(checkout, "--cpu")
    assert done.returncode == 0 and "nothing to do" in done.stderr
    assert "cmake is missing" in build(checkout, "--cuda").stderr  # another backend is another build


# --- the server's web page, with pretended tools --------------------------------------------------------------------------

TOOLS = (*COMMON, "cp", "rm", "mv", "mkdir", "tee", "grep", "tail", "cut", "tr", "mktemp", "ls", "true")


@pytest.fixture
def pretended(checkout) -> Path:
    """A checkout in which cmake builds tools that work, npm builds a page, and everything is fetched already."""
    here, fake = checkout / "llama.cpp", checkout / "bin"
    (here / "source" / "tools" / "ui").mkdir(parents=True)
    (here / "build" / "bin").mkdir(parents=True)
    fake.mkdir()
    names = "llama-cli llama-completion llama-server llama-quantize llama-perplexity llama-bench llama-imatrix"
    write(fake / "cmake", f'echo "cmake $*" >> "{checkout}/called"; for t in {names}; do printf "#!/bin/sh\\necho Paris\\n" > "{here}/build/bin/$t"; chmod +x "{here}/build/bin/$t"; done')
    write(fake / "c++", "exit 0")
    write(fake / "node", "echo v22.0.0")
    write(fake / "npm", f'echo "npm $*" >> "{checkout}/called"; [ "$1" != run ] || {{ mkdir "$LLAMA_UI_OUT_DIR"; echo page > "$LLAMA_UI_OUT_DIR/index.html"; }}')
    write(fake / "python", "cat > /dev/null; [ $2 = tag ] && echo b1 || echo model.gguf")
    return checkout


def write(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def build_pretended(checkout: Path, *flags):
    done = build(checkout, "--cpu", *flags, tools=(*TOOLS, "chmod"), PYTHON=str(checkout / "bin" / "python"))
    called = (checkout / "called").read_text() if (checkout / "called").exists() else ""
    (checkout / "called").unlink(missing_ok=True)
    proved = checkout / "llama.cpp" / "build" / "proved"
    return done, called, proved.read_text().splitlines()[2:] if proved.exists() else None


def test_the_page_is_built_from_the_lock_file_and_never_downloaded(pretended):
    done, called, page = build_pretended(pretended)
    assert done.returncode == 0, done.stderr
    assert "npm ci" in called and "-DLLAMA_USE_PREBUILT_UI=OFF" in called and page == ["with the web page"]
    assert (pretended / "llama.cpp" / "source" / "tools" / "ui" / "dist" / "index.html").exists()
    assert not (pretended / "llama.cpp" / "build" / "page").exists()  # 0.7 GB of packages
    again, called, _ = build_pretended(pretended)
    assert "with the web page); nothing to do" in again.stderr and not called


def test_without_ui_npm_is_not_run_and_the_page_can_be_added(pretended):
    done, called, page = build_pretended(pretended, "--no-ui")
    assert done.returncode == 0 and "npm ci" not in called and page == [""]
    again, called, _ = build_pretended(pretended)
    assert again.returncode == 0 and "--ui adds it" in again.stderr and not called
    added, called, page = build_pretended(pretended, "--ui")
    assert added.returncode == 0, added.stderr
    assert "npm ci" in called and "GGML_NATIVE" not in called and page == ["with the web page"]


@pytest.mark.parametrize("npm, words", [("echo npm error code EBADENGINE >&2; exit 1", "npm error code EBADENGINE"), (None, "npm is missing")])
def test_a_page_that_cannot_be_built_does_not_fail_the_build(pretended, npm, words):
    if npm is None:
        (pretended / "bin" / "npm").unlink()
    else:
        write(pretended / "bin" / "npm", npm)
    done, _, page = build_pretended(pretended)
    said = [line for line in done.stderr.splitlines() if "without the server's web page" in line]
    assert done.returncode == 0 and page == [""] and len(said) == 1 and words in said[0]
    asked, _, page = build_pretended(pretended, "--ui")
    assert asked.returncode == 1 and words in asked.stderr.splitlines()[-1] and page == [""]  # the build before is untouched
