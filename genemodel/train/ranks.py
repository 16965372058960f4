"""Which ranks live, and where they are: files of heartbeats, and a watch over them.

Every rank has a thread that writes ``<run>/ranks/rank-<r>.json`` and reads those of the others. A
collective operation cannot tell who is missing: a stopped, a killed and a slow rank all look like
silence, and the others wait inside the operation. The files can: a stopped process no longer
writes, and one that is stuck says in which part of a step. They need nothing but the folder that
the checkpoints need as well.
"""

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from genemodel.errors import GenemodelError
from genemodel.train.processes import RANK_LOST

logger = logging.getLogger(__name__)

# Where a rank may be. Whoever waits for others is not the one that is waited for.
START, DATA, COMPUTE, EXCHANGE, LOOK, SAVE = "start", "data", "compute", "exchange", "look", "save"
FAILED = "failed"


class PeerLost(GenemodelError):
    """Another rank has ended; this one cannot go on."""


class Ranks:
    """Heartbeats of this rank, and the watch over all.

    Parameters
    ----------
    run
        Run directory, which all ranks see.
    rank, world
        This process, and how many there are.
    minutes
        Without a finished step for so long the run is taken to hang, and ends.
    """

    def __init__(self, run: Path, rank: int, world: int, minutes: float) -> None:
        self.folder = run / "ranks"
        self.rank, self.world = rank, world
        self.limit_s = 60 * minutes
        # Often enough to name a silent rank well within the limit, rarely enough for a file system.
        self.every_s = min(10.0, max(0.2, self.limit_s / 20))
        self.step, self.phase = 0, START
        self._why = ""
        self._changed = time.monotonic()
        self._seen: dict[int, tuple[str, float]] = {}
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._beat = 0

    def __enter__(self) -> "Ranks":
        """Start the thread; with one process there is nobody to watch."""
        if self.world > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write()
            self._thread = threading.Thread(target=self._watch, name="genemodel-ranks", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Stop watching; an error is left for the others to read."""
        self._end.set()
        if self._thread is None:
            return
        self._thread.join()
        if error is not None and not isinstance(error, SystemExit | PeerLost):
            self._why = f"{type(error).__name__}: {error}".splitlines()[0][:500]
            self.phase = FAILED
            self._write()
        elif not isinstance(error, PeerLost):
            self._path(self.rank).unlink(missing_ok=True)

    def at(self, phase: str, step: int | None = None) -> None:
        """Note where this rank is; the thread writes it down."""
        self.phase = phase
        if step is not None and step != self.step:
            self.step = step
        self._changed = time.monotonic()

    def explain(self, error: BaseException) -> PeerLost | None:
        """Say why an operation between ranks broke, where another rank is the reason.

        A rank that fails says so in its file; one that was killed has only stopped writing, which
        takes a few beats to be sure of.
        """
        if self._thread is None:
            return None
        deadline = time.monotonic() + 3 * self.every_s + 1.0
        before = {r: self._read(r) for r in self._others()}
        while time.monotonic() < deadline:
            for r in self._others():
                state = self._read(r)
                if state.get("phase") == FAILED:
                    return PeerLost(
                        f"Rank {r} stopped at step {state['step'] + 1:,}: {state['why']}. Its own "
                        "message says more. The last checkpoint is intact: mend the cause and give "
                        "the same command."
                    )
            time.sleep(min(0.2, self.every_s))
        silent = [r for r, state in before.items() if self._read(r) == state]
        if not silent:
            return None
        steps = ", ".join(f"rank {r} (last step {before[r].get('step', 0):,})" for r in silent)
        return PeerLost(
            f"The connection between the ranks broke at step {self.step + 1:,}, and {steps} no "
            f"longer lives ({str(error).splitlines()[0][:200]}): it was killed, perhaps for "
            "memory, or its node is gone. The last checkpoint is intact: the same command goes on "
            "from it."
        )

    # -- the thread ------------------------------------------------------------------------------

    def _others(self) -> list[int]:
        return [r for r in range(self.world) if r != self.rank]

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"

    def _write(self) -> None:
        self._beat += 1
        state = {
            "beat": self._beat, "pid": os.getpid(), "step": self.step, "phase": self.phase,
            "why": self._why,
        }  # fmt: skip
        path = self._path(self.rank)
        partial = path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(state))
            partial.replace(path)
        except OSError as error:  # a full disk must not kill the watch
            logger.warning("%s cannot be written (%s).", path, error.strerror)

    def _read(self, rank: int) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(self._path(rank).read_text())
        except (OSError, ValueError):
            return {}
        return state

    def _watch(self) -> None:
        while not self._end.wait(self.every_s):
            self._write()
            now = time.monotonic()
            for r in self._others():
                text = json.dumps(self._read(r))
                if r not in self._seen or self._seen[r][0] != text:
                    self._seen[r] = (text, now)
            if now - self._changed > self.limit_s:
                self._give_up(now)

    def _give_up(self, now: float) -> None:
        """End this process: nothing in Python reaches a thread that waits in a collective."""
        minutes = self.limit_s / 60
        silent = [r for r in self._others() if now - self._seen[r][1] > self.limit_s / 2]
        states = {r: json.loads(self._seen[r][0]) for r in self._others()}
        states[self.rank] = {"phase": self.phase, "step": self.step}
        if silent:
            who = ", ".join(f"rank {r}" for r in silent)
            step = max(states[r].get("step", 0) for r in silent)
            why = f"{who} has given no sign of life since step {step:,}: stopped, or its node hangs"
        else:
            stuck = [r for r, state in states.items() if state.get("phase") != EXCHANGE]
            stuck = stuck or list(states)
            why = "; ".join(
                f"rank {r} is in {states[r].get('phase', START)!r} after step "
                f"{states[r].get('step', 0):,}"
                for r in stuck
            )
        logger.error(
            "No step was finished for %.3g minutes (trainer.hang_minutes): %s. This run ends here; "
            "the same command goes on from the last checkpoint.",
            minutes, why,
        )  # fmt: skip
        logging.shutdown()
        os._exit(RANK_LOST)
