"""Names of the sources of a corpus: no two alike, because a name is a data set that is held out.

Programs call the folders of all samples the same (``filtered_feature_bc_matrix``), so the file name
alone does not tell them apart.
"""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from genemodel.cells.remote import is_local
from genemodel.cells.sources import stem
from genemodel.errors import ConfigError


@dataclass(frozen=True)
class Nameless:
    """What a source may be called by.

    Attributes
    ----------
    path
        Its file or address; None for cells in memory.
    given
        The name that the caller gave; None where it is to be found.
    default
        What cells in memory are called by.
    genome
        The genome of a file that was chosen.
    """

    path: str | None
    given: str | None
    default: str = "AnnData"
    genome: str | None = None

    def name(self, depth: int) -> str:
        """Stem with ``depth`` parent folders before it; behind the last, the whole file name."""
        if self.path is None:
            return self.default
        path = Path(os.path.abspath(self.path)) if is_local(self.path) else PurePosixPath(self.path)
        folders = [part for part in path.parts[:-1] if part.strip("/")]
        own = stem(Path(path)) if depth <= len(folders) else path.name
        name = "/".join([*folders[max(0, len(folders) - depth) :], own])
        return f"{name} {self.genome}" if self.genome and depth > len(folders) else name

    def may_go_deeper(self, depth: int) -> bool:
        """Whether one folder more makes another name."""
        return self.path is not None and self.name(depth + 1) != self.name(depth)


def told_apart(sources: Sequence[Nameless], taken: Collection[str] = ()) -> list[str]:
    """Name every source such that no two are alike.

    As many parent folders are put before a name as tell it from the others and from those
    ``taken``; cells in memory are numbered.

    Raises
    ------
    ConfigError
        The caller gave one name twice, or one that is taken.
    """
    given = [source.given for source in sources if source.given is not None]
    for name, n in Counter(given).items():
        if n > 1 or name in taken:
            also = "one that the corpus has already" if n == 1 else f"given to {n} sources"
            raise ConfigError(
                f"the name {name!r} is {also}: their cells could not be told apart or held out. "
                "Give every source a name of its own (column name of a sheet; in Python a mapping "
                "name -> source); sources that are one data set say so in an obs column dataset"
            )
    depth = [0] * len(sources)
    fixed = {*given, *taken}
    while True:
        names = [
            s.name(d) if s.given is None else s.given for s, d in zip(sources, depth, strict=True)
        ]
        counts = Counter(names)
        deeper = [
            i
            for i, s in enumerate(sources)
            if s.given is None
            and (counts[names[i]] > 1 or names[i] in fixed)
            and s.may_go_deeper(depth[i])
        ]
        if not deeper:
            break
        for i in deeper:
            depth[i] += 1
    used = set(fixed)
    for i, source in enumerate(sources):
        if source.given is not None:
            continue
        name, number = names[i], 1
        while name in used:
            number += 1
            name = f"{names[i]} {number}"
        used.add(name)
        names[i] = name
    return names
