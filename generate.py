"""python generate.py … is ``orthrus generate …`` of the package beside this file."""

import sys

from orthrus_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
