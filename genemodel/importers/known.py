"""Published files, by their checksums: names have changed twice, bytes have not."""

import functools
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from genemodel.bundle.directory import sha256

# Licences as their publishers state them; of GeneCompass there is no statement anywhere.
LICENCES = {"geneformer": "Apache-2.0", "genecompass": "none stated by its publishers"}


@dataclass(frozen=True)
class KnownFile:
    """One published file.

    Attributes
    ----------
    family
        geneformer or genecompass.
    path
        Its name in the repository of its family.
    sha256
        Of its bytes.
    """

    family: str
    path: str
    sha256: str

    @property
    def model(self) -> str:
        """Name of the model that weights are of: the folder that they are published in."""
        parts = self.path.split("/")
        return parts[-2] if len(parts) > 1 else "Geneformer-V2-316M"


@functools.lru_cache(maxsize=1)
def known_files() -> dict[str, KnownFile]:
    """Give published files by sha256; of the same bytes the first name."""
    text = (resources.files("genemodel.importers") / "data" / "known_files.tsv").read_text("utf-8")
    found: dict[str, KnownFile] = {}
    for line in text.splitlines()[1:]:
        family, path, digest, _ = line.split("\t")
        found.setdefault(digest, KnownFile(family, path, digest))
    return found


def recognised(path: Path) -> tuple[str, KnownFile | None]:
    """Checksum of a file, and which published one it is, if any."""
    digest = sha256(path)
    return digest, known_files().get(digest)
