"""The compiled kernels compute what torch does; without a compiler or a cache for them runs go on."""

import stat
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from qlora.cpu import kernels, plain
from qlora.cpu.compiled import Kernels
from qlora.cpu.tokens import flatten

ROWS, GROUPS, PER, D, WIDTH = 3, 2, 3, 8, 40


@pytest.fixture(scope="module")
def compiled():
    try:
        return Kernels(str(kernels.library(kernels.SOURCE)))
    except kernels.CannotCompile as reason:
        pytest.skip(str(reason))


@pytest.fixture
def rows():
    """Rows of different lengths that begin alike, with places that are empty."""
    ids = torch.randint(0, 50, (ROWS, 21), generator=torch.Generator().manual_seed(1))
    ids[:, :4] = 7
    wanted = torch.zeros(ROWS, 21, dtype=torch.bool)
    wanted[0, 20] = wanted[1, 9] = wanted[2, [3, 14]] = True
    return flatten(ids, wanted).bands[0]


def numbers(*shape):
    numbers.generator = getattr(numbers, "generator", torch.Generator().manual_seed(0))
    return torch.randn(shape, generator=numbers.generator)


def cases(rows) -> dict:
    """name -> (arguments, places of those that are written)"""
    n, length, units = len(rows.owner), rows.length, ROWS * GROUPS
    wide, flat = (
        numbers(n, WIDTH + 5)[:, :WIDTH],
        numbers(n, GROUPS * PER * D),
    )  # of a buffer with longer rows
    x, out, longer = numbers(n, WIDTH), numbers(n, WIDTH), numbers(n, WIDTH + 3)[:, :WIDTH]
    weight, scale, half, qkv = numbers(WIDTH), numbers(n), numbers(n, WIDTH // 2), (PER + 2) * GROUPS * D
    angles = numbers(30, D // 2), numbers(30, D // 2)
    heads = numbers(units, length * PER, D), numbers(units, length, D), numbers(units, length, D)
    scores, logsum = numbers(units, 6 * PER, 16), numbers(units, length * PER)[:, : 6 * PER]
    sums = torch.empty(units, 6 * PER)
    plain.softmax(scores.clone(), 0.7, sums, PER, 10)  # what softmax_backward is given
    where = rows.place, rows.owner
    return {
        "rms_norm": ((x, wide, weight, 1e-5, out, numbers(n, WIDTH), scale), (4, 5, 6)),
        "rms_backward": ((x, numbers(n, WIDTH), weight, scale, wide, longer), (5,)),
        "gate_up": ((wide * 9, half), (1,)),
        "gate_up_backward": ((half, wide * 9, longer), (2,)),
        "rotate_in": ((numbers(n, qkv), rows.place, *angles, *heads, PER), (4, 5, 6)),
        "rotate_back": ((*heads, *where, *angles, numbers(n, qkv), rows.shared, PER), (7,)),
        "heads_to_flat": ((heads[0], rows.owner, flat, length), (2,)),
        "flat_to_heads": ((flat, *where, heads[0]), (3,)),
        "softmax": ((scores, 0.7, logsum, PER, 10), (0, 2)),
        "softmax_backward": ((scores, numbers(*scores.shape), 0.7, sums, PER, 10), (0, 1)),
    }


@pytest.mark.parametrize("name", kernels.OPERATORS)
def test_a_compiled_kernel_equals_torch(compiled, rows, name):
    arguments, written = cases(rows)[name]
    other = [a.clone() if isinstance(a, torch.Tensor) and a.is_contiguous() else a for a in arguments]
    for i in written:  # a view of a wider buffer: clone the buffer
        if not arguments[i].is_contiguous():
            buffer = torch.zeros(len(arguments[i]), arguments[i].stride(0))
            other[i] = buffer[:, : arguments[i].shape[1]]
    if name == "rotate_back":  # gradients of places that are empty are zero: attention makes them so
        for which in (0, 1, 2):
            of_place = arguments[which].view(ROWS, GROUPS, rows.length, -1)
            of_place *= (rows.place >= 0)[:, None, :, None]
            if which == 0:  # and those of a shared token's other copies
                of_place[1:, :, : rows.shared] = 0
            other[which] = arguments[which].clone()
    getattr(compiled, name)(*arguments)
    getattr(plain, name)(*other)
    for i in written:
        torch.testing.assert_close(arguments[i], other[i], rtol=2e-5, atol=2e-5)


def test_both_languages_pack_panels_of_the_same_width():
    """Too small a buffer would be written over."""
    assert f"COLUMNS = {kernels.PANEL}," in kernels.HALF_SOURCE.read_text()


def test_not_a_number_stays_one(compiled):
    """The guards look for it: a kernel that turns it into a number would hide a run that diverged."""
    bad = torch.full((2, WIDTH), float("nan"))
    out = torch.zeros(2, WIDTH // 2)
    compiled.gate_up(bad, out)
    assert out.isnan().all()
    scores, logsum = torch.full((1, 4, 4), float("nan")), torch.zeros(1, 4)
    compiled.softmax(scores, 1.0, logsum, 1, 0)
    assert scores[0, 3].isnan().all() and logsum.isnan().all()


def loaded(tmp_path, **environment) -> str:
    """How a fresh process computes, with this environment."""
    code = "from qlora.cpu.kernels import load; print(load()[1])"
    env = {"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path), **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_a_compiler_torch_computes_and_says_so(tmp_path):
    assert loaded(tmp_path, PATH="") == "kernels in torch, slower: no C++ compiler (c++) is installed"
    assert "false failed" in loaded(tmp_path, CXX="/bin/false")


def test_a_library_is_kept_and_taken_again(compiled, tmp_path):
    assert loaded(tmp_path) == "compiled kernels"
    (kept,) = (tmp_path / "qlora-kernels").iterdir()
    made = kept.stat().st_mtime_ns
    assert loaded(tmp_path) == "compiled kernels" and kept.stat().st_mtime_ns == made


def test_a_damaged_library_is_made_again(compiled, tmp_path):
    """Regression: loading one that was cut short ended the process with SIGBUS."""
    loaded(tmp_path)
    (kept,) = (tmp_path / "qlora-kernels").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:1000])
    assert loaded(tmp_path) == "compiled kernels" and kept.read_bytes() == whole


def test_a_cache_that_others_can_write_to_is_not_used(compiled, tmp_path):
    folder = tmp_path / "qlora-kernels"
    folder.mkdir()
    folder.chmod(0o777)
    assert loaded(tmp_path) == "compiled kernels" and not list(folder.iterdir())


def test_a_cache_that_can_not_be_made_is_done_without(compiled, tmp_path):
    (tmp_path / "qlora-kernels").write_text("a file where the folder should be")
    assert loaded(tmp_path) == "compiled kernels"


def test_two_processes_compile_at_once(compiled, tmp_path):
    code = "from qlora.cpu.kernels import load; print(load()[1])"
    env = {"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in both] == ["compiled kernels"] * 2
    (kept,) = (tmp_path / "qlora-kernels").iterdir()
    assert kept.suffix == ".so" and stat.S_ISREG(kept.stat().st_mode)
