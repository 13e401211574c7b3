"""Is there an NVIDIA GPU that this torch can use? If not: what was found, and what to do about it."""

import os
import re
import shutil
import subprocess
import warnings
from dataclasses import dataclass

import torch

from qlora.processes import local_rank

# First driver for each CUDA release (NVIDIA's CUDA toolkit release notes, minor version compatibility).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
# PyTorch's own index has builds for older drivers and cards, and one without CUDA.
OTHER_BUILD = (
    "pip install torch=={version} --index-url https://download.pytorch.org/whl/{build} --force-reinstall"
)


@dataclass(frozen=True)
class Trouble:
    """Why no GPU is used; `card`: whether there is one."""

    card: bool
    text: str


def find_trouble() -> Trouble | None:
    """None where the first CUDA device can be used."""
    with warnings.catch_warnings(record=True) as told:  # torch warns of old drivers, and says False
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available and local_rank() >= torch.cuda.device_count() > 0:
        own = f"process {local_rank()} needs a GPU of its own, and {torch.cuda.device_count()} are here"
        return Trouble(True, f"{own}: start as many processes as GPUs")
    if available:
        return too_old_card()
    cards, said = ask_driver()
    if not cards:
        return Trouble(False, said)
    card, driver = cards[0]
    found = f"{card} with driver {driver} is here, but"
    if torch.version.cuda is None:
        fix = other_build("cu126" if major(driver) < OLDEST_DRIVER[13] else "cu130")
        return Trouble(True, f"{found} torch {torch.__version__} was built without CUDA: {fix}")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1", "NoDevFiles"):
        return Trouble(True, f"{found} CUDA_VISIBLE_DEVICES={hidden!r} hides it: unset it")
    oldest = OLDEST_DRIVER.get(major(torch.version.cuda), 0)
    if major(driver) < oldest:
        fix = f"update the driver to {oldest} or newer, or {other_build('cu126')}"
        return Trouble(
            True, f"{found} torch's CUDA {torch.version.cuda} needs driver {oldest} or newer: {fix}"
        )
    reason = str(told[-1].message).splitlines()[0][:160] if told else "it gives no reason"
    return Trouble(True, f"{found} torch can't use it ({reason}): restart the machine or the container")


def too_old_card() -> Trouble | None:
    """Of a card that this torch has no kernels for (its first kernel would fail)."""
    card = torch.cuda.get_device_properties(local_rank())
    built_for = [int(name[3:]) for name in torch.cuda.get_arch_list() if re.fullmatch(r"sm_\d+", name)]
    if not built_for or 10 * card.major + card.minor >= min(built_for):
        return None
    what = (
        f"{card.name} has compute capability {card.major}.{card.minor}, torch {torch.__version__} begins at"
    )
    oldest = f"{min(built_for) // 10}.{min(built_for) % 10}"
    return Trouble(True, f"{what} {oldest}: {other_build('cu126')} (it begins at 5.0)")


def ask_driver() -> tuple[list[tuple[str, str]], str]:
    """([(card, driver version)], what was found where there is none), by nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        colab = (
            "; in Colab choose Runtime > Change runtime type > T4 GPU"
            if "COLAB_RELEASE_TAG" in os.environ
            else ""
        )
        return [], f"no NVIDIA driver is installed (no nvidia-smi){colab}"
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi does not answer ({type(error).__name__}): reinstall the driver or restart"
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())[:160]
        return [], f"nvidia-smi says: {said or f'exit code {done.returncode}'}"
    rows = [tuple(part.strip() for part in line.rsplit(",", 1)) for line in done.stdout.splitlines()]
    cards = [row for row in rows if len(row) == 2]
    return cards, "" if cards else "the NVIDIA driver is installed, but it sees no GPU"


def other_build(build: str) -> str:
    """The command that brings this torch in another build."""
    return OTHER_BUILD.format(version=torch.__version__.split("+")[0], build=build)


def major(version: str) -> int:
    """'535.104.05' -> 535"""
    return int(re.match(r"\d*", version)[0] or 0)
