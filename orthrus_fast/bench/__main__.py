"""python -m orthrus_fast.bench"""

import signal
import sys
import warnings

from orthrus_fast.bench.command import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # children end, too
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # not used here
    sys.exit(main())
