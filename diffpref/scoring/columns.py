"""Rows <-> arrow tables, whose parts may differ in what they know of a column."""

import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCORES = b"diffpref_scores"  # metadata of a parquet file: which of its columns are scores, a JSON list
KINDS = {  # of our columns; scores are float64
    "path": pa.string(),
    "file": pa.string(),
    "row": pa.int64(),
    "key": pa.string(),
    "prompt": pa.string(),
    "error": pa.string(),
}


def recorded(schema: pa.Schema) -> list[str] | None:
    """The columns that a file says are scores; None where it says nothing of them."""
    names = (schema.metadata or {}).get(SCORES)
    return None if names is None else [name for name in json.loads(names) if name in schema.names]


def to_table(rows: list[dict[str, Any]], kinds: dict[str, pa.DataType]) -> pa.Table:
    """Rows -> a table with every column that one of them has. `kinds`: of the columns whose kind is known."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: array([row.get(name) for row in rows], kinds.get(name)) for name in names})


def array(values: list[Any], kind: pa.DataType | None) -> pa.Array:
    """Values of a kind, or of the kind that they seem to be; as text where they have none in common."""
    try:
        return pa.array(values, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array(map(spelled, values), pa.string())


def spelled(value: Any) -> str | None:
    """A value as text."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def common(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """One schema for all: a column has the kind that holds all of its kinds, or else is text. Our own stand where they
    stood in the first; error and the picture last."""
    kinds: dict[str, list[pa.DataType]] = {}
    for schema in schemas:
        for field in schema:
            kinds.setdefault(field.name, []).append(field.type)
    return pa.schema([(name, widest(name, set(found))) for name, found in kinds.items()])


def widest(name: str, kinds: set[pa.DataType]) -> pa.DataType:
    """The kind that holds values of all these kinds."""
    try:
        several = [pa.schema([(name, kind)]) for kind in kinds]
        return pa.unify_schemas(several, promote_options="permissive").field(name).type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.string()


def fitted(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table with the columns and kinds of `common`."""
    return pa.table([column(table, field) for field in schema], schema=schema)


def column(table: pa.Table, field: pa.Field) -> pa.ChunkedArray | pa.Array:
    """One column of `fitted`."""
    if field.name not in table.column_names:
        return pa.nulls(len(table), field.type)
    found = table.column(field.name)
    if pa.types.is_string(field.type) and not pa.types.is_string(found.type):
        return pa.array(map(spelled, found.to_pylist()), pa.string())
    return found.cast(field.type, safe=False)
