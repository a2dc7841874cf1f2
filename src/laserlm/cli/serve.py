"""The command that serves the local app."""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from typing import Annotated

import typer

from laserlm.cli.options import STORE_DEFAULT, LoadOptions, Store, with_options
from laserlm.cli.progress import say


@with_options(load=LoadOptions)
def serve(
    load: LoadOptions,
    model: Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file, or 'bundled'.")] = "bundled",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes one that is free.")] = 7860,
    store: Store = STORE_DEFAULT,
) -> None:
    """Serve an app to a browser on this machine: leaderboard, explorer of searches, playground. Ctrl-C ends it.

    Example: laser app bundled --port 7861
    """
    from laserlm.errors import MissingExtraError
    from laserlm.store import Store as Results

    if find_spec("gradio") is None:
        raise MissingExtraError("the app needs Gradio, which is not installed: pip install 'laserlm[app]'")
    from laserlm.web.app import build, style
    from laserlm.web.server import HOST, listen, server

    with listen(port) as sock, Results.open(store) as results:  # before the model is loaded
        say(f"loading {model}")
        lm = load.load_named(model)
        served = server(lambda: build(results, lm), style())
        print(f"http://{HOST}:{sock.getsockname()[1]}", flush=True)
        say("Ctrl-C ends it")
        with suppress(KeyboardInterrupt):
            served.run(sockets=[sock])
