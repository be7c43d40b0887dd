"""Which tiles a product is launched with: from tables of what was measured, else from defaults.

Tiles change no bit of a result, so a table changes no text. The committed one, tiles.json, is
followed by one that ``orthrus tune`` has left in the user's cache directory for this very chip.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthrus_fast import __version__
from orthrus_fast.kernels.formats import GROUP, PLACES
from orthrus_fast.kernels.interface import LARGEST_STEP, Weight
from orthrus_fast.options import TILED_ROWS

NEAR = 1.5  # at most so many times, in all, are N and K of a near product doubled or halved
# (one of TILED_ROWS, N, K, the weight's format)
Table = dict[tuple[int, int, int, str], "Tiles"]


class Tiles(NamedTuple):
    """What a launch is made of."""

    block_m: int  # rows of x in a tile
    block_n: int  # rows of the weight
    block_k: int  # divides LARGEST_STEP; a launch takes less where what ``k_split`` gives wants it
    joined: bool  # a program adds all partial sums of its tile; else the next kernel does
    descriptors: bool  # the copy engine of the chip loads the tiles
    num_warps: int
    num_stages: int


def row_class(n_rows: int) -> int:
    """The one of TILED_ROWS whose tiles serve ``n_rows``."""
    return next((rows for rows in TILED_ROWS if rows >= n_rows), TILED_ROWS[-1])


def default_tiles(n_rows: int, itemsize: int, shared: int) -> Tiles:
    """Tiles where no table has any; ``shared``: bytes of shared memory that a block may use."""
    few = n_rows <= 128
    if itemsize == 4:  # no matrix unit multiplies float32: operands sit in registers
        tiles = Tiles(min(max(row_class(n_rows), 16), 64), 64, 32, not few, False, 4, 4)
    elif few:
        tiles = Tiles(max(row_class(n_rows), 16), 64, 128, False, False, 4, 5)
    else:
        tiles = Tiles(128, 128, 64, True, False, 8, 4)
    stage = (tiles.block_m + tiles.block_n) * tiles.block_k * itemsize
    return tiles._replace(num_stages=max(2, min(tiles.num_stages, shared // stage)))


def find_tiles(x: Tensor, weight: Tensor) -> Tiles:
    """The tiles of x [..., K] times weight [N, K]."""
    n_columns, n_inner = weight.shape
    n_rows = x.numel() // n_inner
    shared, table = _of_device(x.device)
    key = (row_class(n_rows), n_columns, n_inner, "")
    tiles = _of_table(table, key) if x.itemsize == 2 else None
    return tiles or default_tiles(n_rows, x.itemsize, shared)


def find_quantized_tiles(x: Tensor, weight: Weight) -> Tiles:
    """The tiles of x [..., K] times a weight in fewer bits [N, K]."""
    n_rows, n_columns = x.numel() // weight.n_inputs, len(weight.weight)
    shared, table = _of_device(x.device)
    key = (row_class(n_rows), n_columns, weight.n_inputs, weight.format)
    tiles = _of_table(table, key) if x.itemsize == 2 else None
    places = PLACES[weight.format]
    return tiles or default_quantized_tiles(n_rows, places, x.itemsize, shared)


def _of_table(table: Table, key: tuple[int, int, int, str]) -> Tiles | None:
    """The tiles of a product in a table, or else of the nearest one there, if it is near.

    So the shares of several GPUs, of which few are in a table, have those of the whole, or nearly.
    """
    if key in table:
        return table[key]
    n_rows, n, k, format = key

    def distance(other: tuple[int, int, int, str]) -> float:
        return abs(math.log2(n / other[1])) + abs(math.log2(k / other[2]))

    alike = [other for other in table if (other[0], other[3]) == (n_rows, format)]
    nearest = min(alike, key=distance, default=None)
    if nearest is None or distance(nearest) > NEAR:
        return None
    tiles = table[nearest]
    return None if tiles.descriptors and k % 8 else tiles  # which want 16 bytes aligned


def default_quantized_tiles(n_rows: int, places: int, itemsize: int, shared: int) -> Tiles:
    """Tiles where no table has any, as ``default_tiles``; a word has ``places`` weights."""
    block_m = min(max(row_class(n_rows), 16), 64)
    stage = (64 * 2 + block_m * places * itemsize) * GROUP
    depth = max(2, min(4, shared // (2 * stage)))
    return Tiles(block_m, 64, GROUP, False, False, 4, depth if itemsize == 2 else 2)


@functools.cache  # read once a process
def _of_device(device: torch.device) -> tuple[int, Table]:
    """Bytes of shared memory that a block may use, and the tiles of all tables."""
    on_gpu = device.type == "cuda"
    return shared_memory(device), read_tables(chip_name(device)) if on_gpu else {}


def shared_memory(device: torch.device) -> int:
    """Bytes that a block may use; on the CPU, for Triton's interpreter, the least of all chips'."""
    if device.type != "cuda":
        return 99 * 1024
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks the field
    return int(properties.shared_memory_per_block_optin)


def chip_name(device: torch.device) -> str:
    """The chip's name in the tables: "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def read_tables(chip: str) -> Table:
    """The chip's tiles of the committed table and, before these, of the tuned one."""
    return read_table(committed_table(), chip) | read_table(tuned_table(chip), chip)


def tables_of(chip: str) -> list[str]:
    """Where the chip's tiles come from: "committed", a path, both or neither."""
    tuned = tuned_table(chip)
    places = {"committed": committed_table(), str(tuned): tuned}
    return [name for name, path in places.items() if read_table(path, chip)]


def committed_table() -> Path:
    """The table that comes with the package."""
    return Path(str(resources.files("orthrus_fast.kernels").joinpath("tiles.json")))


def tuned_table(chip: str) -> Path:
    """Where ``orthrus tune`` leaves its table of a chip, for this version of the package."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "orthrus-fast" / f"tiles-{chip}-{__version__}.json"


def read_table(path: Path, chip: str) -> Table:
    """The tiles of a file; none where it is absent or not one of this version."""
    try:
        entry = json.loads(path.read_text("utf-8"))["chips"].get(chip, {"tiles": {}})
        return parse_table(entry)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return {}


def parse_table(entry: Mapping[str, Any]) -> Table:
    """A chip's entry of a table. Raises what Python raises at what is none, or ValueError."""
    table: Table = {}
    for key, values in entry["tiles"].items():
        shape, _, kind = key.partition(" ")
        n_rows, n_columns, n_inner = map(int, shape.split("x"))
        tiles = Tiles(*values)
        if LARGEST_STEP % tiles.block_k or n_rows not in TILED_ROWS:
            raise ValueError(f"{key}: {values}")
        table[n_rows, n_columns, n_inner, kind] = tiles
    return table
