"""Command-line options from dataclass fields: a field carries its default, help text, range and choices.

`option` declares a field, `add_options` turns a dataclass into flags of an argparse parser, `check_options`
refuses values outside their range or choices. Every program of this project takes its flags this way.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from opsd.errors import OneLineParser, UsageError


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers; NaN is in none."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        if self.high < math.inf:
            left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
            return f"in {left}{self.low}, {self.high}{right}"
        if self.low == -math.inf:
            return "finite"
        return f"{'more than' if self.low_open else 'at least'} {self.low}"


FINITE = Range()
FRACTION = Range(0, 1)
PROPER_SHARE = Range(0, 1, low_open=True)
BELOW_ONE = Range(0, 1, high_open=True)
OPEN_FRACTION = Range(0, 1, low_open=True, high_open=True)
POSITIVE = Range(0, low_open=True)
NOT_NEGATIVE = Range(0)
AT_LEAST_ONE = Range(1)
SEED = Range(0, 2**32 - 1)


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    factory: Callable[[], Any] | None = None,
    range: Range | None = None,
    choices: tuple[str, ...] | None = None,
    kind: Callable[[str], Any] | None = None,
    off: str | None = None,
) -> Any:
    """Return a dataclass field that is a command-line option.

    Args:
        default: its value when the flag is not given; without one (and without `factory`) it is required.
        help: what it is, with its unit.
        factory: returns the default, for a list or a value that is read from the environment.
        range, choices: the values that it may have; None (not set) passes.
        kind: parses the flag's text, where the field's type does not.
        off: for a boolean, a second flag that sets it to False; the last one given counts.
    """
    metadata = {"help": help, "range": range, "choices": choices, "kind": kind, "off": off}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "t", "yes", "y", "1"):
        return True
    if text.lower() in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is no boolean; write True or False")


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _options(group: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(group) if "help" in field.metadata]


def option_parser(group: type, *, prog: str, description: str) -> OneLineParser:
    """Return a parser of the options of a dataclass, whose --help shows their defaults."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = OneLineParser(prog=prog, description=description, formatter_class=form, allow_abbrev=False)
    add_options(parser, group)
    return parser


def add_options(parser: argparse.ArgumentParser, *groups: type) -> None:
    """Add a flag `--name` (also `--na-me`) for each field of these dataclasses that `option` declares."""
    for group in groups:
        kinds = typing.get_type_hints(group)
        for field in _options(group):
            _add_option(parser, field, kinds[field.name])


def _add_option(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: Any) -> None:
    if isinstance(kind, types.UnionType):  # X | None
        kind = next(part for part in kind.__args__ if part is not types.NoneType)
    known: dict[str, Any] = {"help": field.metadata["help"].replace("%", "%%"), "dest": field.name}
    if field.metadata["choices"]:
        known["metavar"] = "{" + ",".join(field.metadata["choices"]) + "}"
    if _is_required(field):
        # Without a value it is missing too, and `check_options` says so.
        known |= {"default": argparse.SUPPRESS, "nargs": "?"}
    else:
        factory = field.default_factory
        known["default"] = field.default if factory is dataclasses.MISSING else factory()
    names = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
    if kind is bool:
        parser.add_argument(*names, type=_boolean, nargs="?", const=True, **known)
        if field.metadata["off"]:
            off = {"dest": field.name, "action": "store_false", "default": field.default}
            parser.add_argument(f"--{field.metadata['off']}", help=f"--{field.name} False", **off)
        return
    if typing.get_origin(kind) is list:
        kind, known["nargs"] = typing.get_args(kind)[0], "+"
    parser.add_argument(*names, type=field.metadata["kind"] or kind, **known)


def check_options(group: type, values: Mapping[str, Any]) -> None:
    """Check the values of a dataclass's options by name.

    Raises:
        UsageError: the first that is missing, outside its range or none of its choices.
    """
    for field in _options(group):
        value, choices = values.get(field.name), field.metadata["choices"]
        if (value is None or str(value) == "") and _is_required(field):
            wanted = (
                f"choose one of {', '.join(choices)}" if choices else f"give the {field.metadata['help']}"
            )
            raise UsageError(f"--{field.name} is missing: {wanted}")
        if value is not None and choices and value not in choices:
            raise UsageError(f"--{field.name} is {value!r}, but must be one of {', '.join(choices)}")
        if field.metadata["range"] is not None:
            check_range(field.name, value, field.metadata["range"])


def check_range(name: str, value: float | None, allowed: Range) -> None:
    """Raise UsageError if the flag `name` is set to a number outside `allowed`."""
    if value is not None and value not in allowed:
        wanted = "finite" if math.isinf(value) else allowed
        raise UsageError(f"--{name} is {value}, but must be {wanted}")


def take(group: type, values: dict[str, Any]) -> Any:
    """Build the dataclass `group` from its options in `values`, and remove them there."""
    return group(**{f.name: values.pop(f.name) for f in dataclasses.fields(group) if f.name in values})
