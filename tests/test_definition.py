"""A definition refuses what can never be a view, survives every way it is kept, and is read from files."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airflow_provider_matviews.definition import (
    Column,
    ExtendedStatistics,
    Index,
    IndexKey,
    MaintenanceWindow,
    MatViewDefinition,
    RefreshStrategy,
    load_definitions,
)
from airflow_provider_matviews.exceptions import InvalidDefinition, InvalidName
from airflow_provider_matviews.names import ViewName, quote, shorten
from airflow_provider_matviews.parts import Grant
from tests.conftest import examples

_CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
#: What could end the header, or a string in it, before its time.
_SNAGS = st.sampled_from(
    [
        *("*/", "/*", "*/*", "/*/", "**/", "\\*/", "/\\*", "'", '"', "\\", "\\u002F", "--", "#", "$$", "%s", "{}"),
        *("[[indexes]]", "matview", '"""', "'''", "\r", "\r\n", "\t", "\x1f", "\x7f", "\x85", "\u2028", "\ufeff"),
        *("\U0001f600", "e\u0301"),
    ]
)
_STRANGE = st.lists(_SNAGS | st.text(_CHARACTERS, max_size=5), max_size=6).map("".join)
_TEXT = (st.text(_CHARACTERS) | _STRANGE).filter(str.strip)
_IDENTIFIER = (st.text(_CHARACTERS, min_size=1) | _STRANGE).map(lambda text: shorten(text, 63)).filter(bool)
_NAME = _IDENTIFIER.map(quote)
_PARAMETERS = st.dictionaries(
    st.sampled_from(["fillfactor", "autovacuum_enabled", "toast.autovacuum_enabled"]),
    st.integers() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
)
_TARGET = st.none() | st.integers(0, 10000)
_COMMENT = st.none() | _TEXT
_LABELS = st.dictionaries(_IDENTIFIER, _TEXT, max_size=2)


def _grants(*privileges: str) -> st.SearchStrategy[dict[str, list[str]]]:
    grant = st.builds(Grant, st.sampled_from(privileges), st.booleans(), st.none() | _IDENTIFIER).map(str)
    nothing = st.just(["NONE"]) if "DELETE" in privileges else st.nothing()
    return st.dictionaries(_IDENTIFIER, nothing | st.lists(grant | st.sampled_from(privileges), min_size=1), max_size=3)


_KEYS = (
    st.builds(
        IndexKey,
        column=_IDENTIFIER,
        order=st.sampled_from([None, "asc", "desc"]),
        nulls=st.sampled_from([None, "first", "last"]),
        operator_class=st.none() | _NAME,
        collation=st.none() | _NAME,
    )
    | st.builds(IndexKey, expression=_TEXT, statistics=_TARGET)
    | st.builds(IndexKey, column=_IDENTIFIER, operator_class=_NAME, operator_class_options=_PARAMETERS)
)
_COLUMNS = st.builds(
    Column,
    name=_IDENTIFIER,
    comment=_COMMENT,
    storage=st.sampled_from([None, "plain", "external", "main", "extended"]),
    compression=st.sampled_from([None, "pglz", "lz4"]),
    statistics=_TARGET,
    options=_PARAMETERS,
    grants=_grants("SELECT", "all", "references"),
    security_labels=_LABELS,
)
_STATISTICS = st.builds(
    ExtendedStatistics,
    name=_NAME | st.tuples(_NAME, _NAME).map(".".join),
    columns=st.lists(_IDENTIFIER, min_size=2, max_size=3) | st.just(()),
    expressions=st.lists(_TEXT, min_size=1, max_size=2),
    kinds=st.lists(st.sampled_from(["ndistinct", "dependencies", "mcv"]), unique=True),
    target=_TARGET,
    comment=_COMMENT,
    owner=st.none() | _IDENTIFIER,
)


_WINDOWS = st.sampled_from(["22:30-06:00", "mon-fri,sun 1:00-24:00 America/Argentina/Buenos_Aires"])
_INTERVALS = st.sampled_from([None, 1, 0.001, 10**9, timedelta(microseconds=1), timedelta.max])


@st.composite
def _definitions(draw: st.DrawFn) -> MatViewDefinition:
    # Of all indexes one at the most.
    clustered = draw(st.sampled_from([None, 0, 1]))
    indexes = [
        Index(
            columns=draw(st.lists(_IDENTIFIER | _KEYS, min_size=1, max_size=3)),
            name=f"index {number}",
            unique=draw(st.booleans()),
            where=draw(st.none() | _TEXT),
            include=draw(st.lists(_IDENTIFIER, max_size=2)),
            storage_parameters=draw(_PARAMETERS),
            tablespace=draw(st.none() | _IDENTIFIER),
            nulls_not_distinct=draw(st.booleans()),
            comment=draw(_COMMENT),
            clustered=number == clustered,
            depends_on_extensions=draw(st.lists(_IDENTIFIER, max_size=1)),
        )
        for number in range(draw(st.integers(0, 2)))
    ]
    name = draw(_NAME)
    return MatViewDefinition(
        name=name,
        sql=draw(_TEXT),
        refresh_strategy=draw(st.sampled_from(["auto", "regular", "swap"])),
        unique_index_columns=draw(st.lists(_IDENTIFIER, max_size=2)),
        indexes=indexes,
        comment=draw(_COMMENT),
        grants=draw(_grants("SELECT", "all", "DELETE", "Maintain")),
        storage_parameters=draw(_PARAMETERS),
        tablespace=draw(st.none() | _IDENTIFIER),
        depends_on=draw(st.lists(_NAME, max_size=2)),
        description=draw(_COMMENT),
        managed=draw(st.booleans()),
        session_settings=draw(st.dictionaries(st.sampled_from(["work_mem", "a.b"]), st.integers() | _TEXT, max_size=2)),
        timeouts=draw(st.dictionaries(st.sampled_from(["lock_timeout", "timeout"]), st.floats(0.5, 9.5), max_size=2)),
        owner=draw(st.none() | _IDENTIFIER),
        access_method=draw(st.none() | _IDENTIFIER),
        columns=draw(st.lists(_COLUMNS, max_size=2, unique_by=lambda column: column.name)),
        statistics=draw(st.lists(_STATISTICS, max_size=2, unique_by=lambda each: str(ViewName.parse(each.name)))),
        replica_identity=draw(st.sampled_from([None, "default", "nothing", "full"])),
        security_labels=draw(_LABELS),
        depends_on_extensions=draw(st.lists(_IDENTIFIER, max_size=2)),
        exclusive=draw(st.booleans()),
        refresh_windows=draw(st.lists(_WINDOWS | _WINDOWS.map(MaintenanceWindow.parse), max_size=2)),
        min_interval=draw(_INTERVALS),
        renamed_from=draw(st.none() | _NAME.filter(lambda other: ViewName.parse(other) != ViewName.parse(name))),
    )


@given(_definitions())
@settings(max_examples=examples(30), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_definition_survives_json_pickle_and_copying(definition: MatViewDefinition) -> None:
    assert MatViewDefinition.from_dict(json.loads(json.dumps(definition.to_dict()))) == definition
    assert pickle.loads(pickle.dumps(definition)) == definition
    assert copy.deepcopy(definition) == definition
    assert hash(copy.deepcopy(definition)) == hash(definition)


@given(_definitions().filter(lambda definition: definition.sql == definition.sql.strip()))
@settings(max_examples=examples(30), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_definition_survives_a_file_whose_header_is_one_comment(definition: MatViewDefinition) -> None:
    text = definition.to_sql()
    assert MatViewDefinition.from_sql(text) == definition
    assert (
        MatViewDefinition.from_sql(text.replace("\n", "\r\n", text[: -len(definition.sql)].count("\n"))) == definition
    )
    assert text.endswith(f"*/\n{definition.sql}\n")
    header = text[: -len(definition.sql) - 1]
    # For PostgreSQL too, in which comments nest.
    assert (header.count("/*"), header.count("*/")) == (1, 1)


def test_windows_and_an_interval_are_texts_and_seconds_in_a_file() -> None:
    definition = MatViewDefinition(
        name="mv",
        sql="SELECT 1",
        refresh_windows=[MaintenanceWindow(start="22:00", end="06:00", days=["sat", "sun"], timezone="Europe/Berlin")],
        min_interval=timedelta(minutes=15),
    )
    header = 'refresh_windows = [\n    "sat,sun 22:00-06:00 Europe/Berlin",\n]\nmin_interval = 900.0\n'
    assert definition.to_sql() == f'/* matview\nname = "mv"\n{header}*/\nSELECT 1\n'
    assert definition.to_dict()["refresh_windows"] == ["sat,sun 22:00-06:00 Europe/Berlin"]


@given(_TEXT.filter(lambda text: not text.lstrip().startswith("/*")))
@settings(deadline=None)
def test_the_sql_of_a_file_is_what_follows_its_header(text: str) -> None:
    header = '/* matview\nname = "analytics.\\"Odd\\""\nunique_index_columns = ["a"]\n*/\n'
    definition = MatViewDefinition.from_sql(header + text)
    assert (definition.sql, definition.name, definition.unique_index_columns) == (
        text.strip(),
        'analytics."Odd"',
        ("a",),
    )
    assert MatViewDefinition.from_sql(text, name="mv").sql == text.strip()


def test_a_definition_cannot_be_changed() -> None:
    columns, grants, parameters = ["a"], {"reporting": ["select"]}, {"fillfactor": 90}
    definition = MatViewDefinition(
        name="mv", sql="SELECT 1 AS a", unique_index_columns=columns, grants=grants, storage_parameters=parameters
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        definition.sql = "SELECT 2"  # type: ignore[misc]
    columns.append("b")
    grants["reporting"].append("INSERT")
    grants["other"] = ["SELECT"]
    parameters["fillfactor"] = 10
    assert definition.unique_index_columns == ("a",)
    assert definition.grants == {"reporting": ("SELECT",)}
    assert definition.storage_parameters == {"fillfactor": 90}


def test_arguments_may_be_lists_and_plain_words() -> None:
    definition = MatViewDefinition(
        name="Schema.MV",
        sql="SELECT 1 AS a",
        refresh_strategy="concurrent",
        unique_index_columns=["a"],
        indexes=[Index(columns=["a"], method="hash")],
        depends_on=["other"],
    )
    assert definition.refresh_strategy is RefreshStrategy.CONCURRENT
    assert (definition.view.schema, definition.view.name) == ("schema", "mv")
    assert [(index.unique, index.columns, index.method) for index in definition.all_indexes] == [
        (True, ("a",), "btree"),
        (False, ("a",), "hash"),
    ]
    assert definition == MatViewDefinition(
        name="Schema.MV",
        sql="SELECT 1 AS a",
        refresh_strategy=RefreshStrategy.CONCURRENT,
        unique_index_columns=("a",),
        indexes=(Index(columns=("a",), method="hash"),),
        depends_on=("other",),
    )


@pytest.mark.parametrize(
    ("arguments", "explanation"),
    [
        ({"name": "a.b.c"}, "has 3 parts"),
        ({"name": None}, "is text, not NoneType"),
        ({"sql": ""}, "SQL of mv is empty"),
        ({"sql": " \n\t"}, "SQL of mv is empty"),
        ({"sql": "SELECT '\0'"}, "NUL"),
        ({"sql": "SELECT '\ud800'"}, "not valid Unicode"),
        ({"sql": None}, "is text, not NoneType"),
        ({"refresh_strategy": "fast"}, "'fast' does not exist. Choose one of 'regular', 'concurrent', 'swap', 'auto'"),
        ({"refresh_strategy": None}, "None does not exist"),
        ({"refresh_strategy": "concurrent"}, "declares no unique index over plain columns"),
        ({"refresh_strategy": "concurrent", "indexes": [Index(columns=["a"])]}, "declares no unique index"),
        (
            {"refresh_strategy": "concurrent", "indexes": [Index(columns=["a"], unique=True, where="a > 1")]},
            "declares no unique index over plain columns",
        ),
        (
            {
                "refresh_strategy": "concurrent",
                "indexes": [Index(columns=["a", IndexKey(expression="lower(b)")], unique=True)],
            },
            "declares no unique index over plain columns",
        ),
        ({"unique_index_columns": "id"}, "unique_index_columns is a list or tuple, not 'id'"),
        ({"unique_index_columns": [1]}, "holds 1, which is not str"),
        ({"unique_index_columns": [""]}, "column name in unique_index_columns is empty"),
        ({"unique_index_columns": ["c" * 64]}, "is 64 bytes long"),
        ({"indexes": Index(columns=["a"])}, "indexes is a list or tuple"),
        ({"indexes": ["a"]}, "holds 'a', which is not Index"),
        ({"indexes": [Index(columns=["a"]), Index(columns=["a"], method="hash")]}, "would be named mv_a_idx: give"),
        ({"depends_on": "other"}, "depends_on is a list or tuple"),
        ({"depends_on": ["a.b.c"]}, "has 3 parts"),
        ({"grants": ["reporting"]}, "grants maps roles to lists of privileges"),
        ({"grants": {"reporting": "SELECT"}}, "is a list or tuple, not 'SELECT'"),
        ({"grants": {"reporting": []}}, "is empty: name a privilege"),
        ({"grants": {"reporting": ["EXECUTE"]}}, "holds EXECUTE; there are ALL, DELETE"),
        ({"grants": {"reporting": ["SELECT ON t TO evil; --"]}}, "there are ALL, DELETE"),
        ({"grants": {"": ["SELECT"]}}, "role name in grants is empty"),
        ({"storage_parameters": {"fill factor": 1}}, "'fill factor' is not the name of a storage parameter"),
        ({"storage_parameters": {"fillfactor": None}}, "is a number, text or true/false"),
        ({"storage_parameters": {"toast": {"autovacuum_enabled": False}}}, "is a number, text or true/false"),
        ({"storage_parameters": ["fillfactor"]}, "storage_parameters maps names to values"),
        ({"tablespace": ""}, "tablespace name is empty"),
        ({"comment": 1}, "comment of mv is text, not int"),
        ({"comment": "a\0b"}, "NUL"),
        ({"description": "\udfff"}, "not valid Unicode"),
        ({"managed": "false"}, "managed is true or false, not 'false'"),
        ({"exclusive": 1}, "exclusive is true or false, not 1"),
        ({"owner": ""}, "name of the owner is empty"),
        ({"owner": "o" * 64}, "is 64 bytes long"),
        ({"owner": 1}, "name of the owner is empty"),
        ({"access_method": ""}, "name of the access method is empty"),
        ({"replica_identity": "index"}, "'index' does not exist. Choose one of 'default', 'nothing', 'full'"),
        ({"security_labels": "secret"}, "security_labels maps providers to labels"),
        ({"security_labels": {"": "secret"}}, "provider in security_labels is empty"),
        ({"security_labels": {"p": ""}}, "security label of p is empty"),
        ({"depends_on_extensions": "postgis"}, "depends_on_extensions is a list or tuple"),
        ({"depends_on_extensions": [1]}, "holds 1, which is not str"),
        ({"columns": Column(name="a")}, "columns is a list or tuple"),
        ({"columns": ["a"]}, "holds 'a', which is not Column"),
        ({"columns": [Column(name="a"), Column(name="b"), Column(name="a")]}, "columns of mv name a twice"),
        ({"statistics": ["a"]}, "holds 'a', which is not ExtendedStatistics"),
        (
            {"statistics": [ExtendedStatistics(name=name, expressions=["a"]) for name in ("s", "S")]},
            "statistics of mv name s twice",
        ),
        (
            {"indexes": [Index(name=name, columns=["a"], clustered=True) for name in "ij"]},
            "Two indexes of mv say clustered=True",
        ),
        ({"renamed_from": "MV"}, "mv is declared as renamed from itself"),
        ({"renamed_from": "a b"}, "does not parse"),
        ({"refresh_windows": "22:00-06:00"}, "refresh_windows is a list or tuple"),
        ({"refresh_windows": [None]}, "holds None, which is not MaintenanceWindow"),
        ({"refresh_windows": ["tonight"]}, "'tonight' is no window"),
        ({"refresh_windows": ["22:00-06:00 Berlin"]}, "timezone='Berlin' of a window is none that is known here"),
        ({"min_interval": 0}, "min_interval=0 is not a positive number of seconds"),
        ({"min_interval": timedelta(minutes=-1)}, "is not a positive number of seconds, or a timedelta"),
        ({"min_interval": float("nan")}, "is not a positive number"),
        ({"min_interval": True}, "is not a positive number"),
        ({"min_interval": "15 min"}, "is not a positive number"),
        ({"grants": {"reporting": ["NONE", "SELECT"]}}, "grants['reporting'] says NONE and more"),
        ({"grants": {"reporting": ["SELECT GRANTED BY"]}}, "there are ALL, DELETE"),
        ({"grants": {"reporting": ["SELECT GRANTED BY a.b"]}}, "'a.b' is not the name of a role"),
        ({"grants": {"reporting": ["SELECT GRANTED BY a; DROP TABLE t"]}}, "does not parse"),
        ({"grants": {"reporting": ["SELECT WITH HIERARCHY OPTION"]}}, "there are ALL, DELETE"),
        ({"grants": {"reporting": ["SELECT, UPDATE"]}}, "there are ALL, DELETE"),
    ],
)
def test_a_definition_that_can_never_be_a_view_is_refused(arguments: dict[str, Any], explanation: str) -> None:
    with pytest.raises(InvalidDefinition) as raised:
        MatViewDefinition(**{"name": "mv", "sql": "SELECT 1 AS a", **arguments})
    assert explanation in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "explanation"),
    [
        ({"columns": []}, "at least one column"),
        ({"columns": "id"}, "is a list or tuple, not 'id'"),
        ({"columns": [None]}, "holds None"),
        ({"columns": [""]}, "index column is empty"),
        ({"columns": ["a"], "include": "b"}, "include of an index is a list or tuple"),
        ({"columns": ["a"], "name": "n" * 64}, "index name .* is 64 bytes long"),
        ({"columns": ["a"], "method": "btree (a); drop table t; --"}, "is not the name of an index access method"),
        ({"columns": ["a"], "method": None}, "is not the name of an index access method"),
        ({"columns": ["a"], "where": " "}, "predicate of an index is empty"),
        ({"columns": ["a"], "storage_parameters": {"fillfactor) --": 1}}, "is not the name of a storage parameter"),
        ({"columns": ["a"], "unique": "no"}, "unique of an index is true or false"),
        ({"columns": ["a"], "nulls_not_distinct": 1}, "nulls_not_distinct of an index is true or false"),
        ({"columns": ["a"], "clustered": None}, "clustered of an index is true or false"),
        ({"columns": ["a"], "comment": " "}, "comment on an index is empty"),
        ({"columns": ["a"], "depends_on_extensions": "postgis"}, "depends_on_extensions is a list or tuple"),
    ],
)
def test_an_index_that_can_never_be_made_is_refused(arguments: dict[str, Any], explanation: str) -> None:
    with pytest.raises(InvalidDefinition, match=explanation):
        Index(**arguments)


@pytest.mark.parametrize(
    ("arguments", "explanation"),
    [
        ({}, "either a column or an expression"),
        ({"column": "a", "expression": "b"}, "either a column or an expression"),
        ({"expression": ""}, "index expression is empty"),
        ({"column": "a", "order": "down"}, "order='down'"),
        ({"column": "a", "order": "desc; drop table t"}, "does not exist. Choose one of"),
        ({"column": "a", "nulls": "FIRST"}, "nulls='FIRST'"),
        ({"column": "a", "operator_class": "a b"}, "does not parse"),
        ({"column": "a", "collation": "a.b.c"}, "has 3 parts"),
        ({"column": "a", "operator_class_options": {"siglen": 9}}, "need an operator_class that they belong to"),
        (
            {"column": "a", "operator_class": "o", "operator_class_options": {"sig len": 9}},
            "'sig len' is not the name of a parameter in operator_class_options",
        ),
        ({"column": "a", "statistics": 9}, "those of its expression"),
        ({"expression": "a", "statistics": 10001}, "statistics=10001 is not a whole number from 0 to 10000"),
        ({"expression": "a", "statistics": -1}, "statistics=-1 is not a whole number"),
        ({"expression": "a", "statistics": True}, "statistics=True is not a whole number"),
    ],
)
def test_an_index_key_that_can_never_be_made_is_refused(arguments: dict[str, Any], explanation: str) -> None:
    with pytest.raises(InvalidDefinition, match=explanation):
        IndexKey(**arguments)


@pytest.mark.parametrize(
    ("arguments", "explanation"),
    [
        ({"name": ""}, "column name is empty"),
        ({"comment": "\ud800"}, "comment on column a is not valid Unicode"),
        ({"storage": "PLAIN"}, "storage of a column='PLAIN' does not exist. Choose one of 'plain', 'external'"),
        ({"compression": "zstd"}, "compression of a column='zstd' does not exist"),
        ({"statistics": "100"}, "'100' is not a whole number from 0 to 10000"),
        ({"options": {"n distinct": 1}}, "'n distinct' is not the name of a parameter in options"),
        ({"options": [1]}, "options maps names to values"),
        ({"grants": {"reporting": ["DELETE"]}}, "holds DELETE; there are ALL, INSERT, REFERENCES, SELECT, UPDATE"),
        ({"grants": {"reporting": ["NONE"]}}, "holds NONE; there are ALL"),
        ({"security_labels": {"p": 1}}, "security label of p is text, not int"),
    ],
)
def test_a_column_that_can_never_be_is_refused(arguments: dict[str, Any], explanation: str) -> None:
    with pytest.raises(InvalidDefinition, match=explanation):
        Column(**{"name": "a", **arguments})


@pytest.mark.parametrize(
    ("arguments", "explanation"),
    [
        ({"columns": []}, "The statistics s need two columns, or an expression"),
        ({"columns": ["a"]}, "need two columns, or an expression"),
        ({"columns": "ab"}, "columns of statistics is a list or tuple"),
        ({"columns": ["a", ""]}, "column name is empty"),
        ({"expressions": [" "]}, "expression of statistics is empty"),
        ({"kinds": ["everything"]}, "kinds of statistics='everything' does not exist. Choose one of 'ndistinct'"),
        ({"target": 1.5}, "1.5 is not a whole number from 0 to 10000"),
        ({"comment": ""}, "comment on statistics s is empty"),
        ({"owner": ""}, "owner of statistics is empty"),
        ({"name": "a.b.c"}, "has 3 parts"),
    ],
)
def test_extended_statistics_that_can_never_be_are_refused(arguments: dict[str, Any], explanation: str) -> None:
    with pytest.raises(InvalidDefinition, match=explanation):
        ExtendedStatistics(**{"name": "s", "columns": ["a", "b"], **arguments})


@pytest.mark.parametrize(
    ("text", "grant"),
    [
        ("select", Grant("SELECT")),
        (" Select  With\nGrant Option ", Grant("SELECT", grantable=True)),
        ("UPDATE GRANTED BY Alice", Grant("UPDATE", grantor="alice")),
        ('all with grant option granted by "Odd "" granted by"', Grant("ALL", True, 'Odd " granted by')),
    ],
)
def test_a_grant_is_read_as_a_person_types_it(text: str, grant: Grant) -> None:
    assert Grant.parse(text) == Grant.parse(str(grant)) == grant
    assert MatViewDefinition(name="mv", sql="SELECT 1", grants={"r": [text]}).grants == {"r": (str(grant),)}


def test_a_refusal_of_concurrent_says_what_to_declare() -> None:
    with pytest.raises(InvalidDefinition, match=r"To mend it: declare unique_index_columns=\(\.\.\.\)"):
        MatViewDefinition(name="mv", sql="SELECT 1 AS a", refresh_strategy="concurrent")


def test_a_view_of_somebody_else_may_be_concurrent_without_its_index_declared() -> None:
    definition = MatViewDefinition(name="mv", sql="SELECT 1 AS a", refresh_strategy="concurrent", managed=False)
    assert definition.refresh_strategy is RefreshStrategy.CONCURRENT


def test_indexes_are_named_as_postgresql_names_them() -> None:
    index = Index(columns=["a", IndexKey(expression="lower(b)")])
    assert index.name_on("mv") == "mv_a_expr_idx"
    assert Index(columns=["a"], unique=True).name_on("mv") == "mv_a_key"
    assert Index(columns=["a"], name="My index").name_on("mv") == "My index"


def test_a_long_index_name_is_cut_to_63_bytes_and_stays_its_own() -> None:
    view = "é" * 31
    names = {Index(columns=["c" * 40 + end]).name_on(view) for end in ("a", "b", "ü")}
    assert len(names) == 3
    names.add(Index(columns=["c"]).name_on(view))
    assert all(60 <= len(name.encode()) <= 63 for name in names)
    exactly = Index(columns=["c" * 30]).name_on("v" * 28)
    assert exactly == "v" * 28 + "_" + "c" * 30 + "_idx"
    assert len(exactly) == 63


@pytest.mark.parametrize(
    ("declaration", "explanation"),
    [
        ({"name": "mv", "sql": "SELECT 1", "strategy": "auto"}, "'strategy' is no argument of a view's definition"),
        ({"name": "mv"}, "a view's definition lacks 'sql'"),
        ({"sql": "SELECT 1"}, "a view's definition lacks 'name'"),
        ({"name": "mv", "sql": "SELECT 1", 5: 1}, "'5' is no argument"),
        ({"name": "mv", "sql": "SELECT 1", "indexes": "a"}, "indexes is a list of tables"),
        ({"name": "mv", "sql": "SELECT 1", "indexes": {"columns": ["a"]}}, "indexes is a list of tables"),
        ({"name": "mv", "sql": "SELECT 1", "indexes": [["a"]]}, "an index is a table of arguments"),
        ({"name": "mv", "sql": "SELECT 1", "indexes": [{}]}, "an index lacks 'columns'"),
        ({"name": "mv", "sql": "SELECT 1", "indexes": [{"columns": "a"}]}, "columns of an index is a list, not 'a'"),
        ({"name": "mv", "sql": "SELECT 1", "indexes": [{"columns": ["a"], "uniq": 1}]}, "'uniq' is no argument of"),
        ({"name": "mv", "sql": "SELECT 1", "indexes": [{"columns": [{"colum": "a"}]}]}, "'colum' is no argument of"),
        ({"name": "mv", "sql": "SELECT 1", "columns": {"name": "a"}}, "columns is a list of tables"),
        ({"name": "mv", "sql": "SELECT 1", "columns": [{"comment": "a"}]}, "a column lacks 'name'"),
        ({"name": "mv", "sql": "SELECT 1", "columns": [{"name": "a", "type": "b"}]}, "'type' is no argument of a col"),
        ({"name": "mv", "sql": "SELECT 1", "statistics": 5}, "statistics is a list of tables"),
        ({"name": "mv", "sql": "SELECT 1", "statistics": [{}]}, "extended statistics lacks 'name'"),
        ("SELECT 1", "is a table of arguments, not 'SELECT 1'"),
    ],
)
def test_plain_data_that_is_no_definition_is_refused(declaration: Any, explanation: str) -> None:
    with pytest.raises(InvalidDefinition) as raised:
        MatViewDefinition.from_dict(declaration)
    assert explanation in str(raised.value)


def test_a_file_says_everything_that_code_can_say(tmp_path: Path) -> None:
    path = tmp_path / "activity.sql"
    path.write_text(
        """\ufeff
/* matview
name = "analytics.activity"
refresh_strategy = "concurrent"
unique_index_columns = ["user_id"]
comment = "Who did how much."
depends_on = ["analytics.users"]
storage_parameters = { fillfactor = 90, "toast.autovacuum_enabled" = false }
grants = { reporting = ["select"] }

[[indexes]]
columns = ["day", { expression = "lower(name)", order = "desc", nulls = "last" }]
where = "day IS NOT NULL"
*/
-- The header ends at the first end of a comment; this is the query's own.
SELECT user_id, day, name FROM events /* all of them */;
""",
        encoding="utf-8",
    )
    assert MatViewDefinition.from_file(path) == MatViewDefinition(
        name="analytics.activity",
        sql="-- The header ends at the first end of a comment; this is the query's own.\n"
        "SELECT user_id, day, name FROM events /* all of them */;",
        refresh_strategy="concurrent",
        unique_index_columns=["user_id"],
        comment="Who did how much.",
        depends_on=["analytics.users"],
        storage_parameters={"fillfactor": 90, "toast.autovacuum_enabled": False},
        grants={"reporting": ["SELECT"]},
        indexes=[
            Index(
                columns=["day", IndexKey(expression="lower(name)", order="desc", nulls="last")],
                where="day IS NOT NULL",
            )
        ],
    )


@pytest.mark.parametrize("comment", ["/* matviews are good */", "/* a matview */", "-- matview", "/**/"])
def test_a_comment_that_is_not_a_header_belongs_to_the_query(comment: str, tmp_path: Path) -> None:
    path = tmp_path / "analytics.daily.sql"
    path.write_text(f"{comment}\nSELECT 1 AS a")
    definition = MatViewDefinition.from_file(path)
    assert definition.sql == f"{comment}\nSELECT 1 AS a"
    assert definition.name == "analytics.daily"


def test_arguments_beside_a_text_give_way_to_its_header() -> None:
    text = '/* matview\nname = "mv"\nmanaged = false\n*/ SELECT 1'
    definition = MatViewDefinition.from_sql(text, name="other", managed=True, comment="kept")
    assert (definition.name, definition.managed, definition.comment) == ("mv", False, "kept")


@pytest.mark.parametrize(
    ("text", "error", "explanation"),
    [
        ("/* matview\nname = \n*/ SELECT 1", InvalidDefinition, "header is not TOML"),
        ("/* matview\nnam = 'mv'\n*/ SELECT 1", InvalidDefinition, "'nam' is no argument of a view's definition"),
        ("/* matview\nsql = 'SELECT 2'\n*/ SELECT 1", InvalidDefinition, "has a key `sql`"),
        ("/* matview\nname = 'a.b.c'\n*/ SELECT 1", InvalidName, "has 3 parts"),
        ("/* matview\nmanaged = 'false'\n*/ SELECT 1", InvalidDefinition, "managed is true or false"),
        ("/* matview\nrefresh_strategy = 1\n*/ SELECT 1", InvalidDefinition, "refresh_strategy=1 does not exist"),
        ("/* matview */", InvalidDefinition, "SQL of bad is empty"),
        ("", InvalidDefinition, "SQL of a view is empty"),
        ("SELECT '\xff'", InvalidDefinition, "is not UTF-8 text"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_path(
    text: str, error: type[InvalidDefinition], explanation: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.sql"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(error) as raised:
        load_definitions(tmp_path)
    assert str(path) in str(raised.value)
    assert explanation in str(raised.value)


def test_a_text_without_a_name_is_refused_with_the_line_to_write() -> None:
    with pytest.raises(InvalidDefinition, match=r'write name = "schema\.view" in its header'):
        MatViewDefinition.from_sql("SELECT 1")


def _write(folder: Path, file: str, **header: str) -> None:
    lines = "".join(f"{key} = {value}\n" for key, value in header.items())
    path = folder / f"{file}.sql"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"/* matview\n{lines}*/\nSELECT 1 AS a")


def test_definitions_are_loaded_with_each_view_after_what_it_depends_on(tmp_path: Path) -> None:
    _write(tmp_path, "a", depends_on='["deep.C", "somebody_elses"]')
    _write(tmp_path, "nested/b", name='"deep.c"', depends_on="['\"d\"']")
    _write(tmp_path, "z", name='"d"')
    (tmp_path / "notes.txt").write_text("not SQL")
    loaded = load_definitions(tmp_path)
    assert list(loaded) == ["d", "deep.c", "a"]
    assert all(definition.name == name for name, definition in loaded.items())


def test_an_empty_folder_holds_no_definitions(tmp_path: Path) -> None:
    assert load_definitions(tmp_path) == {}


def test_a_view_declared_twice_is_refused_with_both_files(tmp_path: Path) -> None:
    _write(tmp_path, "one", name='"S.mv"')
    _write(tmp_path, "two", name="'\"s\".MV'")
    with pytest.raises(InvalidDefinition) as raised:
        load_definitions(tmp_path)
    assert all(part in str(raised.value) for part in ("s.mv", "twice", "one.sql", "two.sql"))


def test_views_that_depend_on_each_other_in_a_circle_are_refused_in_the_order_of_the_circle(tmp_path: Path) -> None:
    _write(tmp_path, "a", depends_on='["b"]')
    _write(tmp_path, "b", depends_on='["c"]')
    _write(tmp_path, "c", depends_on='["a"]')
    with pytest.raises(InvalidDefinition, match="in a circle") as raised:
        load_definitions(tmp_path)
    circle = str(raised.value).rstrip(".").split(": ")[1].split(" -> ")
    assert circle[0] == circle[-1]
    assert set(itertools.pairwise(circle)) == {("a", "b"), ("b", "c"), ("c", "a")}


@pytest.mark.parametrize("name", ["absent", "file.sql"])
def test_what_is_not_a_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.sql").write_text("SELECT 1")
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        load_definitions(tmp_path / name)
