"""The names a user may choose from, each list once, without importing torch."""

from __future__ import annotations

MODES = ("diffusion", "ar")
GRAMMARS = ("json_object", "json_schema", "regex", "lark")
RUNNERS = ("eager", "compiled", "graph")
ATTENTION_BACKENDS = ("sdpa", "triton", "flash")  # each is a module of orthrus_fast.attention
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
WEIGHTS = ("checkpoint", "fp8", "int4")
DRAFT_WEIGHTS = ("checkpoint", "fp8", "int8", "int4")
DTYPES = ("float32", "bfloat16", "float16", "float64")
ONE_ROW, ONE_WIDTH = "one row, one result", "both modes at one width"  # what a decoder promises
RANKS = (1, 2, 4)  # of one model: a product has four partial sums at most
PUBLIC_SHAPES = ("1.7B", "4B", "8B")
# Rows of a pass up to which a line of a table of tiles serves: what ``orthrus tune`` measures.
TILED_ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048)
MAX_NEW_TOKENS = 256  # of a request that asks for no number, as far as they fit
_SPELLINGS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
_SPELLINGS |= {"half": "float16", "float": "float32", "double": "float64"}  # torch's own


def listed(names: tuple[str, ...], *more: str) -> str:
    """The names quoted, as an error message lists them."""
    return ", ".join(repr(name) for name in (*more, *names))


def dtype_name(dtype: object) -> str | None:
    """Return the one of DTYPES that a name or a torch.dtype means, None where it means none."""
    name = str(dtype).removeprefix("torch.")
    name = _SPELLINGS.get(name, name)
    return name if name in DTYPES else None
