"""python -m orthrus_fast.bench"""

import sys

from orthrus_fast.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
