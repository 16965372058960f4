"""Pointers that git leaves where git-lfs has not brought the file itself."""

from pathlib import Path

from genemodel.errors import DataError

_BEGINNING = b"version https://git-lfs"
# Pointers have about 130 bytes.
_LONGEST = 1024


def refuse_pointer(path: Path) -> None:
    """Refuse a git-lfs pointer, and say how to get what it points to.

    Raises
    ------
    DataError
        It is one, or empty.
    """
    try:
        size = path.stat().st_size
        if not path.is_file() or size > _LONGEST:
            return
        with path.open("rb") as file:
            beginning = file.read(_LONGEST)
    except OSError:
        return  # whoever reads it says what is wrong
    if not beginning:
        raise DataError(f"{path} is empty: copy it again from where it came from.")
    if beginning.startswith(_BEGINNING):
        wanted = dict(
            line.split(" ", 1)
            for line in beginning.decode("ascii", "replace").splitlines()
            if " " in line
        )
        size_text = wanted.get("size", "?")
        raise DataError(
            f"{path} is a git-lfs pointer of {size} bytes, not the file of {size_text} bytes that "
            f"it stands for ({wanted.get('oid', 'no oid')}): run `git lfs install` and `git lfs "
            f"pull` in the clone, or download the file itself."
        )
