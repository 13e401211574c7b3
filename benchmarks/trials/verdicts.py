"""What counts as survived, and the names of what does not."""

from __future__ import annotations

from dataclasses import dataclass

from trials.runner import HANG, Done

SURVIVED = "survived"
# Worst first: the columns of the table.
FAILURES = ("lost", "code run", "secret shown", "silently wrong", "traceback", "hang", "other")


@dataclass
class Verdict:
    name: str = SURVIVED
    detail: str = ""

    @property
    def survived(self) -> bool:
        return self.name == SURVIVED


def check_end(done: Done, codes: tuple = (0, 1, 2)) -> Verdict:
    """A process may succeed, or refuse with exactly one `error: ` line, the last one of stderr.

    After Ctrl-C (130) the last line says how to go on, or nothing: what matters is that it is no traceback.
    """
    if done.code == HANG:
        return Verdict("hang", f"still running after {done.seconds:.0f} s; {done.last_line}")
    if done.traceback:
        return Verdict("traceback", done.last_line)
    if done.code not in codes:
        return Verdict("other", f"exit code {done.code}; {done.last_line}")
    if done.code in (1, 2):
        if not done.err.strip():
            return Verdict("other", f"exit code {done.code} without a word")
        if len(done.error_lines) != 1 or not done.last_line.startswith("error: "):
            return Verdict("other", f"{len(done.error_lines)} error lines; last: {done.last_line}")
    if done.code == 0 and done.error_lines:
        return Verdict("other", f"exit code 0 with {done.error_lines[0]}")
    return Verdict(SURVIVED, f"code {done.code}; {done.last_line}" if done.code else "")


def check_answer(done: Done, reference: Done, codes: tuple = (0, 1, 2)) -> Verdict:
    """Inference on something damaged: refused, or exactly what it would have been without the damage."""
    verdict = check_end(done, codes)
    if verdict.survived and done.code == 0 and (done.out, done.logits) != (reference.out, reference.logits):
        return Verdict("silently wrong", f"exit code 0, other logits; {done.last_line}")
    return verdict


def check_marker(verdict: Verdict, *markers) -> Verdict:
    """A file that only planted code writes."""
    made = [path for path in markers if path.exists()]
    return Verdict("code run", f"{made[0].name} was written") if made else verdict


def check_secret(verdict: Verdict, secret: str, *texts: str) -> Verdict:
    return Verdict("secret shown", "in what was printed") if any(secret in t for t in texts) else verdict
