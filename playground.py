"""A page in the browser: base and adapter answer side by side, and how sure they are of it.

    pip install -r requirements-playground.txt
    python playground.py          # qlora-out, and other adapters in this folder; then open the address
    python playground.py --adapter none --model smollm2-360m

Nothing leaves this machine, and only this machine can open the page unless --host says otherwise.
"""

import errno
import importlib.util
import socket
import threading
from collections.abc import Sequence

from config import PlaygroundSettings
from qlora.cli import UserError, note, parse, require, run

INSTALL = "the playground needs gradio: pip install -r requirements-playground.txt"


def read_settings(argv: Sequence[str] | None) -> PlaygroundSettings:
    """Flags -> settings that go together; UserError where gradio or the port can't be had."""
    s = parse(PlaygroundSettings, argv, __doc__)
    alone = s.adapter == ("none",)
    require(alone or "none" not in s.adapter, "--adapter none: nothing else can be loaded with it")
    if importlib.util.find_spec("gradio") is None:
        raise UserError(INSTALL)
    check_port(s.host, s.port)
    return s


def check_port(host: str, port: int) -> None:
    """Before the model is loaded; UserError where nothing can be served there."""
    not_here = UserError(f"--host {host}: no address of this machine; 0.0.0.0 stands for all that it has")
    try:
        kind = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=kind).close()
    except (socket.gaierror, UnicodeError):
        raise not_here from None
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise not_here from None
        why = {errno.EADDRINUSE: "is taken", errno.EACCES: "is not for ordinary users (below 1024)"}
        words = why.get(error.errno, f"can't be used on {host} ({error.strerror})")
        raise UserError(f"--port {port} {words}; choose another --port") from None


def main(argv: Sequence[str] | None = None) -> None:
    s = read_settings(argv)
    # Late imports: they take seconds, so the flags are checked first.
    from qlora import hardware
    from qlora.playground import answers, guards, models, page

    chosen = models.find_adapters(s)
    held = models.Models(s, chosen)
    held.use(held.first)
    hardware.show(held.base.hardware)
    note(f"base       {held.described()}")
    note(f"adapters   {', '.join(held.adapters) or 'none: the base alone'}")
    answers.warm_up(held)
    served = page.build(s, held)
    page.serve(served, s)
    if s.host not in guards.LOOPBACK:
        note(f"note       --host {s.host}: whoever reaches this machine can use the page, without a password")
    note(f"open       {served.local_url} (Ctrl-C ends it)")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.stop(served)
        note()


if __name__ == "__main__":
    run(main, "choose a smaller --model, or --precision nf4")
