"""python -m orthrus_fast.bench"""

import signal
import sys

from orthrus_fast.bench.command import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # children end, too
    sys.exit(main())
