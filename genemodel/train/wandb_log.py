"""Weights & Biases."""

import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genemodel.train.settings import LogSettings

_SECRET = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)


def start_wandb(run: Path, log: LogSettings, values: Mapping[str, Any]) -> Any:
    """Open a Weights & Biases run, or return None when the log kind is another.

    Settings are sent without anything that looks like a secret, and paths as their last part. The
    run's number is kept in the run directory, so that a restart goes on in the same run.
    """
    if log.kind != "wandb":
        return None
    import wandb

    number_file = run / "wandb-run.json"
    number = (
        json.loads(number_file.read_text())["id"] if number_file.exists() else secrets.token_hex(4)
    )
    number_file.write_text(json.dumps({"id": number}))
    return wandb.init(
        project=log.project,
        name=log.name or run.name,
        id=number,
        resume="allow",
        mode=log.mode,
        dir=str(run),
        config=without_secrets(values),
        # Neither the command line, the host's hardware nor code is anybody's business.
        settings=wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_disable_stats=True,
            silent=True,
            program="genemodel",
        ),  # fmt: skip
    )


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Copy settings for a log: secrets out, absolute paths cut to their last part."""
    clean: dict[str, Any] = {}
    for key, value in values.items():
        if _SECRET.search(key) and key != "tokens":
            clean[key] = "(left out)"
        elif isinstance(value, Mapping):
            clean[key] = without_secrets(value)
        elif isinstance(value, str) and (os.sep in value or "://" in value):
            clean[key] = value.rstrip(os.sep).rsplit(os.sep, 1)[-1]
        else:
            clean[key] = value
    return clean
