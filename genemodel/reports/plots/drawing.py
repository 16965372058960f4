"""What all figures share: axes of their own or given ones, colours that stay apart."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from genemodel.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's colours without black, the darkest first.
_OKABE_ITO = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#F0E442",
)  # fmt: skip
_GREY = "#B5B5B5"
_OURS, _THEIRS = "#0072B2", "#D55E00"
# Linear RGB as a deuteranope sees it (Viénot, Brettel and Mollon 1999).
_DEUTERANOPE = np.array(
    [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]]
)
# Axes to draw into instead of a new figure, those that are left; see `into`.
_GIVEN: ContextVar["list[Axes] | None"] = ContextVar("given axes", default=None)


@contextmanager
def into(axes: "Sequence[Axes]") -> Iterator[None]:
    """Have the plots drawn within use these axes, one a panel, instead of figures of their own.

    Raises
    ------
    ConfigError
        They are more or fewer than the panels.
    """
    left = list(axes)
    token = _GIVEN.set(left)
    try:
        yield
    finally:
        _GIVEN.reset(token)
    if left:
        used = len(axes) - len(left)
        raise ConfigError(f"ax holds {len(axes)} axes, and this plot has {used} panels.")


def _new(
    rows: int = 1,
    columns: int = 1,
    *,
    width: float = 4.2,
    height: float = 3.4,
    panels: int | None = None,
) -> "tuple[Figure, np.ndarray]":
    """Make a figure of a grid, of which the first ``panels`` (all by default) are drawn into.

    Of axes that were given, the figure that is returned is an empty one: size, title and layout of
    theirs are their owner's.
    """
    from matplotlib import pyplot as plt
    from matplotlib.figure import Figure

    given = _GIVEN.get()
    if given is not None:
        panels = rows * columns if panels is None else panels
        if len(given) < panels:
            raise ConfigError(
                f"ax holds too few axes: this plot has {panels} panels more, and {len(given)} "
                "are left. Give one for each, or none for a figure of its own."
            )
        apart = Figure()
        axes = np.empty(rows * columns, object)
        axes[:panels], given[:panels] = given[:panels], []
        for place in range(panels, rows * columns):
            axes[place] = apart.add_subplot()
        return apart, axes.reshape(rows, columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    return figure, axes


def _axes(ax: "Axes | None", width: float = 4.2, height: float = 3.4) -> "Axes":
    return _new(width=width, height=height)[1][0, 0] if ax is None else ax


def _clean(ax: "Axes") -> None:
    ax.spines[["top", "right"]].set_visible(False)


def _lab(rgb: np.ndarray) -> np.ndarray:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return _lab_of_linear(linear)


def _lab_of_linear(linear: np.ndarray) -> np.ndarray:
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = np.clip(linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089]), 0, None)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1
    )


@functools.cache
def palette(n: int) -> tuple[str, ...]:
    """Return n colours that stay apart, also for a colour-blind reader.

    The first eight follow Okabe and Ito. Each further one is, of a grid of colours neither too
    light nor too dark for a white page, the one farthest from all before it in CIELAB, counting the
    smaller of the distances for normal and (doubled) for deuteranopic sight.
    """
    chosen = list(_OKABE_ITO[:n])
    if n <= len(_OKABE_ITO):
        return tuple(chosen)
    level = np.linspace(0, 1, 12)
    grid = np.stack(np.meshgrid(level, level, level, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _lab(grid)
    # CIELAB overstates differences between glaring colours, so those are left out.
    grid = grid[(lab[:, 0] > 28) & (lab[:, 0] < 82) & (np.hypot(lab[:, 1], lab[:, 2]) < 80)]
    fixed = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in chosen])

    def views(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return _lab_of_linear(linear), _lab_of_linear(np.clip(linear @ _DEUTERANOPE.T, 0, 1))

    normal, blind = views(grid)
    nearest = np.full(len(grid), np.inf)

    def take(one_normal: np.ndarray, one_blind: np.ndarray) -> None:
        # Deuteranopes have fewer colours to choose from, so half the distance must do for them.
        apart = np.minimum(
            np.linalg.norm(normal - one_normal, axis=1),
            2.0 * np.linalg.norm(blind - one_blind, axis=1),
        )
        np.minimum(nearest, apart, out=nearest)

    for pair in zip(*views(fixed), strict=True):
        take(*pair)
    while len(chosen) < n:
        at = int(nearest.argmax())
        chosen.append("#" + "".join(f"{round(255 * v):02X}" for v in grid[at]))
        take(normal[at], blind[at])
    return tuple(chosen)


def category_colours(names: Sequence[object] | pd.Series) -> dict[str, str]:
    """Give every category a colour, in sorted order (numbers inside names count as numbers)."""
    unique = sorted(pd.Series(names).dropna().astype(str).unique(), key=_natural)
    real = [name for name in unique if name != "not given"]
    return {
        **dict(zip(real, palette(len(real)), strict=True)),
        **dict.fromkeys(set(unique) - set(real), _GREY),
    }


def _natural(name: str) -> list[tuple[int, int | str]]:
    parts: list[tuple[int, int | str]] = []
    digits = ""
    for character in name + " ":
        if character.isdigit():
            digits += character
            continue
        if digits:
            parts.append((0, int(digits)))
            digits = ""
        parts.append((1, character))
    return parts
