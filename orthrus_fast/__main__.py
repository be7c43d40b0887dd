"""python -m orthrus_fast, which is the command ``orthrus``."""

import sys

from orthrus_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
