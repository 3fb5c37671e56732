"""Names are read as PostgreSQL itself reads them; what it would cut off or misread is refused."""

from __future__ import annotations

import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from airflow_provider_matviews.exceptions import InvalidDefinition, InvalidName
from airflow_provider_matviews.names import MAX_IDENTIFIER_BYTES, ViewName, check_identifier, quote, shorten
from tests.conftest import Database, examples

#: Any text that a server can be sent.
_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
#: Text that often is a name, and when it is not, only just.
_NEARLY_NAMES = st.lists(
    st.sampled_from(
        ['"', '""', ".", " ", "\t", "\n", "\v", "\xa0", "$", "_", "a", "Z", "É", "ß", "İ", "漢", "😀", "1", "-"]
    )
    | st.sampled_from(["mv", "Schema", '"Odd Name"', '"a.b"', "x" * 63, "é" * 32, '"' + "y" * 64 + '"']),
    max_size=8,
).map("".join)
_IDENTIFIERS = _TEXT.map(lambda text: shorten(text, MAX_IDENTIFIER_BYTES)).filter(bool)


def _read_by_server(connection: psycopg.Connection[tuple[list[str]]], text: str) -> list[str] | None:
    """Return the parts of a name as the server reads them; None where it refuses or could not keep them."""
    try:
        row = connection.execute("SELECT parse_ident(%s)", [text]).fetchone()
    except psycopg.errors.InvalidParameterValue:
        return None
    assert row is not None
    parts = row[0]
    return parts if len(parts) <= 2 and all(len(part.encode()) <= MAX_IDENTIFIER_BYTES for part in parts) else None


def test_a_name_is_read_as_the_server_reads_it(db: Database) -> None:
    with db.connect() as connection:

        @given(_NEARLY_NAMES | _TEXT)
        @example("mv")
        @example("A.B")
        @example('"A" . "b""c"')
        @example("a.b.c")
        @example("a..b")
        @example("a.")
        @example("1a")
        @settings(max_examples=examples(300), deadline=None)
        def agree(text: str) -> None:
            expected = _read_by_server(connection, text)
            if expected is None:
                with pytest.raises(InvalidName):
                    ViewName.parse(text)
            else:
                *schema, name = expected
                assert ViewName.parse(text) == ViewName(name, schema[0] if schema else None)

        agree()


def test_a_name_that_is_printed_is_the_name_of_what_is_created_with_it(db: Database) -> None:
    with db.connect() as connection:
        connection.autocommit = False

        @given(_IDENTIFIERS, _IDENTIFIERS)
        @settings(max_examples=examples(100), deadline=None)
        def survive(schema: str, name: str) -> None:
            view = ViewName(name, schema)
            assert ViewName.parse(str(view)) == view
            assert ViewName.parse(quote(name)) == ViewName(name)
            connection.execute(f"CREATE TABLE public.{quote(name)} (a int)".encode())
            made = connection.execute("SELECT relname FROM pg_class ORDER BY oid DESC LIMIT 1").fetchone()
            connection.rollback()
            assert made == (name,)

        survive()


@pytest.mark.parametrize(
    ("text", "explanation"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ('""', "is empty"),
        ('"".mv', "schema name is empty"),
        ("mv.", "ends where another name was expected"),
        (".mv", "does not parse at '.mv'"),
        ('"mv', "does not parse"),
        ('mv"', "does not parse"),
        ("my view", "does not parse at 'view'"),
        ("mv; drop table t", "does not parse at '; drop table t'"),
        ("database.schema.mv", "has 3 parts"),
        ("m" * 64, "is 64 bytes long"),
        ("é" * 32, "is 64 bytes long"),
        ("s" * 64 + ".mv", "schema name"),
        ('"a\0b"', "NUL"),
        ('"\ud800"', "not valid Unicode"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_a_bad_name_is_refused_with_what_is_wrong_with_it(text: str, explanation: str) -> None:
    with pytest.raises(InvalidName, match=explanation):
        ViewName.parse(text)


@pytest.mark.parametrize("value", [None, 1, b"mv", ["mv"]])
def test_a_name_that_is_not_text_is_refused(value: object) -> None:
    with pytest.raises(InvalidName, match="is text"):
        ViewName.parse(value)  # type: ignore[arg-type]


def test_a_bad_name_is_a_bad_definition_and_a_value_error() -> None:
    assert issubclass(InvalidName, InvalidDefinition)
    assert issubclass(InvalidName, ValueError)


def test_an_identifier_of_63_bytes_is_kept_and_one_of_64_refused() -> None:
    assert check_identifier("é" * 31 + "x") == "é" * 31 + "x"
    with pytest.raises(InvalidName, match=r"role name in grants .* is 64 bytes long"):
        check_identifier("é" * 32, "role name in grants")


@given(_TEXT, st.integers(0, 80))
def test_shortening_never_cuts_a_character_in_half(text: str, size: int) -> None:
    short = shorten(text, size)
    assert text.startswith(short)
    assert len(short.encode()) <= size
    assert short == text or len((short + text[len(short)]).encode()) > size
