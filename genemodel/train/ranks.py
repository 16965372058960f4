"""Which ranks live, and where they are: files of heartbeats, and a watch over them.

Every rank has a thread that writes ``<run>/ranks/rank-<r>.json``, and reads those of the others
once this rank stands still. A collective operation cannot tell who is missing: a stopped, a killed
and a slow rank all look like silence, and the others wait inside the operation. The files can: a
stopped process no longer writes, one that failed has said why, and one that is stuck says in which
part of a step. They need nothing but the folder that the checkpoints need as well.
"""

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

from genemodel.errors import GenemodelError
from genemodel.train.processes import RANK_LOST

logger = logging.getLogger(__name__)

# Where a rank may be. Whoever waits for others is not the one that is waited for.
START, BUILD, DATA, COMPUTE = "start", "build", "data", "compute"
EXCHANGE, LOOK, SAVE, FAILED = "exchange", "look", "save", "failed"
# Before the first step only those that are gone are looked for: reading a corpus takes its time.
_UNTIMED = (START, BUILD)
# A rank that stands still for so many heartbeats looks whether the others do.
_STILL = 3
# What gloo, NCCL and torch's store say in when a connection breaks.
_BETWEEN_RANKS = re.compile(
    r"gloo|nccl|^Dist\w*Error|connection|socket|broken pipe|time[d-]? ?out|process ?group|tcpstore",
    re.IGNORECASE,
)
_GO_ON = "The last checkpoint is intact: the same command goes on from it."


class PeerLost(GenemodelError):
    """Another rank has ended; this one cannot go on."""

    exit_code = RANK_LOST


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
        self._seen: dict[int, tuple[dict[str, Any], float]] = {}
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._beat = 0
        self._explaining = False

    def __enter__(self) -> "Ranks":
        """Start the thread, before the ranks meet; with one process there is nobody to watch."""
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
        if error is None or isinstance(error, SystemExit | PeerLost):
            self._path(self.rank).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # the last one
        else:
            self._why = f"{type(error).__name__}: {error}".splitlines()[0][:500]
            self.phase = FAILED
            self._write()

    def at(self, phase: str, step: int | None = None) -> None:
        """Note where this rank is; the thread writes it down."""
        self.phase = phase
        if step is not None:
            self.step = step
        self._changed = time.monotonic()

    def explain(self, error: BaseException) -> PeerLost | None:
        """Say why an operation between ranks broke, where another rank is the reason.

        A rank that fails says so in its file, and of one that was killed on this node the process
        is missing; on another node it has only stopped writing, which takes a few beats to be sure
        of.
        """
        if self._thread is None:
            return None
        self._explaining = True
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        if self.phase == START:
            return PeerLost(
                f"Not all of the {self.world} ranks came to the start ({said}): the messages of "
                "the others say why, or they cannot reach MASTER_ADDR and MASTER_PORT."
            )
        between = _BETWEEN_RANKS.search(f"{type(error).__name__} {error}") is not None
        # A mistake of this rank's own is told at once: the others wait for it.
        deadline = time.monotonic() + 1.0 + (_STILL * self.every_s if between else 0.0)
        before = {r: self._read(r) for r in self._others()}
        while time.monotonic() < deadline:
            if gone := self._gone():
                return PeerLost(gone)
            time.sleep(min(0.1, self.every_s))
        silent = [r for r, state in before.items() if state and self._read(r) == state]
        if not silent or not between:
            return None
        names = ", ".join(f"rank {r} (last step {self._last_step(before[r]):,})" for r in silent)
        return PeerLost(
            f"The connection between the ranks broke at step {self.step + 1:,} ({said}), and "
            f"{names} gives no sign of life any more: it was killed, perhaps for memory, or its "
            f"node is gone. {_GO_ON}"
        )

    def _gone(self) -> str:
        """Say which rank has failed, or was killed on this node; empty where none is known to."""
        states = {r: self._read(r) for r in self._others()}
        for r, state in states.items():
            if state.get("phase") == FAILED:
                return (
                    f"Rank {r} stopped at step {state['step'] + 1:,}: {state['why']}. Its own "
                    "message says more. The last checkpoint is intact: mend the cause and give "
                    "the same command."
                )
        for r, state in states.items():
            if state.get("here") == _here() and not _lives(state["pid"]):
                step = self._last_step(state)
                return f"Rank {r} was killed after step {step:,}, perhaps for memory. {_GO_ON}"
        return ""

    def _last_step(self, state: dict[str, Any]) -> int:
        """Last step of another rank: it has done those of this one, whatever its last heartbeat."""
        return max(self.step, int(state.get("step", 0)))

    # -- the thread ------------------------------------------------------------------------------

    def _others(self) -> list[int]:
        return [r for r in range(self.world) if r != self.rank]

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"

    def _write(self) -> None:
        self._beat += 1
        state = {
            "beat": self._beat, "here": _here(), "pid": os.getpid(), "step": self.step,
            "phase": self.phase, "why": self._why,
        }  # fmt: skip
        path = self._path(self.rank)
        partial = path.with_suffix(".partial")
        try:
            try:
                partial.write_text(json.dumps(state))
                partial.replace(path)
            except OSError:
                # On a full disk what stands there already still has a place.
                with path.open("r+") as file:
                    file.write(json.dumps(state))
                    file.truncate()
        except OSError as error:  # must not end the watch
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
            still_s = now - self._changed
            # While all is well nobody reads: n ranks that read n files would be felt by a server.
            calm_s = min(_STILL * self.every_s, self.limit_s / 4)
            if self._explaining or self.phase == START or still_s < calm_s:
                self._seen.clear()
                continue
            if gone := self._gone():
                self._give_up(gone)
            for r in self._others():
                state = self._read(r)
                if r not in self._seen or self._seen[r][0] != state:
                    self._seen[r] = (state, now)
            if still_s > self.limit_s and self.phase not in _UNTIMED:
                self._give_up(
                    f"No step was finished for {self.limit_s / 60:.3g} minutes "
                    f"(trainer.hang_minutes): {self._who_hangs(now)}. {_GO_ON}"
                )

    def _who_hangs(self, now: float) -> str:
        silent = [r for r, (_, since) in self._seen.items() if now - since > self.limit_s / 2]
        states = {r: state for r, (state, _) in self._seen.items()}
        states[self.rank] = {"phase": self.phase, "step": self.step}
        if silent:
            who = ", ".join(f"rank {r}" for r in silent)
            step = max(self._last_step(states[r]) for r in silent)
            return f"{who} gave no sign of life since step {step:,}: stopped, or its node hangs"
        # A rank whose file is gone has left for the same reason.
        known = {r: state for r, state in sorted(states.items()) if state}
        stuck = [r for r, state in known.items() if state["phase"] != EXCHANGE] or list(known)
        return "; ".join(
            f"rank {r} is in {known[r]['phase']!r} after step {known[r]['step']:,}" for r in stuck
        )

    def _give_up(self, why: str) -> None:
        """End this process: nothing in Python reaches a thread that waits in a collective."""
        logger.error("%s", why)
        self._path(self.rank).unlink(missing_ok=True)
        logging.shutdown()
        os._exit(RANK_LOST)


def _here() -> str:
    """Name where numbers of processes mean the same: the node, and the container on it."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}"


def _lives(pid: int) -> bool:
    """Whether a process of this node is there and no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):  # no /proc on this system
        return True
    return state != "Z"
