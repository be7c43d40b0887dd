"""The tokenizer of the embedded model and its chat format.

It is a byte-level BPE, so that every input can be encoded and decoded without loss. The tokens of
a word hold no space: a word has the same tokens after a comma, a pipe, a quote or a colon, and to
copy a value from a table into JSON is to copy tokens. Punctuation takes one space on either side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
PATTERN = r"\n+ *|[\p{L}\p{M}_]+|\p{N}{1,2}|(?: ?[^\s\p{L}\p{M}\p{N}_]+)+ ?|\s+"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n"
)


def train_tokenizer(texts: Iterator[str], n_entries: int) -> Tokenizer:
    """Train a tokenizer of exactly `n_entries` entries, the special tokens first.

    Raises ValueError if the texts are too few to fill it.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_entries,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != n_entries:
        raise ValueError(
            f"{tokenizer.get_vocab_size()} entries learnt, {n_entries} asked for: give more text"
        )
    return tokenizer


def load_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer of a checkpoint directory."""
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def end_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end an answer: the end of a turn and the end of a text."""
    ids = [tokenizer.token_to_id(name) for name in (TURN_END, END_OF_TEXT)]
    assert None not in ids, "the tokenizer lacks its special tokens"
    return [i for i in ids if i is not None]


def render_chat(messages: Sequence[dict[str, str]]) -> str:
    """Return messages as text up to where the answer starts, which is what CHAT_TEMPLATE renders
    with a generation prompt.
    """
    turns = "".join(f"{TURN_START}{m['role']}\n{m['content']}{TURN_END}\n" for m in messages)
    return f"{turns}{TURN_START}assistant\n"
