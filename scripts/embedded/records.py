"""Records to JSON: a seeded generator of requests with their expected answers.

A sample is a chat request (an instruction and data as CSV, TSV, Markdown table, key-value lines,
INI or log lines) with the JSON that answers it. Sample `index` of a `split` depends on these two
alone. The module needs only the standard library.

The typing rule, unless a request asks for all values as strings: `-12`, `0.5`, `3.10` are numbers
(copied as they are; a leading zero or plus sign makes text), `true` and `false` in any of three
cases are booleans, an empty value is null, everything else is text. A key whose line is absent is
absent from its object.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from scripts.embedded.words import (
    ACCENTED,
    COLUMNS,
    GIVEN_NAMES,
    LEVELS,
    PLACES,
    STATUSES,
    VERBS,
    WORDS,
)

NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?")
Row = dict[str, str]
Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A request with its answer; `source` is the data alone, as the user message contains it."""

    messages: list[Message]
    answer: str
    expected: Any
    format: str
    source: str
    request: Request

    @property
    def digest(self) -> str:
        """Return the sha256 of the messages, by which training leaves out held-out samples."""
        return messages_digest(self.messages)


@dataclasses.dataclass(frozen=True)
class Request:
    """A question about a table; `columns` are those of the answer, in the order of the table."""

    shape: str  # list, keyed, columns, values, object
    columns: tuple[str, ...]
    key: str | None
    typed: bool


@dataclasses.dataclass(frozen=True)
class Table:
    """`rows` map column to source text; a column may be absent from a row of key-value lines or
    INI.
    """

    columns: tuple[str, ...]
    rows: list[Row]
    format: str


def messages_digest(messages: Sequence[Message]) -> str:
    """Return the sha256 (hex) of chat messages."""
    return hashlib.sha256(json.dumps(list(messages), sort_keys=True).encode()).hexdigest()


# Values -------------------------------------------------------------------------------------------


def _pseudo_word(rng: random.Random) -> str:
    """Return a word that is in no list, or rarely a random string, because copying must not need
    the lists.
    """
    if rng.random() < 0.2:
        return "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randint(3, 10)))
    syllables = (
        rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") + rng.choice(("", "", *"nrlst"))
        for _ in "abc"
    )
    return "".join(list(syllables)[: rng.randint(1, 3)])


def _word(rng: random.Random) -> str:
    word = rng.choice(WORDS) if rng.random() < 0.6 else _pseudo_word(rng)
    return rng.choice((word, word, word.capitalize(), word.capitalize(), word.upper()))


def _integer(rng: random.Random) -> str:
    digits = rng.choice((1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 6, 7, 9))
    value = rng.randrange(10 ** (digits - 1) - (digits == 1), 10**digits)
    return str(-value if rng.random() < 0.06 else value)


def _decimal(rng: random.Random) -> str:
    text = f"{rng.uniform(0, 10 ** rng.randint(0, 4)):.{rng.choice((1, 1, 2, 2, 2, 3, 4))}f}"
    return "-" + text if rng.random() < 0.1 else text


def _phrase(rng: random.Random) -> str:
    words = [
        _word(rng) if rng.random() < 0.3 else rng.choice(WORDS) for _ in range(rng.randint(2, 5))
    ]
    roll = rng.random()
    if roll < 0.12:
        words[rng.randrange(len(words) - 1)] += ","
    elif roll < 0.18:
        words[-1] = f'"{words[-1]}"'
    elif roll < 0.24:
        words[-1] = rng.choice(
            (f"({words[-1]})", f"'{words[-1]}'", f"{words[-1]}!", f"{words[-1]}?", f"#{words[-1]}")
        )
    elif roll < 0.30:
        words.insert(
            1, rng.choice(("&", "-", "/", "+", "of", "and", "for", "the", "in", "2", "10", "no."))
        )
    elif roll < 0.36:
        words[rng.randrange(len(words))] = rng.choice(ACCENTED)
    text = " ".join(words)
    return text if rng.random() < 0.5 else text[0].upper() + text[1:]


def _person(rng: random.Random) -> str:
    name = rng.choice(GIVEN_NAMES)
    roll = rng.random()
    if roll < 0.35:
        return f"{name} {rng.choice(WORDS).capitalize()}"
    if roll < 0.45:
        return f"{name} {_pseudo_word(rng).capitalize()}"
    return f"{name} {rng.choice(string.ascii_uppercase)}." if roll < 0.5 else name


def _date(rng: random.Random) -> str:
    year, month, day = rng.randint(1950, 2049), rng.randint(1, 12), rng.randint(1, 28)
    styles = (f"{year}-{month:02}-{day:02}",) * 4 + (
        f"{day:02}/{month:02}/{year}",
        f"{day}.{month}.{year}",
    )
    return rng.choice(styles)


def _time(rng: random.Random) -> str:
    text = f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    return f"{text}:{rng.randrange(60):02}" if rng.random() < 0.5 else text


def _datetime(rng: random.Random) -> str:
    day = f"{rng.randint(1990, 2039)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    clock = f"{rng.randrange(24):02}:{rng.randrange(60):02}:{rng.randrange(60):02}"
    return day + rng.choice((" ", "T")) + clock + rng.choice(("", "", "Z"))


def _code(rng: random.Random) -> str:
    letters = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(1, 4)))
    number = rng.randrange(10 ** rng.randint(1, 5))
    return rng.choice(
        (
            f"{letters}-{number}",
            f"{letters}{number:03}",
            f"{number:05}",
            f"{letters}-{number:04}",
            f"#{number}",
        )
    )


def _version(rng: random.Random) -> str:
    parts = [str(rng.randrange(rng.choice((4, 20)))) for _ in range(rng.choice((3, 3, 3, 4)))]
    return (
        rng.choice(("", "", "v")) + ".".join(parts) + rng.choice(("", "", "", "", "rc1", "-beta"))
    )


def _address(rng: random.Random) -> str:
    word, other = rng.choice(WORDS), rng.choice(WORDS)
    tail = rng.choice(("example.org", "example.com", "example.net", "test"))
    ip = ".".join(str(rng.randrange(256)) for _ in range(4))
    choices = (
        ip,
        f"{word}@{tail}",
        f"{word}.{other}@{tail}",
        f"{word}-{rng.randrange(100):02}",
        f"https://{word}.{tail}/{other}",
    )
    return rng.choice(choices)


def _path(rng: random.Random) -> str:
    parts = [rng.choice(WORDS) for _ in range(rng.randint(1, 3))]
    parts[-1] += rng.choice((".txt", ".csv", ".py", ".json", ".png", ".log", ""))
    if rng.random() < 0.12:
        return "C:\\" + "\\".join(parts)
    return rng.choice(("/", "", "./", "~/")) + "/".join(parts)


def _hex(rng: random.Random) -> str:
    return (
        "".join(rng.choices("0123456789abcdef", k=rng.choice((6, 7, 8, 12))))
        if rng.random() < 0.8
        else f"#{rng.randrange(16**6):06X}"
    )


def _money(rng: random.Random) -> str:
    amount = f"{rng.uniform(0, 10 ** rng.randint(1, 4)):.2f}"
    return rng.choice(
        (
            f"${amount}",
            f"€{amount}",
            f"{amount} USD",
            f"{rng.randrange(101)}%",
            amount,
            f"{_integer(rng)} kg",
        )
    )


VALUES: dict[str, Callable[[random.Random], str]] = {
    "integer": _integer,
    "decimal": _decimal,
    "boolean": lambda rng: rng.choice(("true", "false")),
    "word": _word,
    "phrase": _phrase,
    "person": _person,
    "place": lambda rng: rng.choice(PLACES),
    "status": lambda rng: rng.choice(STATUSES),
    "date": _date,
    "time": _time,
    "datetime": _datetime,
    "code": _code,
    "version": _version,
    "address": _address,
    "path": _path,
    "hex": _hex,
    "money": _money,
}
KIND_WEIGHTS = dict(
    integer=5, decimal=4, boolean=4, word=5, phrase=3, person=3, place=2, status=3, date=2, code=2
)


# Tables -------------------------------------------------------------------------------------------


def _column_name(rng: random.Random, kind: str, style: int) -> str:
    """Return a name from the lists, or (one in seven) an invented one, in one of five styles."""
    roll = rng.random()
    if roll < 0.14:
        name = rng.choice(WORDS) if roll < 0.07 else _pseudo_word(rng)
    else:
        name = rng.choice(COLUMNS[kind])
    words = name.split("_")
    if style == 1:
        return " ".join(word.capitalize() for word in words)
    if style == 2:
        return words[0] + "".join(word.capitalize() for word in words[1:])
    if style == 3:
        return name.upper()
    return " ".join(words) if style == 4 else name


def _schema(rng: random.Random, n_columns: int) -> dict[str, str]:
    """Return `n_columns` different names with their kinds of values; the first is often an id
    or a name.
    """
    style = rng.choice((0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 4))
    kinds = [rng.choice(("integer", "code", "word", "person"))] if rng.random() < 0.6 else []
    pool = list(VALUES)
    kinds += rng.choices(pool, [KIND_WEIGHTS.get(kind, 1) for kind in pool], k=n_columns)
    schema: dict[str, str] = {}
    for kind in kinds:
        name = _column_name(rng, kind, style)
        if len(schema) < n_columns and name.lower() not in {
            "section",
            *(other.lower() for other in schema),
        }:
            schema[name] = kind
    return schema or {"name": "word"}


def _fill_column(rng: random.Random, kind: str, n_rows: int) -> list[str]:
    """Return a column's values. Ids may count up, small sets may repeat, booleans keep one case in
    a column.
    """
    if kind == "integer" and rng.random() < 0.25:
        first = rng.choice((0, 1, 1, 1, 10, 100, 101, rng.randrange(2000)))
        return [str(first + row) for row in range(n_rows)]
    make = VALUES[kind]
    if kind in ("word", "place", "status", "person", "integer") and rng.random() < 0.2:
        few = [make(rng) for _ in range(rng.randint(1, 4))]
        return [rng.choice(few) for _ in range(n_rows)]
    values = [make(rng) for _ in range(n_rows)]
    if kind == "boolean":
        case = rng.choice((str.lower, str.lower, str.lower, str.capitalize, str.upper))
        return [case(value) for value in values]
    return values


def _dimensions(rng: random.Random) -> tuple[int, int]:
    """Return (n_rows, n_columns), so small that an answer has at most a few hundred tokens."""
    n_columns = rng.choice((1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 6, 7, 8))
    n_rows = min(
        rng.choice((1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8, 9, 10, 12)), max(1, 36 // n_columns)
    )
    return n_rows, n_columns


def _make_table(rng: random.Random, format_name: str) -> Table:
    n_rows, n_columns = _dimensions(rng)
    if format_name in ("markdown", "ini"):
        n_columns = max(n_columns, 2)
    schema = _schema(rng, n_columns)
    filled = {name: _fill_column(rng, kind, n_rows) for name, kind in schema.items()}
    rows = [{name: filled[name][row] for name in filled} for row in range(n_rows)]
    if rng.random() < 0.3:
        _drop_some(rng, rows, absent=format_name in ("lines", "ini") and rng.random() < 0.6)
    return Table(tuple(filled), rows, format_name)


def _drop_some(rng: random.Random, rows: list[Row], absent: bool) -> None:
    """Empty a few values in place, or remove their keys. A row keeps its first column."""
    for row in rows:
        for name in list(row)[1:]:
            if rng.random() < 0.12:
                if absent:
                    del row[name]
                else:
                    row[name] = ""


# Log lines ----------------------------------------------------------------------------------------


def _message(rng: random.Random) -> str:
    subject = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 2)))
    tail = rng.choice(
        (
            "",
            "",
            f" {_path(rng)}",
            f" in {rng.randrange(900)} ms",
            f" {rng.randrange(50)} times",
            f" by {rng.choice(WORDS)}",
        )
    )
    return f"{subject} {rng.choice(VERBS)}{tail}"


def _plain_log(rng: random.Random) -> tuple[Row, str]:
    row = {"date": f"{rng.randint(1990, 2039)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"}
    row |= {
        "time": f"{_time(rng)}",
        "level": rng.choice(LEVELS),
        "source": rng.choice(WORDS),
        "message": _message(rng),
    }
    return row, "{date} {time} {level} {source}: {message}".format(**row)


def _bracket_log(rng: random.Random) -> tuple[Row, str]:
    row = {"time": _datetime(rng), "level": rng.choice(LEVELS), "message": _message(rng)}
    return row, "[{time}] {level} {message}".format(**row)


def _access_log(rng: random.Random) -> tuple[Row, str]:
    row = {
        "ip": ".".join(str(rng.randrange(256)) for _ in range(4)),
        "method": rng.choice(("GET", "POST", "PUT", "DELETE")),
    }
    row |= {"path": "/" + "/".join(rng.choice(WORDS) for _ in range(rng.randint(1, 3)))}
    row |= {
        "status": rng.choice(("200", "201", "204", "301", "400", "401", "404", "500", "503")),
        "bytes": _integer(rng).lstrip("-"),
    }
    return row, "{ip} {method} {path} {status} {bytes}".format(**row)


def _logfmt_log(rng: random.Random) -> tuple[Row, str]:
    row = {
        "ts": _datetime(rng).replace(" ", "T"),
        "level": rng.choice(LEVELS).lower(),
        "msg": _message(rng),
    }
    if rng.random() < 0.6:
        row[rng.choice(("count", "ms", "port", "attempt"))] = str(rng.randrange(1000))
    return row, " ".join(
        f'{name}="{value}"' if " " in value else f"{name}={value}" for name, value in row.items()
    )


def _make_log(rng: random.Random) -> tuple[Table, str, str]:
    """Return a log, its text, and the clause that names its keys (none for logfmt, whose lines name
    them).
    """
    make = rng.choice((_plain_log, _plain_log, _bracket_log, _access_log, _logfmt_log))
    pairs = [make(rng) for _ in range(rng.choice((1, 2, 3, 3, 4, 4, 5, 6, 7)))]
    columns = tuple(dict.fromkeys(name for row, _ in pairs for name in row))
    clause = rng.choice(
        (
            "with the keys {}",
            "using the keys {}",
            "with the fields {}",
            "fields {}",
            "the keys are {}",
        )
    )
    clause = "" if make is _logfmt_log else clause.format(_join(columns, rng))
    return (
        Table(columns, [row for row, _ in pairs], "log"),
        "\n".join(line for _, line in pairs),
        clause,
    )


# Rendering ----------------------------------------------------------------------------------------


def csv_cell(text: str, delimiter: str, always: bool) -> str:
    """Return a CSV cell, quoted where it must be (RFC 4180)."""
    if always or delimiter in text or '"' in text or text != text.strip():
        return '"' + text.replace('"', '""') + '"'
    return text


def _render_csv(table: Table, rng: random.Random) -> str:
    delimiter = rng.choice((",", ",", ",", ",", ",", ", ", ";", "|"))
    always = rng.random() < 0.08
    lines = [table.columns, *([row[name] for name in table.columns] for row in table.rows)]
    return "\n".join(
        delimiter.join(csv_cell(cell, delimiter.strip(), always) for cell in line) for line in lines
    )


def _render_tsv(table: Table, rng: random.Random) -> str:
    lines = [table.columns, *([row[name] for name in table.columns] for row in table.rows)]
    return "\n".join("\t".join(line) for line in lines)


def _render_markdown(table: Table, rng: random.Random) -> str:
    aligned = rng.random() < 0.5
    lines = [list(table.columns), *([row[name] for name in table.columns] for row in table.rows)]
    widths = [
        max(3, *(len(line[i]) for line in lines)) if aligned else 0
        for i in range(len(table.columns))
    ]
    rule = rng.choice(("---", "---", ":--", "--:", ":-:"))
    rules = [rule[0] + "-" * max(1, width - 2) + rule[2] for width in widths]
    cells = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        for line in (lines[0], rules, *lines[1:])
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _render_lines(table: Table, rng: random.Random) -> str:
    separator = rng.choice((": ", ": ", ": ", "=", " = ", ":"))
    blocks = (
        "\n".join(f"{name}{separator}{value}".rstrip() for name, value in row.items())
        for row in table.rows
    )
    return rng.choice(("\n\n", "\n\n", "\n\n", "\n---\n")).join(blocks)


def _render_ini(table: Table, sections: Sequence[str], rng: random.Random) -> str:
    separator = rng.choice((" = ", " = ", "=", ": "))
    comment = rng.random() < 0.12
    blocks = []
    for section, row in zip(sections, table.rows, strict=True):
        lines = [f"{name}{separator}{value}".rstrip() for name, value in row.items()]
        if comment and rng.random() < 0.5:
            lines.insert(0, rng.choice("#;") + f" {rng.choice(WORDS)} {rng.choice(WORDS)}")
        blocks.append("\n".join([f"[{section}]", *lines]))
    return rng.choice(("\n", "\n\n")).join(blocks)


# Answers ------------------------------------------------------------------------------------------


def json_literal(text: str, typed: bool) -> str:
    """Return the JSON literal of a source value, by the typing rule of this module."""
    if typed:
        if text == "":
            return "null"
        if NUMBER.fullmatch(text):
            return text
        if text in ("true", "false", "True", "False", "TRUE", "FALSE"):
            return text.lower()
    return json.dumps(text, ensure_ascii=False)


def _json_object(row: Row, names: Sequence[str], typed: bool) -> str:
    pairs = (
        f"{json.dumps(name, ensure_ascii=False)}: {json_literal(row[name], typed)}"
        for name in names
        if name in row
    )
    return "{" + ", ".join(pairs) + "}"


def write_answer(rows: Sequence[Row], request: Request) -> str:
    """Return the answer's text with one row per line. Shapes are those of `Request`."""
    names, typed = request.columns, request.typed
    if request.shape == "object":
        return _json_object(rows[0], names, typed)
    if request.shape == "values":
        return "[" + ", ".join(json_literal(row[names[0]], typed) for row in rows) + "]"
    if request.shape == "columns":
        lists = (
            (name, ", ".join(json_literal(row[name], typed) for row in rows)) for name in names
        )
        return _braces(
            "{}", [f"{json.dumps(name, ensure_ascii=False)}: [{values}]" for name, values in lists]
        )
    objects = [_json_object(row, names, typed) for row in rows]
    if request.shape == "keyed":
        assert request.key is not None
        keys = [json.dumps(row[request.key], ensure_ascii=False) for row in rows]
        return _braces("{}", [f"{key}: {value}" for key, value in zip(keys, objects, strict=True)])
    return _braces("[]", objects)


def _braces(pair: str, items: Sequence[str]) -> str:
    return pair[0] + "\n  " + ",\n  ".join(items) + "\n" + pair[1]


# Requests -----------------------------------------------------------------------------------------


def _may_be_key(table: Table, name: str) -> bool:
    values = [row.get(name, "") for row in table.rows]
    return all(values) and len(set(values)) == len(values)


def _make_request(table: Table, rng: random.Random) -> Request:
    """Return a request that the table can answer; absent keys exclude shapes with every value."""
    typed = rng.random() < 0.75
    full = all(len(row) == len(table.columns) for row in table.rows)
    if table.format == "lines" and len(table.rows) == 1:
        return Request("object", table.columns, None, typed)
    shape = rng.choices(("list", "keyed", "values", "columns"), (60, 24, 10, 6))[0]
    keys = [name for name in table.columns if _may_be_key(table, name)]
    if shape == "keyed" and keys and len(table.columns) > 1:
        key = keys[0] if rng.random() < 0.6 else rng.choice(keys)
        rest = tuple(name for name in table.columns if name != key)
        return Request("keyed", _select(rest, rng), key, typed)
    if shape == "values" and full:
        return Request("values", (rng.choice(table.columns),), None, typed)
    if shape == "columns" and full:
        return Request("columns", _select(table.columns, rng), None, typed)
    return Request("list", _select(table.columns, rng), None, typed)


def _select(columns: tuple[str, ...], rng: random.Random) -> tuple[str, ...]:
    """Return all columns (six times in ten), or some, in the order of the table."""
    if len(columns) < 2 or rng.random() < 0.6:
        return columns
    kept = rng.sample(range(len(columns)), rng.randint(1, len(columns) - 1))
    return tuple(columns[i] for i in sorted(kept))


def _join(names: Sequence[str], rng: random.Random) -> str:
    quote = rng.choice(("{}", "{}", "{}", "`{}`", '"{}"', "'{}'"))
    quoted = [quote.format(name) for name in names]
    if len(quoted) == 1:
        return quoted[0]
    last = rng.choice((" and ", " and ", ", "))
    return ", ".join(quoted[:-1]) + last + quoted[-1]


NOUNS = {
    "csv": ("CSV", "table", "data", "records", "rows", "CSV data", "csv"),
    "tsv": ("TSV", "table", "tab-separated data", "data", "records", "tsv"),
    "markdown": ("table", "Markdown table", "data", "markdown table"),
    "lines": (
        "records",
        "key-value lines",
        "data",
        "fields",
        "key-value records",
        "text",
        "entries",
    ),
    "ini": ("INI", "INI file", "config", "settings", "configuration", "sections", "ini file"),
    "log": ("log", "log lines", "lines", "log entries", "logs"),
}
OPENINGS = (
    "Convert this {noun} to JSON",
    "Convert the {noun} to JSON",
    "Convert the following {noun} to JSON",
    "Convert this {noun} into JSON",
    "Turn this {noun} into JSON",
    "Turn the {noun} below into JSON",
    "Rewrite this {noun} as JSON",
    "Write this {noun} as JSON",
    "Give me this {noun} as JSON",
    "Please convert this {noun} to JSON",
    "Please turn the {noun} into JSON",
    "Parse this {noun} to JSON",
    "Parse the {noun} and return JSON",
    "Return this {noun} as JSON",
    "Format this {noun} as JSON",
    "Transform this {noun} to JSON",
    "Make JSON from this {noun}",
    "{noun} to JSON",
    "JSON from this {noun}",
    "Convert to JSON",
    "Convert the data below to JSON",
    "Make this JSON",
    "JSON please",
    "To JSON",
    "As JSON",
)
LIST_CLAUSES = (
    "",
    "",
    "as a list of objects",
    "as a list of objects",
    "as an array of objects",
    "as a list",
    "as an array",
    "one object per row",
    "a list of objects",
    "with one object for each row",
)
KEYED_CLAUSES = (
    "keyed by {}",
    "keyed by {}",
    "as an object keyed by {}",
    "as one object keyed by {}",
    "with {} as the key",
    "using {} as the key",
    "as a dictionary keyed by {}",
    "as a mapping from {} to the rest",
    "indexed by {}",
)
VALUES_CLAUSES = (
    "only the values of {}",
    "as a list of the values of {}",
    "as a flat list of {}",
    "just the values in {}",
    "as an array of the {} values",
    "a list with the values of {} only",
)
COLUMNS_CLAUSES = (
    "as an object of lists, one per column",
    "as an object with one list per column",
    "column by column, as an object of lists",
    "as lists by column",
)
OBJECT_CLAUSES = ("", "", "as an object", "as one object", "as a single object")
ONLY_CLAUSES = (
    "only the columns {}",
    "only {}",
    "with only {}",
    "keep only {}",
    "just the fields {}",
    "just {}",
    "only the fields {}",
    "use only the columns {}",
)
WITHOUT_CLAUSES = (
    "without {}",
    "leave out {}",
    "without the column {}",
    "drop {}",
    "skip {}",
    "all columns but {}",
    "omit {}",
)
TYPED_CLAUSES = (
    "",
    "",
    "",
    "numbers and booleans typed",
    "with numbers and booleans typed",
    "typed numbers and booleans",
    "numbers as numbers and booleans as booleans",
    "numbers as numbers",
    "with typed values",
    "infer the types",
)
STRING_CLAUSES = (
    "all values as strings",
    "with all values as strings",
    "keep every value as a string",
    "values as strings",
    "everything as strings",
    "leave all values as strings",
    "do not convert types, only strings",
)


def _shape_clause(request: Request, rng: random.Random) -> str:
    if request.shape == "keyed":
        return rng.choice(KEYED_CLAUSES).format(_join([request.key or ""], rng))
    if request.shape == "values":
        return rng.choice(VALUES_CLAUSES).format(_join(request.columns, rng))
    clauses = {"list": LIST_CLAUSES, "columns": COLUMNS_CLAUSES, "object": OBJECT_CLAUSES}
    return rng.choice(clauses[request.shape])


def _select_clause(table: Table, request: Request, rng: random.Random) -> str:
    candidates = [name for name in table.columns if name != request.key]
    left_out = [name for name in candidates if name not in request.columns]
    if not left_out or request.shape == "values":
        return ""
    if len(left_out) <= 2 and rng.random() < 0.5:
        return rng.choice(WITHOUT_CLAUSES).format(_join(left_out, rng))
    return rng.choice(ONLY_CLAUSES).format(_join(request.columns, rng))


def _instruction(table: Table, request: Request, extra: str, rng: random.Random) -> str:
    opening = rng.choice(OPENINGS).format(noun=rng.choice(NOUNS[table.format]))
    typing = rng.choice(TYPED_CLAUSES if request.typed else STRING_CLAUSES)
    clauses = [_shape_clause(request, rng), extra, _select_clause(table, request, rng), typing]
    clauses = [clause for clause in clauses if clause]
    if rng.random() < 0.4:
        sentences = [opening, *clauses]
        text = ". ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)
    else:
        text = opening + "".join(
            (", " if i or rng.random() < 0.4 else " ") + clause for i, clause in enumerate(clauses)
        )
        text = text[0].upper() + text[1:] if rng.random() < 0.85 else text[0].lower() + text[1:]
    return text


def _user_message(instruction: str, source: str, format_name: str, rng: random.Random) -> str:
    """Return instruction and data in one of several arrangements."""
    roll = rng.random()
    end = rng.choice(("", "", "", "", "", "", "", "\n"))
    if roll < 0.12:
        return f"{source}\n\n{instruction}{rng.choice(('.', '', '.'))}"
    if roll < 0.27:
        fence = rng.choice(
            ("", {"lines": "", "markdown": "", "log": ""}.get(format_name, format_name))
        )
        return f"{instruction}{rng.choice(('.', ':', ':'))}\n\n```{fence}\n{source}\n```{end}"
    mark, gap = rng.choice((".", ":", ":", ".", "")), rng.choice(("\n", "\n\n", "\n\n"))
    return f"{instruction}{mark}{gap}{source}{end}"


SYSTEM_MESSAGES = (
    "You turn records into JSON.",
    "You are a helpful assistant.",
    "Answer with JSON only.",
)
FORMATS = ("csv", "tsv", "markdown", "lines", "ini", "log")
FORMAT_WEIGHTS = (30, 12, 26, 12, 10, 10)


def _tabular(rng: random.Random, format_name: str) -> tuple[Table, str]:
    table = _make_table(rng, format_name)
    if format_name == "markdown":
        rows = [
            {name: value.replace("|", "/") for name, value in row.items()} for row in table.rows
        ]
        table = dataclasses.replace(table, rows=rows)
    render = {
        "csv": _render_csv,
        "tsv": _render_tsv,
        "markdown": _render_markdown,
        "lines": _render_lines,
    }
    return table, render[format_name](table, rng)


def _ini_sample(rng: random.Random) -> tuple[Table, str, Request, str]:
    """Return an INI sample: an object keyed by section, or a list with the names as `section`."""
    table = _make_table(rng, "ini")
    sections = rng.sample(WORDS, len(table.rows))
    source = _render_ini(table, sections, rng)
    rows = [{"section": section, **row} for section, row in zip(sections, table.rows, strict=True)]
    full = dataclasses.replace(table, columns=("section", *table.columns), rows=rows)
    typed = rng.random() < 0.75
    if rng.random() < 0.6:
        clause = rng.choice(
            ("", "", "keyed by section", "one object per section", "as an object keyed by section")
        )
        return full, source, Request("keyed", _select(table.columns, rng), "section", typed), clause
    clause = rng.choice(
        (
            'as a list of objects with the section under "section"',
            "as a list, with the section name in section",
        )
    )
    return full, source, Request("list", full.columns, None, typed), clause


def make_sample(split: str, index: int) -> Sample:
    """Return sample `index` of a split ("train", "held-out", or any name), the same wherever it is
    called.
    """
    rng = random.Random(f"{split}/{index}")
    format_name = rng.choices(FORMATS, FORMAT_WEIGHTS)[0]
    extra = ""
    if format_name == "log":
        table, source, extra = _make_log(rng)
        request = _make_request(table, rng)
        instruction = _instruction(table, request, extra, rng)
    elif format_name == "ini":
        table, source, request, clause = _ini_sample(rng)
        opening = rng.choice(OPENINGS).format(noun=rng.choice(NOUNS["ini"]))
        typing = rng.choice(TYPED_CLAUSES if request.typed else STRING_CLAUSES)
        clauses = [clause, _select_clause(table, request, rng), typing]
        instruction = ", ".join([opening, *(text for text in clauses if text)])
    else:
        table, source = _tabular(rng, format_name)
        request = _make_request(table, rng)
        instruction = _instruction(table, request, extra, rng)
    answer = write_answer(table.rows, request)
    messages = [{"role": "user", "content": _user_message(instruction, source, format_name, rng)}]
    if rng.random() < 0.08:
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM_MESSAGES)})
    return Sample(messages, answer, json.loads(answer), format_name, source, request)


def stream(
    split: str, start: int, stop: int, skip: frozenset[str] = frozenset()
) -> Iterator[Sample]:
    """Yield samples `start` … `stop - 1` of a split, without those whose digest is in `skip`."""
    for index in range(start, stop):
        sample = make_sample(split, index)
        if sample.digest not in skip:
            yield sample
