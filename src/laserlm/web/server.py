"""Serve an app to the browsers of this machine only, and nothing else."""

from __future__ import annotations

import json
import logging
import math
import socket
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import gradio
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from laserlm.errors import ReportError

log = logging.getLogger(__name__)
HOST = "127.0.0.1"
NAMES = [HOST, "localhost"]
API = "/gradio_api/"
USED_API_PATHS = ("queue/", "heartbeat/", "cancel", "reset")
"""Paths of Gradio's API that a page uses. The other paths read files and addresses, take uploads or edit the app."""
UNUSED_PATHS = ("/monitoring", "/login", "/logout", "/pwa_icon", "/svelte", "/file")
POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # Gradio's page has an inline script and compiles templates
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
FONTS = ["system-ui", "-apple-system", "Segoe UI", "DejaVu Sans", "sans-serif"]
MONO_FONTS = ["ui-monospace", "DejaVu Sans Mono", "monospace"]
MAX_BODY_BYTES = 2**20
"""Largest body of a request. The largest one that a page sends is a prompt."""
BUSY = "too many requests are waiting for this app; try again in a few seconds"
UNUSABLE = "the request holds values that no page of this app sends"
SHUTDOWN_SECONDS = 1
"""Time for open pages to disconnect when the server ends."""


def listen(port: int) -> socket.socket:
    """Return a socket that listens on this machine only.

    Args:
        port: port number; 0 takes a free one.

    Raises:
        ReportError: if the port is in use or not allowed.
    """
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise ReportError(f"cannot listen on {HOST}:{port}: {error.strerror}; give another port with --port") from error


def server(make: Callable[[], gradio.Blocks], css: str = "") -> uvicorn.Server:
    """Return the server of an app; run it with a socket of ``listen``.

    Pages cannot send requests to other machines. The server refuses requests from pages of other sites, and all functions
    of Gradio that the app does not need, such as serving files.

    Args:
        make: returns the app with its queue. It is called when the server starts, because Gradio needs the event loop.
        css: additional style sheet.
    """
    config = uvicorn.Config(
        lambda: _mounted(make(), css), factory=True, log_level="error", timeout_graceful_shutdown=SHUTDOWN_SECONDS
    )
    return uvicorn.Server(config)


def _mounted(blocks: gradio.Blocks, css: str) -> FastAPI:
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=NAMES), Middleware(_Guard)]
    _answer_errors(blocks)
    app: FastAPI = gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None, middleware=guards),
        blocks,
        path="/",
        server_name=HOST,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        blocked_paths=["/"],
        show_error=False,
        max_file_size=0,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=_theme(),
        css=css,
    )
    return app


def _answer_errors(blocks: gradio.Blocks) -> None:
    """Answer an event that cannot be handled, where Gradio would print a traceback and send no reason."""
    process: Any = blocks.process_api

    async def process_api(*arguments: Any, **options: Any) -> Any:
        try:
            return await process(*arguments, **options)
        except gradio.Error as error:
            error.print_exception = False
            raise
        except Exception as error:  # values of any kind may come, and Gradio looks at them first
            log.warning("a request could not be answered: %s: %s", type(error).__name__, error)
            log.debug("where it failed", exc_info=True)
            raise gradio.Error(UNUSABLE, print_exception=False) from error

    blocks.process_api = process_api  # type: ignore[method-assign]


def _theme() -> Any:
    """Return Gradio's plain theme with system fonts and with hints that are dark enough to read."""
    theme = gradio.themes.Base(font=FONTS, font_mono=MONO_FONTS)
    return theme.set(
        block_info_text_color="*neutral_600",
        input_placeholder_color="*neutral_500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )


class _Guard:
    """Refuses requests that the app does not need, and tells browsers to load from this server only."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not _is_ours(headers):
            await PlainTextResponse("another site asks\n", 403)(scope, receive, send)
            return
        if not _is_used_by_app(scope["path"]):
            await PlainTextResponse("not found\n", 404)(scope, receive, send)
            return
        body = await _read_body(headers, receive)
        if body is None:
            text = f"the body has more than {MAX_BODY_BYTES:,} bytes\n"
            await PlainTextResponse(text, 413, headers={"connection": "close"})(scope, receive, send)
            return
        if problem := _problem_of(body):
            await JSONResponse({"detail": problem}, 400)(scope, receive, send)
            return
        await self._answer(scope, _replayed(body, receive), send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the app answer. In the place of its failures the browser gets a reason, and the log one line."""
        status = 0

        async def guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_encoded(HEADERS)]
            if status < 500:
                await send(message)

        try:
            await self.app(scope, receive, guarded)
        except Exception as error:
            if 0 < status < 500:  # the browser has a part of the answer
                raise
            status = 500
            log.warning("a request to %s could not be answered: %s: %s", scope["path"], type(error).__name__, error)
        if status >= 500:
            code, reason = (503, BUSY) if status == 503 else (400, UNUSABLE)
            await JSONResponse({"detail": reason}, code, HEADERS)(scope, receive, send)


async def _read_body(headers: Headers, receive: Receive) -> bytes | None:
    """Return the body of a request, or None as soon as it is known to be too large."""
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
        return None
    body = b""
    while length != "0" or "transfer-encoding" in headers:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            break
    return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a function that receives a body that was read already, and then what comes after it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


def _problem_of(body: bytes) -> str:
    """Return why a body is no JSON, or an empty text. Python reads not-a-number and infinity, which JSON does not have."""
    try:
        json.loads(body or b"null", parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        return f"the body is no JSON: {error}"
    return ""


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
}


def _encoded(headers: MutableMapping[str, str]) -> Iterable[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def _is_ours(headers: Headers) -> bool:
    """Return whether a request comes from a page of this app, or from no page."""
    origin: Any = headers.get("origin")
    return origin is None or origin == f"http://{headers.get('host')}"


def _is_used_by_app(path: str) -> bool:
    if path.startswith(API):
        return path.removeprefix(API).startswith(USED_API_PATHS)
    return ".." not in path.split("/") and not path.startswith(UNUSED_PATHS)
