"""Does a chat template come to an end? It is a program of the model's author, and may loop for ever."""

import functools
import hashlib
import subprocess
import sys

from qlora.cli import UserError

SECONDS, GIGABYTES, MOST_CHARACTERS = 20, 2, 1_000_000

# The bundled model's, which is pinned: a probe takes most of a second.
PROVED = {"872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788"}

# In a process of its own: a loop inside C (a huge power, a long string) can't be stopped from within.
PROBE = """
import sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({gigabytes} << 30,) * 2)
except (ImportError, ValueError, OSError):
    pass
from transformers.utils.chat_template_utils import render_jinja_template
template, user = sys.stdin.buffer.read().decode(), {{"role": "user", "content": "Hello."}}
tokens = {{"bos_token": "<s>", "eos_token": "</s>", "date_string": "26 Jul 2024"}}
def render(messages, **options):
    try:
        return render_jinja_template([messages], chat_template=template, **tokens, **options)[0][0]
    except MemoryError:
        sys.exit("needs more than {gigabytes} GB")
    except Exception as error:
        return error
asked = render([user], add_generation_prompt=True)
reply = {{"role": "assistant", "content": "Hi."}}
longer = render([{{"role": "system", "content": "Be brief."}}, user, reply, user])
if isinstance(asked, Exception):
    sys.exit(f"fails on one user message ({{type(asked).__name__}}: {{asked}})")
if not asked.strip():
    sys.exit("writes nothing")
if max(len(asked), len(str(longer))) > {most}:
    sys.exit("writes more than {most:,} characters around a few words")
"""


@functools.lru_cache
def refuse_endless(name: str, template: str) -> None:
    """Raise UserError for a template that fails, runs for ever or makes too much of a plain conversation.

    Its expressions are kept from the system by Jinja's sandbox, as transformers sets it up.
    """
    if hashlib.sha256(template.encode(errors="replace")).hexdigest() in PROVED:
        return
    code = PROBE.format(gigabytes=GIGABYTES, most=MOST_CHARACTERS)
    command = [sys.executable, "-I", "-c", code]
    try:
        done = subprocess.run(
            command, input=template.encode(errors="replace"), capture_output=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{name}: its chat template does not end within {SECONDS} s; fix or delete it"
        ) from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines() or [f"stopped with {done.returncode}"]
        raise UserError(f"{name}: its chat template {lines[-1][:200]}; fix or delete it")
