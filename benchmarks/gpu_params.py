"""Params files on a machine without pydantic and ruamel.yaml: read by PyYAML, typed by the dataclasses of config.py.

Every scalar is taken as text and converted by its key's type, so that YAML 1.1 (2e-4 is a text, off a truth value) and
the pipeline's YAML 1.2 cannot differ. tests/benchmarks/test_gpu_benchmark.py holds it against `params_file.load`.
"""

import contextlib
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from diffusion.config import Params, Range
from diffusion.errors import UserError
from diffusion.params_file import allowed, schema

NULL = ("null", "~", "")


def load(path: Path, settings: Iterable[str] = ()) -> Params:
    """Read a params file; each of `settings` is a line "train.lr=1e-3" that replaces a value.

    Raises:
        UserError: the file is not readable, or a key is unknown, missing or out of range.
    """
    try:
        tree = yaml.load(path.read_text(), yaml.BaseLoader)  # BaseLoader makes texts, lists and mappings alone
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    texts = _flat(tree)
    for setting in settings:
        key, _, text = setting.partition("=")
        texts[key.strip()] = yaml.load(text, yaml.BaseLoader) if text else ""
    kinds = schema()
    if wrong := sorted(set(texts) ^ set(kinds)):
        raise UserError(f"{path}: {wrong[0]} is {'missing' if wrong[0] in kinds else 'an unknown key'}")
    return _build({key: convert(key, texts[key], kind) for key, kind in kinds.items()})


def convert(key: str, text: Any, kind: Any) -> Any:
    """The value of type `kind`, a type of `config.schema()`, that `text` (or a list of texts) stands for.

    Raises:
        UserError: it stands for none.
    """
    try:
        return _converted(text, kind)
    except (ValueError, TypeError):
        raise UserError(f"{key} = {text!r} is not allowed: it must be {allowed(kind)}") from None


def _converted(text: Any, kind: Any) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = _converted(text, inner[0])
        if not all(m.low <= value <= m.high for m in inner[1:] if isinstance(m, Range)):
            raise ValueError(text)
        return value
    if origin is Literal:
        return {str(choice): choice for choice in inner}[text] if text in map(str, inner) else _refuse(text)
    if origin is tuple:
        one_each = len(inner) > 1 and inner[-1] is not ...
        if isinstance(text, str) or (one_each and len(text) != len(inner)):
            raise ValueError(text)
        return tuple(_converted(item, inner[i] if one_each else inner[0]) for i, item in enumerate(text))
    if origin is dict:
        return _scalar(text) if isinstance(text, dict) else _refuse(text)
    if origin in (Union, types.UnionType):
        return None if type(None) in inner and text in NULL else _first(text, inner)
    scalars: Mapping[Any, Callable[[str], Any]] = {bool: lambda t: {"true": True, "false": False}.get(t, _Refused)}
    value = scalars.get(kind, kind)(text)
    return _refuse(text) if value is _Refused else value


def _scalar(text: Any) -> Any:
    """What texts stand for in YAML 1.2, inside lists and mappings too: of a key without a type."""
    if isinstance(text, dict):
        return {key: _scalar(value) for key, value in text.items()}
    if isinstance(text, list):
        return [_scalar(value) for value in text]
    if text in NULL:
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False}.get(text, text)


def _first(text: Any, kinds: Iterable[Any]) -> Any:
    """What the first of `kinds` makes of `text` that can."""
    for kind in kinds:
        with contextlib.suppress(ValueError, TypeError):
            return _converted(text, kind)
    return _refuse(text)


class _Refused:
    """What a text that is neither true nor false becomes."""


def _refuse(text: Any) -> Any:
    raise ValueError(text)


def _flat(tree: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items() if isinstance(tree, dict) else ():
        found |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return found


def _build(values: Mapping[str, Any]) -> Params:
    sections = get_type_hints(Params)
    arguments: dict[str, Any] = {}
    for name, kind in sections.items():
        own = {k.partition(".")[2]: v for k, v in values.items() if k.startswith(f"{name}.")}
        arguments[name] = kind(**own) if own else values[name]
    return Params(**arguments)
