"""Fixtures that every room's tests share."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def _real_data() -> Path:
    return Path(os.environ.get("GENEMODEL_TEST_DATA") or REPOSITORY.parent / "shared")


def _folder(name: str, pattern: str) -> Path:
    folder = _real_data() / name
    if not any(folder.glob(pattern)):
        pytest.skip(
            f"no real data: {folder} holds no {pattern}; point GENEMODEL_TEST_DATA to a folder "
            "with data/*.h5ad and knowledge/*.tsv.gz"
        )
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout that these tests belong to."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real h5ad files; skips where there is none."""
    return _folder("data", "*.h5ad")


@pytest.fixture(scope="session")
def shared_knowledge() -> Path:
    """Folder of gene and ortholog tables; skips where there is none."""
    return _folder("knowledge", "genes_*.tsv.gz")
