"""``python -m multiopt`` is the command ``multiopt``."""

import sys

from multiopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
