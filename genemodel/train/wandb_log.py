"""Weights & Biases beside the files: a guest that may fail, leave, and come back.

Nothing here stops a run: what goes wrong is said once, and metrics.csv goes on. One run directory
is one run there, kept by its number in ``wandb-run.json``; offline, every session writes a piece of
it, and ``wandb sync`` appends the pieces of one number to each other in the order of their start.
"""

import json
import logging
import os
import re
import secrets
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genemodel.train.settings import LogSettings
from genemodel.writing import whole

logger = logging.getLogger(__name__)

NUMBER = "wandb-run.json"
_SECRET = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)
# Seconds to wait for the server, at the start and at the end: a signal to stop leaves little time.
_PATIENCE = 20.0


class WandbLog:
    """An open run at Weights & Biases; made by :func:`start_wandb`."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, row: Mapping[str, float], *, step: int) -> None:
        """Send one row.

        ``step`` is a column, not wandb's own counter: that one forbids to go back, as a run does
        that goes on from its last checkpoint, and counts anew in every piece written offline.
        """
        self._guarded("log", {**row, "step": step})

    def finish(self, exit_code: int = 0) -> None:
        """Close the run; anything but 0 is shown as failed."""
        self._guarded("finish", exit_code=exit_code)
        self._run = None

    def _guarded(self, name: str, *args: Any, **options: Any) -> None:
        if self._run is None:
            return
        try:
            getattr(self._run, name)(*args, **options)
        except Exception as error:  # noqa: BLE001 - training must go on, whatever it is
            self._run = None
            logger.warning(
                "Weights & Biases stopped (%s: %s): metrics go to metrics.csv alone from here.",
                type(error).__name__, error,
            )  # fmt: skip


def start_wandb(run: Path, log: LogSettings, values: Mapping[str, Any]) -> WandbLog | None:
    """Open a run, go on with the one of this run directory, or say why neither is possible.

    Settings are sent without anything that looks like a secret, and paths as their last part.

    Returns
    -------
    None where the log kind is another, or wandb is missing or fails; the latter is a warning. A
    server that cannot be reached makes the run one that is sent later.
    """
    if log.kind != "wandb":
        return None
    try:
        import wandb
    except ImportError as error:
        logger.warning(
            "log=wandb: wandb cannot be imported (%s): metrics go to metrics.csv alone. Install it "
            "with `pip install wandb`, or set log=csv.", error,
        )  # fmt: skip
        return None
    for mode in dict.fromkeys((log.mode, "offline")):
        try:
            if mode == "online" and not wandb.login(prompt=False):
                raise wandb.errors.UsageError("no key in WANDB_API_KEY or of `wandb login`")
            opened = _opened(run, log, values, mode)
        except Exception as error:  # noqa: BLE001 - training must go on, whatever it is
            logger.warning(
                "Weights & Biases (%s) cannot be started (%s: %s): %s.",
                mode, type(error).__name__, error,
                "the run is written offline, to be sent later" if mode == "online"
                else "metrics go to metrics.csv alone",
            )  # fmt: skip
            continue
        if mode == "online":
            logger.info("Weights & Biases: %s", opened.url)
        else:
            logger.info(
                "Weights & Biases: offline in %s. To send it, also after further sessions: "
                "wandb sync %s",
                run / "wandb", shlex.quote(str(run / "wandb")),
            )  # fmt: skip
        return WandbLog(opened)
    return None


def _opened(run: Path, log: LogSettings, values: Mapping[str, Any], mode: Any) -> Any:
    import wandb

    opened = wandb.init(
        entity=log.entity or None,
        project=log.project,
        group=log.group or None,
        name=log.name or run.name,
        tags=list(log.tags) or None,
        id=_number(run / NUMBER),
        resume="allow",
        mode=mode,
        dir=str(run),
        config=without_secrets(values),
        settings=wandb.Settings(
            console="off",
            # Neither the command line, the host, its paths and packages, nor code is anybody's
            # business; how busy its devices are is what people look for there.
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_save_requirements=False,
            x_disable_stats=not log.system,
            silent=True,
            program="genemodel",
            init_timeout=_PATIENCE,
            finish_timeout=_PATIENCE,
        ),
    )
    opened.define_metric("*", step_metric="step")
    return opened


def _number(file: Path) -> str:
    """Read the number of the run of this directory; drawn and kept when there is none yet."""
    try:
        number = json.loads(file.read_bytes())["id"]
        if isinstance(number, str) and number:
            return number
    except FileNotFoundError:
        pass
    except (ValueError, TypeError, KeyError):
        logger.warning("%s is damaged: Weights & Biases shows this session as a new run.", file)
    number = secrets.token_hex(4)
    with whole(file) as partial:
        partial.write_text(json.dumps({"id": number}))
    return number


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Copy settings for a log: secrets out, absolute paths cut to their last part."""
    clean: dict[str, Any] = {}
    for key, value in values.items():
        if _SECRET.search(key) and key != "tokens":
            clean[key] = "(left out)"
        elif isinstance(value, Mapping):
            clean[key] = without_secrets(value)
        elif isinstance(value, str):
            clean[key] = _last_part(value)
        elif isinstance(value, list | tuple):
            clean[key] = [_last_part(item) if isinstance(item, str) else item for item in value]
        else:
            clean[key] = value
    return clean


def _last_part(text: str) -> str:
    if os.sep in text or "://" in text:
        return text.rstrip(os.sep).rsplit(os.sep, 1)[-1]
    return text
