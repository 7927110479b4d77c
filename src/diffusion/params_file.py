"""params.yaml: read, and checked at the door; one line says what is wrong.

Only this needs pydantic and a YAML reader: the rest of the library takes the dataclasses of config.py.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from diffusion.config import Params, Range, to_dict
from diffusion.errors import UserError
from diffusion.rules import broken


def load(path: Path | str, overrides: Mapping[str, object] | None = None) -> Params:
    """Read and validate a params file.

    `overrides` maps dotted keys ("train.lr") to values that replace the file's.

    Raises:
        UserError: the file cannot be read, or a key is unknown, missing or out of range; the message is one line
            that names the key, what is allowed and, for an unknown key, the nearest real one.
    """
    tree = _read_yaml(Path(path))
    for key, value in (overrides or {}).items():
        if key not in schema():
            raise UserError(f"{path}: {unknown(key)}")
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    try:
        return from_dict(tree)
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


def from_dict(tree: Mapping[str, Any]) -> Params:
    """Validate nested plain values as params.yaml holds them.

    Raises:
        UserError: as `load`.
    """
    from pydantic import TypeAdapter, ValidationError

    known = schema()
    for key in _dotted(tree):  # pydantic would say "unexpected keyword"; the nearest real key is what helps
        if key not in known and key not in _sections():
            raise UserError(unknown(key))
    try:
        params = TypeAdapter(Params).validate_python(tree)
    except ValidationError as error:
        raise UserError(_explain(error.errors()[0])) from None
    for problem in broken(params):
        raise UserError(problem)
    return params


def checked_section(section: str, values: Mapping[str, Any]) -> Any:
    """A section's dataclass from plain values of another file.

    Raises:
        UserError: params.yaml could not hold one of them, or one is missing; rules between keys are not looked at.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(get_type_hints(Params)[section]).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(_explain({**first, "loc": (section, *first["loc"])})) from None


def write_yaml(params: Params, path: Path, *, without: Sequence[str] = ()) -> None:
    """A params file that `load` reads as `params`, but for null in the dotted keys `without`; it has no comments."""
    from ruamel.yaml import YAML

    tree = to_dict(params)
    for key in without:
        section, _, name = key.partition(".")
        tree[section][name] = None
    path.parent.mkdir(parents=True, exist_ok=True)
    YAML().dump(tree, path)


def schema() -> dict[str, Any]:
    """Dotted key -> annotated type, for every key of params.yaml."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(Params, include_extras=True).items():
        if dataclasses.is_dataclass(kind):
            found |= {f"{name}.{k}": v for k, v in get_type_hints(kind, include_extras=True).items()}
        else:
            found[name] = kind
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


def _explain(error: Mapping[str, Any]) -> str:
    """One line for pydantic's first error."""
    path = [str(part) for part in error["loc"]]
    key = next((k for k in (".".join(path[:2]), path[0]) if k in schema()), ".".join(path[:2]))
    kind = schema().get(key)
    if error["type"] == "missing":
        return (
            f"{key} is missing: {'add it, ' + allowed(kind) if kind else 'add the section, as in params/laptop.yaml'}"
        )
    if kind is None:
        return f"{key} must be a section of keys, as in params/laptop.yaml"
    return f"{key} = {error['input']!r} is not allowed: it must be {allowed(kind)}"


def unknown(key: str) -> str:
    near = difflib.get_close_matches(key, [*schema(), *_sections()], n=1, cutoff=0.0)[0]
    return f"unknown key {key}: did you mean {near}?"


def _sections() -> list[str]:
    return [name for name, kind in get_type_hints(Params).items() if dataclasses.is_dataclass(kind)]


def _dotted(tree: Mapping[str, Any]) -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield str(name)
            yield from (f"{name}.{key}" for key in value)
        else:
            yield str(name)


def allowed(kind: Any) -> str:
    """What a key of type `kind` may hold, in words."""
    if get_origin(kind) is Annotated:
        base, *metadata = get_args(kind)
        ranges = [str(m) for m in metadata if isinstance(m, Range)]
        return f"{allowed(base)} from {ranges[0]}" if ranges else allowed(base)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list of " + allowed(get_args(kind)[0])
    if get_origin(kind) is dict:
        return "a mapping from keys of params.yaml to {low, high} or a list"
    if get_args(kind):  # X | None
        return " or ".join(allowed(k) for k in get_args(kind))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(kind, str(kind))
