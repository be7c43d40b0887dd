"""Every error a user can act on. Each message is one line that names the file, tensor or flag."""


def one_line(text: str) -> str:
    """A message of another library or of a template, folded to one line of bounded length."""
    return " ".join(text.split())[:1000]


def shown(name: object) -> str:
    """A name or value out of a file, safe on a terminal and of bounded length."""
    text = name if isinstance(name, str) and name.isprintable() else ascii(name)
    return text if len(text) <= 100 else f"{text[:100]}…"


def list_some(parts: list[str]) -> str:
    """The first ten of the parts, and how many more there are."""
    rest = len(parts) - 10
    return "; ".join(parts[:10]) + (f"; and {rest} more" if rest > 0 else "")


def is_out_of_memory(error: Exception) -> bool:
    """Whether a lack of memory caused it, by its words; "illegal memory access" did not."""
    words = (
        "out of memory",
        "not enough memory",
        "can't allocate memory",
        "cannot allocate memory",
    )
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(said in text for said in words)


class OrthrusError(Exception):
    """Base of all errors raised on purpose; the command line prints it and exits with code 2."""


class CheckpointError(OrthrusError):
    """A checkpoint that is missing, damaged, hostile, or does not match its own config."""


class ConfigError(CheckpointError):
    """A config field that is absent, out of range, or asks for what is not implemented."""


class TemplateError(OrthrusError):
    """A chat template that is missing, does not parse, raises, or reaches out of its sandbox."""


class PromptError(OrthrusError):
    """A prompt that is empty, too long, of the wrong type, or has ids outside the vocabulary."""


class RequestError(OrthrusError):
    """A setting of a call that is out of range or cannot be served."""


class UnsupportedError(RequestError):
    """A known setting that this version, device or checkpoint does not support."""


class RankError(OrthrusError):
    """A process of a model over several that has ended, does not answer, or went another way."""


class QueueFullError(OrthrusError):
    """A request that came while as many wait as may wait; a later one may be taken."""
