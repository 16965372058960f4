"""Where the command line stood before it was a room; scripts of users import it from here."""

from genemodel.command.cli import main

__all__ = ["main"]
