"""One process of a run that :func:`genemodel.train.processes.supervise` has started.

python -m genemodel.train.worker SETTINGS.json
"""

import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from genemodel.errors import GenemodelError
from genemodel.settings import parse
from genemodel.train.processes import REFUSED


def main(file: str) -> int:
    """Do what is asked for as its settings say; messages go to standard error."""
    library = logging.getLogger("genemodel")
    library.addHandler(logging.StreamHandler(sys.stderr))
    library.setLevel(logging.INFO)
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    try:
        asked = json.loads(Path(file).read_text())
        _found(asked["verb"])(parse(_found(asked["kind"]), asked["settings"]))
    except GenemodelError as error:
        library.error("genemodel: error: %s", error)
        return error.exit_code
    except OSError as error:
        # A full disk or a forbidden folder is the machine's, not the program's.
        library.error("genemodel: error: %s: %s", error.strerror, error.filename)
        return REFUSED
    except KeyboardInterrupt:
        return 130
    return 0


def _found(name: str) -> Any:
    """Give what a module has under a name, ``module:name``."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _follow(parent: int) -> None:
    """Save and end when the supervisor is killed: the same command could not know of this one."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
