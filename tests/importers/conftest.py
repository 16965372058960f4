import pytest


@pytest.fixture(scope="session")
def shared_parity(shared_knowledge):
    """Folder of published dictionaries and tokens; skips where there is none."""
    folder = shared_knowledge.parent / "parity"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist")
    return folder
