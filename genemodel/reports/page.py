"""One self-contained HTML page from text, tables and figures.

No file beside it, no script, no network: the page can be mailed and still opens in ten years. It
follows the reader's light or dark setting, prints well, and ends by saying how it was made.
Everything that is passed in is escaped.
"""

import base64
import html
import io
import os
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pandas as pd

from genemodel.errors import ConfigError, DataError
from genemodel.writing import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Pixels of a figure that shrinks to the page: in a window of 1,200 it has 944, and letters of 8
# points are not read below three quarters of their size. Wider ones are scrolled.
_SHRINKS_TO = 1_260

__all__ = ["Report", "number_text", "versions"]

_STYLE = """
:root{--page:#fff;--ink:#1c2430;--soft:#5b6675;--line:#dfe4ea;--fill:#f5f7f9;--accent:#0b62a4;
--best:#e3f0fa}
@media (prefers-color-scheme:dark){:root{--page:#14181d;--ink:#e3e8ee;--soft:#9aa6b4;--line:#323b46;
--fill:#1c222a;--accent:#7cbcf0;--best:#1d3a54}}
*{box-sizing:border-box}
html{scroll-behavior:smooth}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.frame{max-width:1240px;margin:0 auto;padding:28px 24px 64px;display:grid;
grid-template-columns:176px minmax(0,1fr);gap:32px}
header{grid-column:1/-1;border-bottom:1px solid var(--line);padding-bottom:14px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px}
h2{font-size:19px;margin:38px 0 10px;scroll-margin-top:12px}
main>section:first-child h2{margin-top:0}
p{margin:0 0 12px;max-width:76ch}
.soft{color:var(--soft)}
nav{position:sticky;top:20px;align-self:start;font-size:13.5px}
nav b{display:block;margin-bottom:6px;color:var(--soft);font-weight:600}
nav ol{margin:0;padding-left:18px}
nav li{margin:3px 0}
a{color:var(--accent);text-decoration:none}
a:hover{text-decoration:underline}
.wide{overflow-x:auto;margin:6px 0 18px}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
.caption{color:var(--soft);font-size:13.5px;max-width:88ch;margin:14px 0 4px}
th,td{padding:5px 8px 5px 0;border-bottom:1px solid var(--line);text-align:right;
vertical-align:top;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
td.words{text-align:left;white-space:normal}
td.best{background:var(--best);font-weight:600}
th{color:var(--soft);font-weight:600;vertical-align:bottom;white-space:normal;max-width:13ch}
th.words{text-align:left}
td:not(:first-child),th:not(:first-child){padding-left:8px}
figure{margin:8px 0 26px}
figure img{display:block;max-width:100%;height:auto;background:#fff;border:1px solid var(--line);
border-radius:6px;padding:8px}
figure.wide img{max-width:none}
figcaption{color:var(--soft);font-size:13.5px;margin-top:7px;max-width:80ch}
pre{background:var(--fill);border:1px solid var(--line);border-radius:6px;padding:10px 12px;
overflow-x:auto;font-size:12.5px;line-height:1.45}
details summary{cursor:pointer;color:var(--accent);margin-bottom:8px}
figcaption a{white-space:nowrap}
@media (max-width:860px){.frame{grid-template-columns:minmax(0,1fr);gap:18px;padding:18px 14px 48px}
nav{position:static}}
@media print{nav{display:none}.frame{display:block}figure{break-inside:avoid}}
"""


def number_text(value: object, beside: object = None) -> str:
    """Write a number for a reader: three decimals below 10, fewer above.

    Parameters
    ----------
    value
        Anything; what is not a number is written as it is.
    beside
        The largest number of the column, so that all its numbers get the same decimals.
    """
    if value is None or value is pd.NA:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}".replace("-", "−")
    if not isinstance(value, float | np.floating):
        return str(value)
    number = float(value)
    if not np.isfinite(number):
        return "–" if np.isnan(number) else ("∞" if number > 0 else "−∞")
    scale = abs(float(beside)) if isinstance(beside, float | int) else abs(number)
    if number == 0 and not scale:
        return "0"
    if 0 < scale < 0.001:
        return f"{number:.1e}".replace("-", "−", 1) if number < 0 else f"{number:.1e}"
    # 3 decimals below 10, 2 below 100 and so on: 128.456 reads 128.5.
    places = max(0, 4 - len(str(int(scale)))) if scale < 1000 else 0
    text = f"{number:,.{places}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.removeprefix("-")


class Report:
    """Collects sections and writes them as one page.

    Parameters
    ----------
    title
        Heading and window title.
    subtitle
        One line below it.

    Examples
    --------
    >>> report = Report("Two studies of lung")
    >>> report.section("Scores").text("Higher is better.")  # doctest: +ELLIPSIS
    <genemodel.reports.page.Report object at ...>
    >>> report.write("report.html")  # doctest: +SKIP
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._sections: list[tuple[str, list[str]]] = []
        self._settings: dict[str, Any] = {}
        self._packages: dict[str, str] = {}
        self._figures = 0

    def section(self, heading: str) -> Self:
        """Start a section; it appears in the table of contents."""
        self._sections.append((heading, []))
        return self

    def _add(self, block: str) -> Self:
        if not self._sections:
            self._sections.append(("", []))
        self._sections[-1][1].append(block)
        return self

    def text(self, text: str) -> Self:
        """Add text; an empty line starts a paragraph."""
        paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
        return self._add("".join(f"<p>{html.escape(part)}</p>" for part in paragraphs))

    def preformatted(self, text: str) -> Self:
        """Add text as it is, in a fixed-width box."""
        return self._add(f"<pre>{html.escape(text)}</pre>")

    def table(
        self,
        table: pd.DataFrame,
        caption: str = "",
        *,
        best: Mapping[str, Literal["high", "low"]] | None = None,
        never_best: Collection[str] = (),
        index: bool = True,
    ) -> Self:
        """Add a table.

        Parameters
        ----------
        table
            Rows and columns; numbers are written for reading, everything else as text.
        caption
            What it shows.
        best
            Column to the better direction; the best values are marked.
        never_best
            Names of rows that take no part in that: controls, whose figures say where zero is.
        index
            Show the row names.
        """
        best = best or {}
        if unknown := [column for column in best if column not in table.columns]:
            raise ConfigError(
                f"Report.table: best names the column {unknown[0]!r}; the table has "
                f"{', '.join(map(str, table.columns))}."
            )
        words = {column for column in table.columns if _is_words(table[column])}
        head = f"<th>{html.escape(str(table.index.name or ''))}</th>" if index else ""
        for column in table.columns:
            kind = ' class="words"' if column in words else ""
            head += f"<th{kind}>{html.escape(str(column).replace('_', ' '))}</th>"
        scales = {column: _scale(table[column]) for column in table.columns}
        rows = []
        takes_part = ~table.index.astype(str).isin(list(never_best))
        marked = {
            column: _best(table[column].where(takes_part), direction)
            for column, direction in best.items()
        }
        for i, (name, row) in enumerate(
            zip(table.index, table.itertuples(index=False), strict=True)
        ):
            cells = [f"<td>{html.escape(str(name))}</td>"] if index else []
            for column, value in zip(table.columns, row, strict=True):
                kinds = ["words"] if column in words else []
                if column in marked and marked[column][i]:
                    kinds.append("best")
                kind = f' class="{" ".join(kinds)}"' if kinds else ""
                text = html.escape(number_text(value, scales[column]))
                cells.append(f"<td{kind}>{text}</td>")
            rows.append(f"<tr>{''.join(cells)}</tr>")
        label = f'<p class="caption">{html.escape(caption)}</p>' if caption else ""
        return self._add(
            f'{label}<div class="wide"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )

    def figure(self, figure: "Figure | Axes | np.ndarray", caption: str = "") -> Self:
        """Add a figure inside the page, and close it, so that a long report piles up none.

        It stands at twice the screen's resolution, with the drawing as SVG behind a link, for a
        paper.

        Parameters
        ----------
        figure
            A matplotlib Figure, or the Axes (or array of Axes) of one.
        caption
            What it shows; also read aloud to those who cannot see it.
        """
        from matplotlib import pyplot as plt

        drawn: Any = np.ravel(figure)[0] if isinstance(figure, np.ndarray) else figure
        drawn = getattr(drawn, "figure", None) or drawn
        if not hasattr(drawn, "savefig"):
            raise ConfigError(
                f"Report.figure got a {type(figure).__name__}; pass a matplotlib Figure or its "
                "Axes."
            )
        saved, vector = _saved(drawn, "png"), _saved(drawn, "svg")
        plt.close(drawn)
        self._figures += 1
        # The tight box cut the margins: show at 96 pixels an inch of what was really saved.
        width = round(int.from_bytes(saved[16:20], "big") * 96 / 160)
        wide = ' class="wide"' if width > _SHRINKS_TO else ""
        return self._add(
            f'<figure{wide}><img src="data:image/png;base64,{base64.b64encode(saved).decode()}" '
            f'alt="{html.escape(caption or "figure")}" width="{width}"><figcaption>'
            f'{html.escape(caption)} <a download="figure-{self._figures}.svg" '
            f'href="data:image/svg+xml;base64,{base64.b64encode(vector).decode()}">SVG</a>'
            "</figcaption></figure>"
        )

    def settings(self, settings: Mapping[str, Any]) -> Self:
        """Add settings to the block on how the page was made; nested names are joined by dots."""
        self._settings.update(_flat(settings))
        return self

    def packages(self, packages: Mapping[str, str]) -> Self:
        """Add what else the page was made with: names and versions, of libraries or of R's."""
        self._packages.update(packages)
        return self

    def html(self) -> str:
        """Return the whole page."""
        sections = [(heading, blocks) for heading, blocks in self._sections if heading or blocks]
        parts, links = [], []
        for i, (heading, blocks) in enumerate([*sections, ("How this was made", [self._made()])]):
            title = f'<h2 id="s{i}">{html.escape(heading)}</h2>' if heading else ""
            if heading:
                links.append(f'<li><a href="#s{i}">{html.escape(heading)}</a></li>')
            parts.append(f"<section>{title}{''.join(blocks)}</section>")
        subtitle = f'<div class="soft">{html.escape(self.subtitle)}</div>' if self.subtitle else ""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head><body>"
            f'<div class="frame"><header><h1>{html.escape(self.title)}</h1>{subtitle}</header>'
            f"<nav><b>Contents</b><ol>{''.join(links)}</ol></nav><main>{''.join(parts)}</main>"
            "</div></body></html>\n"
        )

    def _made(self) -> str:
        facts = {
            "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "software": ", ".join(f"{n} {v}" for n, v in (_versions() | self._packages).items()),
            "machine": f"{platform.system()} {platform.machine()}, "
            f"{os.cpu_count() or 1} CPU cores, "
            f"Python {platform.python_version()}",
        }
        return _rows_of(facts) + (
            f"<details><summary>{len(self._settings)} settings</summary>"
            f"{_rows_of(self._settings)}</details>" if self._settings else ""
        )  # fmt: skip

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page; an existing file is replaced in one move.

        Returns
        -------
        Path
            Where it is.

        Raises
        ------
        DataError
            If the place cannot be written.
        """
        target = Path(path)
        if target.is_dir():
            raise DataError(
                f"{target} is a directory; name the file, for instance {target / 'report.html'}."
            )
        page = self.html().encode()
        try:
            with whole(target, needed=len(page)) as partial:
                partial.write_bytes(page)
        except OSError as error:
            raise DataError(
                f"The report cannot be written to {target}: {error.strerror}. Choose another place."
            ) from error
        return target


def _rows_of(facts: Mapping[str, object]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td>"
        f'<td class="words">{html.escape(_setting_text(value))}</td></tr>'
        for key, value in facts.items()
    )
    return f'<div class="wide"><table><tbody>{rows}</tbody></table></div>'


def _saved(figure: Any, kind: Literal["png", "svg"]) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # Words stay words, to be edited; the same figure gives the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "genemodel"}):
        figure.savefig(
            buffer, format=kind, dpi=160, bbox_inches="tight", facecolor="white",
            metadata={"Date": None} if kind == "svg" else None,
        )  # fmt: skip
    return buffer.getvalue()


def _scale(column: pd.Series) -> float | None:
    """Return the largest absolute finite number of a float column."""
    if not pd.api.types.is_float_dtype(column.dtype):
        return None
    values = column.to_numpy(float, na_value=np.nan)
    values = np.abs(values[np.isfinite(values)])
    return float(values.max()) if len(values) else None


def _is_words(column: pd.Series) -> bool:
    return bool(column.map(lambda value: isinstance(value, str)).any())


def _best(column: pd.Series, direction: str) -> np.ndarray:
    values = pd.to_numeric(column, errors="coerce").to_numpy(float)
    if direction not in ("high", "low"):
        raise ConfigError(f"Report.table: best={direction!r} is unknown; use 'high' or 'low'.")
    if not np.isfinite(values).any() or len(values) < 2:
        return np.zeros(len(values), bool)
    top = np.nanmax(values) if direction == "high" else np.nanmin(values)
    return np.asarray(values == top)


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{before}{key}."))
        else:
            flat[f"{before}{key}"] = value
    return flat


def _setting_text(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return ", ".join(_setting_text(item) for item in value) or "none"
    # A setting is quoted as it was given: no rounding.
    return "none" if value is None else str(value)


def versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of distributions, by name, of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _versions() -> dict[str, str]:
    from genemodel import __version__

    # A checkout that was never installed has no metadata, but knows its version.
    names = ("torch", "numpy", "scipy", "anndata", "scikit-learn", "umap-learn")
    return {"genemodel": __version__, **versions(names)}
