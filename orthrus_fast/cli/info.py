"""orthrus info: what a checkpoint is, and the memory that it needs."""

from __future__ import annotations

from collections.abc import Sequence

from orthrus_fast.cli.flags import build_info_parser
from orthrus_fast.cli.terminal import printable, write_output
from orthrus_fast.files import embedded_checkpoint


def run(arguments: Sequence[str], prog: str) -> int:
    """Print what the checkpoint is and needs; return the exit code."""
    args = build_info_parser(prog).parse_args(arguments)
    import torch

    from orthrus_fast.checkpoint import count_weights, open_checkpoint
    from orthrus_fast.loading import check_max_seq_len, memory_needed, parse_device

    path = args.checkpoint if args.checkpoint is not None else embedded_checkpoint()
    ignored = tuple(args.ignore_config_field)
    checkpoint = open_checkpoint(path, revision=args.revision, ignore_config_fields=ignored)
    config = checkpoint.config
    length = check_max_seq_len(args.max_seq_len, config)
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
    }
    cpu = torch.device("cpu")
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        facts[f"needs in {name}"] = (
            f"{memory_needed(config, dtype, cpu, length, 1)} at {length} tokens"
        )
    device = parse_device(None)
    facts["this machine"] = (
        f"torch {torch.__version__}, "
        + (torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (no CUDA device)")
        + f", {'float32' if device.type == 'cpu' else config.dtype} unless --dtype says otherwise"
    )
    for name, fact in facts.items():
        write_output(f"{name:18}{printable(str(fact), True)}\n")
    return 0
