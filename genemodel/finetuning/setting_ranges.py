"""Ranges of the numbers that the networks of this room are made and trained with."""

import math
from collections.abc import Iterable

from genemodel.errors import ConfigError


def check_numbers(
    settings: object,
    *,
    positive: Iterable[str] = (),
    not_negative: Iterable[str] = (),
    shares: Iterable[str] = (),
) -> None:
    """Refuse numbers of a settings dataclass that are out of range, for its ``__post_init__``.

    Parameters
    ----------
    settings
        The instance.
    positive
        Fields that must be 1 or more.
    not_negative
        Fields that must be 0 or more.
    shares
        Fields that must lie between 0 and 1, both included.

    Raises
    ------
    ConfigError
        Names the first field that is out of range, and its value.
    """
    ranges = (
        (positive, 1, math.inf, "be 1 or more"),
        (shares, 0, 1, "be between 0 and 1"),
        (not_negative, 0, math.inf, "not be negative"),
    )
    for names, least, most, must in ranges:
        for name in names:
            value = getattr(settings, name)
            if not least <= value <= most:
                raise ConfigError(f"{name}={value}: must {must}.")
