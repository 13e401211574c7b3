"""Who may ask the playground's server, and what the browser may load: nobody and nothing from elsewhere."""

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

# The browser itself refuses what would lead elsewhere: scripts, fonts, pictures, requests.
ONLY_HERE = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; frame-ancestors 'self'"
)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class OnlyHere:
    """Adds the rule ONLY_HERE to every answer of the server, and refuses what its page never asks."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def with_rule(message):
            if message["type"] == "http.response.start":
                rule = (b"content-security-policy", ONLY_HERE.encode())
                message = {**message, "headers": [*message.get("headers", ()), rule]}
            await send(message)

        app, is_request = self.app, scope["type"] in ("http", "websocket")
        if is_request and (why := why_refused(scope["path"], Headers(scope=scope))):
            app = PlainTextResponse(why, status_code=403)
        await app(scope, receive, with_rule)


def why_refused(path: str, headers: Headers) -> str:
    """What is wrong with a request; nothing ("") where the page itself asks, or a program without Origin.

    A page of the web may post a form to any address, and no rule of the browser stops it. But the browser
    says whose page it is: Origin has its scheme and host, or "null".
    """
    if path.rstrip("/").endswith("/upload"):  # gradio always has it, without a limit; nothing here needs it
        return "no file can be sent here"
    own = headers.get("host", "").lower()
    asking = [origin.partition("://")[2].lower() for origin in headers.getlist("origin")]
    return (
        "" if all(host and host == own for host in asking) else "another page can not ask this one's server"
    )


def middleware(host: str) -> list[Middleware]:
    """For a server that listens on this address."""
    guards = [Middleware(OnlyHere)]
    if host in LOOPBACK:  # no page of the web reaches it by a name that leads here
        guards.append(Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"]))
    return guards
