"""The command of the benchmark: its errors become one line and an exit status."""

import signal
import sys
import warnings

from orthrus_fast.bench.flags import PROGRAM, build_parser, check_flags
from orthrus_fast.errors import OrthrusError
from orthrus_fast.launch import leave_talking_to_the_first


def main(arguments: list[str] | None = None, prog: str = PROGRAM) -> int:
    """Return 0: all parts are done; 1: a part failed; 2: bad input; 130: interrupted."""
    leave_talking_to_the_first()
    try:
        args = build_parser(prog).parse_args(arguments)
        check_flags(args)
        from orthrus_fast.bench.run import run  # with torch, for which --help does not wait

        return run(args)
    except (OrthrusError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; the finished parts are in --json's file", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # children end, too
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # not used here
    sys.exit(main())
