"""The header of a view's ``.sql`` file: TOML in a block comment that begins with the word ``matview``. Text only."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

import tomli_w

from airflow_provider_matviews.exceptions import InvalidDefinition

#: Comments before the header, such as a licence, are passed over.
_HEADER = re.compile(r"\A(?:\s|--[^\n]*(?:\n|\Z)|/\*(?!\s*matview\b).*?\*/)*/\*\s*matview\b(?P<toml>.*?)\*/", re.DOTALL)
_ALMOST_HEADER = re.compile(r"\A(?:\s|--[^\n]*(?:\n|\Z)|/\*.*?\*/)*?/\*+[+!]?\s*matview\b", re.DOTALL | re.IGNORECASE)


def split(text: str) -> tuple[dict[str, Any], str]:
    """Return what the header declares, and the SQL after it.

    :raises InvalidDefinition: when there is something like a header that is none.
    """
    header = _HEADER.match(text)
    if header is None and _ALMOST_HEADER.match(text):
        raise InvalidDefinition(
            "The SQL begins with what looks like a matview header and is none.",
            hint="begin it with `/* matview`, go on in TOML, and end it with `*/`.",
        )
    try:
        declaration = tomllib.loads(header["toml"]) if header else {}
    except tomllib.TOMLDecodeError as error:
        raise InvalidDefinition(f"The matview header is not TOML: {error}.") from error
    return declaration, (text[header.end() :] if header else text).strip()


def join(declaration: Mapping[str, Any], sql: str) -> str:
    """Return the text of a file; :func:`split` takes it apart again."""
    toml = tomli_w.dumps(declaration)
    # Either would end the comment or, for psql, begin another one inside it. Both stand in strings only.
    toml = toml.replace("*/", "*\\u002F").replace("/*", "\\u002F*")
    return f"/* matview\n{toml}*/\n{sql.strip()}\n"
