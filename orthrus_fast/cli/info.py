"""orthrus info: what a checkpoint is, and the memory that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orthrus_fast.cli.flags import build_info_parser
from orthrus_fast.cli.terminal import printable, write_output
from orthrus_fast.files import embedded_checkpoint
from orthrus_fast.options import DRAFT_WEIGHTS, WEIGHTS

if TYPE_CHECKING:
    import torch

    from orthrus_fast.config import ModelConfig


def run(arguments: Sequence[str], prog: str) -> int:
    """Print what the checkpoint is and needs; return the exit code."""
    args = build_info_parser(prog).parse_args(arguments)
    import torch

    from orthrus_fast.checkpoint import count_weights, open_checkpoint
    from orthrus_fast.loading import Options, memory_needed, resolve

    path = args.checkpoint if args.checkpoint is not None else embedded_checkpoint()
    ignored = tuple(args.ignore_config_field)
    checkpoint = open_checkpoint(path, revision=args.revision, ignore_config_fields=ignored)
    config = checkpoint.config
    asked = {name: getattr(args, name) for name in ("max_seq_len", "weights", "draft_weights")}
    settings = resolve(Options(**asked), config)
    length, formats, device = settings.max_seq_len, settings.formats, settings.device
    views = "autoregressive and draft" if config.has_draft_view else "autoregressive only"
    facts = {
        "checkpoint": f"{checkpoint.name}"
        + (f" at {checkpoint.commit}" if checkpoint.commit else "")
        + (" (embedded, the default)" if args.checkpoint is None else ""),
        "directory": checkpoint.directory,
        "views": views,
        "block size": config.block_size or "none",
        "parameters": f"{count_weights(config) / 1e6:.1f} million",
        "layers": f"{config.n_layers}, hidden size {config.hidden_size}",
        "heads": f"{config.n_heads}, KV heads {config.n_kv_heads}, head size {config.head_dim}",
        "vocabulary": f"{config.vocab_size}, tied: {'yes' if config.tie_word_embeddings else 'no'}",
        "positions": f"{config.max_position_embeddings}, RoPE {config.rope.type}",
        "end tokens": ", ".join(map(str, config.eos_token_ids)) or "none",
        "on disk": f"{checkpoint.weight_bytes / 1e9:.3f} GB of weights",
        "weights": f"verifier {formats.verifier}, drafter {formats.drafter}",
    }
    cpu, n_ranks = torch.device("cpu"), args.tensor_parallel
    share = config.share(0, n_ranks)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        facts[f"needs in {name}"] = (
            f"{memory_needed(share, dtype, cpu, length, 1, formats)} at {length} tokens"
            + (f", each of {n_ranks}" if n_ranks > 1 else "")
        )
    facts |= quantized_sizes(config, torch.bfloat16)
    facts["this machine"] = (
        f"torch {torch.__version__}, "
        + (torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (no CUDA device)")
        + f", {'float32' if device.type == 'cpu' else config.dtype} unless --dtype says otherwise"
    )
    for name, fact in facts.items():
        write_output(f"{name:18}{printable(str(fact), True)}\n")
    return 0


def quantized_sizes(config: ModelConfig, dtype: torch.dtype) -> dict[str, str]:
    """Return what weights take by format, beside a verifier in ``dtype`` and in both views."""
    from orthrus_fast.checkpoint import count_bytes
    from orthrus_fast.quantization import Formats

    drafters = {name: count_bytes(config, dtype, Formats(drafter=name)) for name in DRAFT_WEIGHTS}
    both = {name: count_bytes(config, dtype, Formats(name, name)) for name in WEIGHTS}
    sizes = {
        "--draft-weights": {name: of.drafter for name, of in drafters.items()},
        "--weights": {name: sum(of) for name, of in both.items()},
    }
    if not config.has_draft_view:
        del sizes["--draft-weights"]
    return {
        flag: ", ".join(f"{name} {size / 1e9:.3f} GB" for name, size in of.items())
        for flag, of in sizes.items()
    }
