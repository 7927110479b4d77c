"""What a key of params.yaml may hold: a closed interval, and any such type in words."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin


@dataclass(frozen=True)
class Range:
    """Closed interval of allowed values, read by pydantic and printed in error messages."""

    low: float
    high: float

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return {**handler(source), "ge": self.low, "le": self.high}

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


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
