"""``python -m genemodel`` is the command ``genemodel``."""

import sys

from genemodel.cli import main

if __name__ == "__main__":
    sys.exit(main())
