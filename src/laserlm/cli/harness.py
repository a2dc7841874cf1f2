"""The command that runs lm-evaluation-harness on a reduced model."""

from __future__ import annotations

import sys

import typer


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with its own options and the model type 'laser', which takes reduce=.

    --allow-remote-code is the harness's --trust_remote_code.

    Example: laser lm-eval --model laser --model_args pretrained=bundled,reduce=28.fc_up@0.05 --tasks arc_easy
    """
    from laserlm.errors import MissingExtraError

    try:
        import lm_eval.models  # noqa: F401 - fills the registry, which imports nothing once it holds a model
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise MissingExtraError("lm-evaluation-harness is not installed; run: pip install 'laserlm[eval]'") from error
    if "laser" not in model_registry:  # the registry refuses a second registration in one process
        model_registry.register("laser", target="laserlm.scoring.harness_model:LaserLM")
    sys.argv = ["lm_eval", *("--trust_remote_code" if a == "--allow-remote-code" else a for a in context.args)]
    cli_evaluate()
