"""Training windows: tokens packed to a fixed length, with a role for each.

A window holds whole examples (chat records, or a prompt with the model's answer), padded at the
end, or a run of code. A role says what a token is: PAD, PROMPT (which the model reads) or ANSWER
(which it writes, and which both phases mainly train on).
"""

from __future__ import annotations

import dataclasses
import lzma
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from scripts.embedded import records
from scripts.embedded.tokens import END_OF_TEXT, TURN_END, load_tokenizer, render_chat

PAD, PROMPT, ANSWER = 0, 1, 2
CHUNK = 4096  # samples a worker makes at a time
Tokens = npt.NDArray[np.uint16]
Roles = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Windows:
    """`tokens` and `roles` are [n_windows, length]."""

    tokens: Tokens
    roles: Roles

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, tokens=self.tokens, roles=self.roles)

    @classmethod
    def load(cls, path: Path) -> Windows:
        with np.load(path) as file:
            return cls(file["tokens"], file["roles"])


def pack(examples: Iterable[tuple[list[int], list[int]]], length: int) -> Windows:
    """Pack whole examples (prompt ids, answer ids) into windows, first fit over a few open windows;
    examples longer than a window are left out.
    """
    done: list[tuple[list[int], list[int]]] = []
    opened: list[tuple[list[int], list[int]]] = []
    for prompt, answer in examples:
        ids, roles = prompt + answer, [PROMPT] * len(prompt) + [ANSWER] * len(answer)
        if len(ids) > length:
            continue
        home = next((w for w in opened if len(w[0]) + len(ids) <= length), None)
        if home is None:
            home = ([], [])
            opened.append(home)
            if len(opened) > 8:
                done.append(opened.pop(0))
        home[0].extend(ids)
        home[1].extend(roles)
    return _to_arrays(done + opened, length)


def _to_arrays(windows: Sequence[tuple[list[int], list[int]]], length: int) -> Windows:
    tokens = np.zeros((len(windows), length), np.uint16)
    roles = np.zeros((len(windows), length), np.uint8)
    for row, (ids, marks) in enumerate(windows):
        tokens[row, : len(ids)] = ids
        roles[row, : len(ids)] = marks
    return Windows(tokens, roles)


def record_example(tokenizer: Tokenizer, sample: records.Sample) -> tuple[list[int], list[int]]:
    """Return (prompt ids, answer ids with the end token)."""
    prompt = tokenizer.encode(render_chat(sample.messages)).ids
    return prompt, tokenizer.encode(sample.answer + TURN_END).ids


def _record_chunk(arguments: tuple[str, int, int, int, frozenset[str]]) -> Windows:
    directory, start, stop, length, skip = arguments
    tokenizer = load_tokenizer(Path(directory))
    newline = tokenizer.encode("\n").ids  # the template's newline between one turn and the next
    pairs = (
        record_example(tokenizer, sample) for sample in records.stream("train", start, stop, skip)
    )
    return pack(((prompt, answer + newline) for prompt, answer in pairs), length)


def record_windows(
    directory: Path, first: int, last: int, length: int, skip: frozenset[str], workers: int
) -> Windows:
    """Return windows of the samples `first` … `last - 1` of the training stream, without those
    whose digest is in `skip`.
    """
    jobs = [
        (str(directory), start, min(start + CHUNK, last), length, skip)
        for start in range(first, last, CHUNK)
    ]
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(_record_chunk, jobs))
    return Windows(
        np.concatenate([p.tokens for p in parts]), np.concatenate([p.roles for p in parts])
    )


def code_windows(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Windows:
    """Join documents, each ended by the end-of-text token, and cut the result into windows."""
    end = [tokenizer.token_to_id(END_OF_TEXT)]
    parts = [
        np.array(
            [i for e in tokenizer.encode_batch(list(texts[at : at + 512])) for i in e.ids + end],
            np.uint16,
        )
        for at in range(0, len(texts), 512)
    ]
    stream = np.concatenate(parts)
    tokens = stream[: len(stream) // length * length].reshape(-1, length)
    return Windows(tokens, np.full(tokens.shape, ANSWER, np.uint8))


def write_texts(texts: Iterable[str], path: Path) -> None:
    """Write documents into one compressed file, with a NUL between them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(path, "wt", encoding="utf-8", newline="\n", preset=3) as file:
        file.write("\0".join(texts))


def read_texts(path: Path) -> list[str]:
    """Read what `write_texts` wrote."""
    with lzma.open(path, "rt", encoding="utf-8", newline="\n") as file:
        return file.read().split("\0")
