"""Decodes a file of prompts on a Ray cluster, into the file that `orthrus generate` would write.

    python -m scripts.batch_on_ray --decoders 8 --prompts-file prompts.jsonl --output results.jsonl

The other flags are those of `orthrus generate`. It starts Ray on this machine, or takes the cluster
at RAY_ADDRESS; each decoder has as many GPUs as --tensor-parallel says, or cores where the cluster
has none or --device is cpu. The prompts, the results and the checkpoint, if it is a directory, lie
where every machine finds them. A run that was killed is resumed by the same command, or by `orthrus
generate` with the same flags.
"""

from __future__ import annotations

import argparse
import os
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import ray
import ray.data

from orthrus_fast.cli.batch import begin, decode_lines, plan, read_lines, write_results
from orthrus_fast.cli.flags import build_generate_parser, check_flags
from orthrus_fast.cli.results_file import Results
from orthrus_fast.cli.session import load_decoder
from orthrus_fast.cli.terminal import fail
from orthrus_fast.errors import OrthrusError, RequestError
from orthrus_fast.fingerprint import settings_of
from orthrus_fast.results import Generation

Columns = dict[str, Any]  # name -> array
ROUNDS = 8  # of the slots' prompts in a batch: a killed run loses a batch of each decoder


class Decoding:
    """An actor: decodes batches of lines by their places in ``todo``."""

    def __init__(self, args: argparse.Namespace, shared: Any) -> None:
        header, self._todo, self._params = ray.get(shared)
        self._args, self._decoder = args, load_decoder(args)
        ours, first = settings_of(self._decoder.configuration), header["configuration"]
        if differ := [name for name in ours if ours[name] != first.get(name)]:
            raise RequestError(f"this machine decodes other texts than the first: {differ} differ")

    def __call__(self, batch: Columns) -> Columns:
        """Return the results of a batch, pickled."""
        places = [int(place) for place in batch["place"]]
        of_line = {self._todo[place].index: place for place in places}
        lines, params = [self._todo[i] for i in places], [self._params[i] for i in places]
        done = list(decode_lines(self._decoder, self._args, lines, params))
        results = [pickle.dumps(generation) for _, generation in done]
        return {"place": [of_line[line.index] for line, _ in done], "result": results}


def planned(*what: Any) -> tuple[Any, ...]:
    """What a decoder there makes of the flags, for all of them."""
    args, *rest = what
    return (args, *plan(load_decoder(args), args, *rest))


def decoded(args: argparse.Namespace, each: dict[str, Any], *what: Any) -> Iterator[Any]:
    """Yield each line with its result as batches are done; ``each`` is what a decoder takes."""
    todo = what[1]
    if not todo:
        return
    size = max(1, min(ROUNDS * args.slots, -(-len(todo) // args.decoders)))
    blocks = -(-len(todo) // size)
    places = ray.data.from_items(
        [{"place": i} for i in range(len(todo))], override_num_blocks=blocks
    )
    shared = ray.put(what)
    strategy = ray.data.ActorPoolStrategy(size=args.decoders)
    results = places.map_batches(
        Decoding, fn_constructor_args=(args, shared), batch_size=size, compute=strategy, **each
    )
    for row in results.iter_rows():
        result: Generation = pickle.loads(row["result"])
        yield todo[row["place"]], result


def main() -> int:
    """Decode the file; return the exit code of ``orthrus generate``."""
    parser = build_generate_parser("python -m scripts.batch_on_ray")
    parser.add_argument("--decoders", type=int, default=2, metavar="N", help="(default: 2)")
    args = parser.parse_args()
    check_flags(parser, args)
    if args.prompts_file is None:
        raise RequestError("--prompts-file: the prompts to decode")
    lines, asked = read_lines(args)
    with Results(args.output) as results:
        ray.init(include_dashboard=None if "RAY_ADDRESS" in os.environ else False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        on_gpus = args.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
        each = {"num_gpus" if on_gpus else "num_cpus": args.tensor_parallel}
        alone = ray.remote(max_calls=1, **each)(planned)  # its process ends, and frees the memory
        there = alone.remote(args, lines, asked)
        args, header, params = ray.get(there)
        todo, params, seed = begin(results, header, lines, params)
        done = decoded(args, each, header, todo, params)
        return write_results(results, done, len(lines), seed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OrthrusError as error:
        sys.exit(fail(str(error)))
