"""params.yaml: read, and checked at the door; one line says what is wrong."""

import difflib
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from diffusion.config import Params, Section
from diffusion.errors import UserError

UNKNOWN = ("extra_forbidden", "invalid_key")  # pydantic's words for keys that are no fields
WORDS = {  # of JSON Schema
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "a text",
    "null": "null",
    "object": "a mapping from keys of params.yaml to {low, high} or a list",
}

VARIABLES = {"tracking.experiment": "MLFLOW_EXPERIMENT_NAME"}  # of the tools, by the key that they stand for

Kind = TypeVar("Kind", bound=Section)


def load(path: Path | str, overrides: Mapping[str, object] | None = None) -> Params:
    """Read and validate a params file.

    `overrides` maps dotted keys ("train.lr") to values that replace the file's; VARIABLES of the environment do too.

    Raises:
        UserError: the file cannot be read, or a key is unknown, missing or out of range; the message is one line
            that names the key, what is allowed and, for an unknown key, the nearest real one.
    """
    tree = _read_yaml(Path(path))
    found = {key: os.environ[name] for key, name in VARIABLES.items() if os.environ.get(name)}
    for key, value in {**found, **(overrides or {})}.items():
        if key not in schema():
            raise UserError(f"{path}: {unknown(key)}")
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    try:
        return checked(Params, tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_value(key: str, text: str) -> object:
    """The value of a key as it would stand in params.yaml: a number, a word, null, [a, list].

    Raises:
        UserError: it is no YAML.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        raise UserError(f"{key} = {text!r} is not readable as YAML: it must be {allowed(schema()[key])}") from None


def checked(kind: type[Kind], tree: Mapping[str, Any]) -> Kind:
    """A section, or all of them (`kind` is Params), from nested plain values as params.yaml holds them.

    Raises:
        UserError: as `load`.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = min(error.errors(), key=lambda found: found["type"] not in UNKNOWN)  # a misspelt key is missing, too
        section = [name for name, field in Params.model_fields.items() if field.annotation is kind]
        raise UserError(_explain(first, [*section, *map(str, first["loc"])])) from None


def write_yaml(params: Params, path: Path, *, without: Sequence[str] = ()) -> None:
    """A params file that `load` reads as `params`, but for null in the dotted keys `without`; it has no comments."""
    from ruamel.yaml import YAML

    tree = params.model_dump(mode="json")
    for key in without:
        section, _, name = key.partition(".")
        tree[section][name] = None
    path.parent.mkdir(parents=True, exist_ok=True)
    YAML().dump(tree, path)


@cache
def schema() -> dict[str, dict[str, Any]]:
    """Dotted key -> JSON Schema of what it may hold, for every key of params.yaml."""
    found: dict[str, dict[str, Any]] = {}
    whole = Params.model_json_schema()
    for name, about in whole["properties"].items():
        if "$ref" in about:
            section = whole["$defs"][about["$ref"].rpartition("/")[2]]
            found |= {f"{name}.{key}": value for key, value in section["properties"].items()}
        else:
            found[name] = about
    return found


def _read_yaml(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        tree = YAML(typ="safe", pure=True).load(path)  # YAML 1.2, as DVC reads it: 1e-4 is a number, off a word
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the repository's root or name another params file") from None
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds no sections; start from params/laptop.yaml")
    return tree


def _explain(error: ErrorDetails, path: Sequence[str]) -> str:
    """One line for pydantic's `error` about what lies at `path`."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])  # a rule's own line
    key = ".".join(path[:2])
    if error["type"] in UNKNOWN:
        return unknown(key)
    about = schema().get(key)
    if error["type"] == "missing":
        return f"{key} is missing: add {'it, ' + allowed(about) if about else 'the section, as in params/laptop.yaml'}"
    if about is None:
        return f"{key} must be a section of keys, as in params/laptop.yaml"
    return f"{key} = {error['input']!r} is not allowed: it must be {allowed(about)}"


def unknown(key: str) -> str:
    """The line about a key that params.yaml does not have."""
    near = difflib.get_close_matches(key, [*schema(), *Params.model_fields], n=1, cutoff=0.0)[0]
    return f"unknown key {key}: did you mean {near}?"


def allowed(about: Mapping[str, Any]) -> str:
    """What a JSON Schema allows, in words."""
    if "anyOf" in about:
        return " or ".join(map(allowed, about["anyOf"]))
    if "const" in about:
        return str(about["const"])
    if "enum" in about:
        return "one of " + ", ".join(map(str, about["enum"]))
    if about["type"] == "array":
        return "a list of " + allowed(about["items"])
    words = WORDS[about["type"]]
    return f"{words} from {about['minimum']:g} to {about['maximum']:g}" if "minimum" in about else words
