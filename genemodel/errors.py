"""Errors that a user can act on.

A message says what was found, where, and what to do. The command line prints it without a
traceback; in a notebook it is an ordinary ``ValueError``.
"""


class GenemodelError(ValueError):
    """Base of every error that the user, not the program, can mend."""

    # Of a command that ends with it.
    exit_code = 2


class ConfigError(GenemodelError):
    """A setting is unknown, of the wrong type, impossible, or contradicts another."""


class DataError(GenemodelError):
    """A file, an AnnData object or a store does not hold what it must."""
