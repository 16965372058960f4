"""``python -m genemodel`` is the command ``genemodel``."""

import sys

from genemodel.command.cli import main

if __name__ == "__main__":
    sys.exit(main())
