"""Takes the picture of README.md from the notebook that makes it, as that was last executed.

    ./scripts/docs notebooks quick_start && python scripts/readme_picture.py

So what a newcomer sees first is what the quick start gives, on cells that the package makes.
"""

import base64
import json
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOK = DOCS / "notebooks" / "quick_start.ipynb"
OUT = DOCS / "images" / "before_after.png"


def figure() -> bytes:
    """The first figure of the notebook: before and after, by cell type and by batch."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    outputs = (output for cell in notebook["cells"] for output in cell.get("outputs", []))
    image = next(o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {}))
    return base64.b64decode(image if isinstance(image, str) else "".join(image))


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_bytes(figure())
    print(f"{OUT}, {OUT.stat().st_size / 1e3:.0f} kB")
