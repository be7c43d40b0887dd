"""What a text may be: the settings of structured output, without what it takes to obey them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from orthrus_fast.errors import RequestError, UnsupportedError
from orthrus_fast.options import GRAMMARS, listed

MAX_SCHEMA = 250_000  # characters; llguidance takes about 400 bytes for each
MAX_SOURCE = 20_000  # of others, where 10,000 optional letters take a second and 400 MB


@dataclass(frozen=True)
class Grammar:
    """Which texts may be written: one of GRAMMARS and its source. Raises RequestError.

    ``json_object``, any JSON object, has no source; that of ``json_schema`` is the schema as JSON,
    of ``regex`` an expression that the whole text matches, of ``lark`` a grammar with a rule
    ``start``. What of these can be served is known once a decoder has compiled it.
    """

    kind: str
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in GRAMMARS:
            raise RequestError(f"grammar: {self.kind!r} is not one of {listed(GRAMMARS)}")
        if not isinstance(self.source, str):
            raise RequestError(f"grammar: {type(self.source).__name__} is not text")
        if bool(self.source) == (self.kind == "json_object"):
            has = "has no source" if self.source else "needs a source"
            raise RequestError(f"grammar: {self.kind} {has}")
        most = MAX_SCHEMA if self.kind == "json_schema" else MAX_SOURCE
        if (n := len(self.source)) > most:
            raise RequestError(f"grammar: {n} characters are more than {most}; shorten it")

    @staticmethod
    def from_schema(schema: Mapping[str, object] | bool) -> Grammar:
        """The grammar of a JSON Schema that has been parsed. Raises RequestError."""
        if not isinstance(schema, (Mapping, bool)):
            raise RequestError(f"grammar: a schema is an object, not {type(schema).__name__}")
        try:
            return Grammar("json_schema", json.dumps(schema))
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"grammar: the schema is no JSON value: {error}") from None

    @staticmethod
    def from_response_format(value: object) -> Grammar | None:
        """The grammar that OpenAI's ``response_format`` asks for; None for any text.

        Types are text, json_object, json_schema and, as other servers have them, regex and lark,
        whose source is in a field of that name. Raises RequestError, UnsupportedError.
        """
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise RequestError("response_format: not an object")
        kind = value.get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            return Grammar("json_object")
        if kind == "json_schema":
            named = value.get("json_schema")
            if not isinstance(named, Mapping) or "schema" not in named:
                raise RequestError("response_format: json_schema: not an object with a schema")
            return Grammar.from_schema(named["schema"])
        if kind in GRAMMARS:
            source = value.get(kind)
            if not isinstance(source, str):
                raise RequestError(f"response_format: {kind}: not text")
            return Grammar(kind, source)
        raise UnsupportedError(f"response_format: type {kind!r} is not supported")
