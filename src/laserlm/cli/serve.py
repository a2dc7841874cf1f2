"""The command ``laser app``, which serves the local app."""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from typing import Annotated

import typer

from laserlm.cli.options import STORE_DEFAULT, Store, UpdateOptions, with_options
from laserlm.cli.progress import print_stderr


@with_options(load_options=UpdateOptions)
def serve(
    load_options: UpdateOptions,
    model: Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file, or 'bundled'.")] = "bundled",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes a free one.")] = 7860,
    store: Store = STORE_DEFAULT,
) -> None:
    """Serve the leaderboard, the explorer of searches and the playground to browsers on this machine.

    Example: laser app bundled --port 7861
    """
    from laserlm.errors import MissingExtraError
    from laserlm.store import Store as Results

    if find_spec("gradio") is None:
        raise MissingExtraError("the app needs Gradio, which is not installed; run: pip install 'laserlm[app]'")
    from laserlm.web.app import build, stylesheet
    from laserlm.web.server import HOST, listen, server

    with listen(port) as sock, Results.open(store, create=store == STORE_DEFAULT) as results:  # before the model is loaded
        print_stderr(f"loading {model}")
        lm = load_options.load_named(model)
        app = server(lambda: build(results, lm), stylesheet())
        print(f"http://{HOST}:{sock.getsockname()[1]}", flush=True)
        print_stderr("Press Ctrl-C to stop.")
        with suppress(KeyboardInterrupt):
            app.run(sockets=[sock])
