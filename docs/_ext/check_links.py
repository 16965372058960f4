"""Checks that every link between pages of a built site leads somewhere, to the very heading.

python docs/_ext/check_links.py docs/_build/html
"""

import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """Links and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


@cache
def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def broken(root: Path) -> list[str]:
    """List the links that lead nowhere, each with its page."""
    faults = []
    for file in sorted(root.rglob("*.html")):
        for link in page(file).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = file if not parts.path else (file.parent / unquote(parts.path)).resolve()
            where = f"{file.relative_to(root)}: {link}"
            if not target.is_file():
                faults.append(f"{where}: no such file")
            elif target.suffix == ".html" and unquote(parts.fragment) not in page(target).anchors:
                faults.append(f"{where}: no such place on that page")
    return faults


if __name__ == "__main__":
    found = broken(Path(sys.argv[1]))
    print("\n".join(found) or "every link between pages leads somewhere")
    sys.exit(bool(found))
