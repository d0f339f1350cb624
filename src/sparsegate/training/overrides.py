"""Typed configuration: nested frozen dataclasses to JSON and back, and their fields changed by path.

A configuration is a dataclass whose fields are plain values or further dataclasses, its sections. Where a
section may be one of several classes (`model: MixtureLM | FeedForwardLM`), each has a field `kind` of a
Literal type that tells them apart. `field(metadata={"doc": "..."})` tells what a field means. What a field
admits stands in its type (`Annotated[int, Ge(1)]`) or in `__post_init__`, which raises ValueError.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import ConfigDict, TypeAdapter, ValidationError

from .strict_json import Json, parse_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Classes = tuple[type[DataclassInstance], ...]

Config = TypeVar("Config", bound="DataclassInstance")

_ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One field that can be changed by path.

    Attributes:
        path: the names of its sections and its own, joined by dots.
        type: what it takes, in the words of the command line (`float|none`, `words|bytes`, `int,...`).
        value: what it is now.
        doc: what it means.
    """

    path: str
    type: str
    value: object
    doc: str


def options(config: "DataclassInstance", *, path: str = "") -> Iterator[Option]:
    """The fields of a configuration and of its sections, in the order of their definition."""
    types = _types(type(config))
    for field in dataclasses.fields(config):
        value, here = getattr(config, field.name), path + field.name
        doc = field.metadata.get("doc", "")
        kinds = _by_kind(_sections(types[field.name]))
        if kinds:
            yield Option(path=f"{here}.kind", type="|".join(kinds), value=value.kind, doc=doc)
        if dataclasses.is_dataclass(value):
            yield from options(value, path=f"{here}.")
        elif field.name != "kind":
            yield Option(path=here, type=type_name(types[field.name]), value=value, doc=doc)


def to_json(config: "DataclassInstance") -> dict[str, Json]:
    """A configuration as JSON objects, lists and scalars, from which `from_json` makes an equal one."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def from_json(cls: type[Config], data: object) -> Config:
    """The configuration that `to_json` wrote. Values keep their types: "64" is no number.

    Raises:
        ValueError: one line with the field's path: unknown, missing, of another type, out of range.
    """
    return _section((cls,), data, "")


def read_config(cls: type[Config], file: Path) -> Config:
    """The configuration in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: as `from_json`, after the file's name.
    """
    try:
        return from_json(cls, parse_json(file.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def replace_by_path(config: Config, changes: Mapping[str, object]) -> Config:
    """The configuration with some fields changed: `replace_by_path(config, {"model.num_experts": "64"})`.

    A text is read as its field's type: `3e-4`, `true`, `none`, `512,1024` for a tuple. Any other value must
    have that type. The fields of one section change together: relations hold between their new values. A
    section that becomes of another kind (`batches.kind`) keeps the fields that both kinds have, and has
    defaults for the others.

    Raises:
        ValueError: as `from_json`.
    """
    cls, data = type(config), to_json(config)
    kinds = _kinds(changes)
    for path in kinds:
        _check_known(path, cls, data)
        _change_kind(cls, data, path.removesuffix(".kind"), changes[path])
    for path in changes:
        if path in kinds:
            continue
        _check_known(path, cls, data)
        owner, section, name = _owner(cls, data, path)
        section[name] = _json_value(_types(owner)[name], changes[path], path)
    return from_json(cls, data)


def paths_after(config: "DataclassInstance", changes: Mapping[str, object]) -> list[str]:
    """The paths that `replace_by_path` knows of when it has changed the kinds that are among some changes.

    Kinds of sections that there are not change nothing.

    Raises:
        ValueError: a section cannot be of the kind that it is to become.
    """
    cls, data = type(config), to_json(config)
    for path in _kinds(changes):
        if path in _paths(cls, data, ""):
            _change_kind(cls, data, path.removesuffix(".kind"), changes[path])
    return list(_paths(cls, data, ""))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, with the nearest of some names or paths, or nothing where none is near.

    >>> did_you_mean("model.num_expert", ["model.num_experts", "seed"])
    '; did you mean model.num_experts?'
    >>> did_you_mean("num_experts", ["model.num_experts", "seed"])
    '; did you mean model.num_experts?'
    """
    known = list(known)
    paths = {path.rpartition(".")[2]: path for path in known}
    name = word.lstrip("-").rpartition(".")[2]
    near = [paths[name]] if name in paths else difflib.get_close_matches(word, known, n=1)
    near = near or [paths[close] for close in difflib.get_close_matches(name, paths, n=1)]
    return f"; did you mean {near[0]}?" if near else ""


def type_name(annotation: Any) -> str:
    """An annotation in the words of the command line.

    >>> type_name(tuple[int, ...]), type_name(float | None), type_name(Literal["words", "bytes"])
    ('int,...', 'float|none', 'words|bytes')
    """
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(members[0])
    if origin in (Union, UnionType):
        return "|".join(map(type_name, members))
    if origin is Literal:
        return "|".join(map(str, members))
    if origin is tuple:
        return ",".join("..." if member is Ellipsis else type_name(member) for member in members)
    return "none" if annotation is NoneType else annotation.__name__.lower()


def _kinds(changes: Iterable[str]) -> list[str]:
    """The paths of kinds. Those of outer sections come before those of inner ones, which they bring."""
    return sorted((path for path in changes if path.endswith(".kind")), key=lambda path: path.count("."))


def _check_known(path: str, cls: type, data: Mapping[str, Any]) -> None:
    known = list(_paths(cls, data, ""))
    if path not in known:
        raise ValueError(f"{path}: no such field{did_you_mean(path, known)}")


def _paths(cls: type, data: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """The paths that can be changed, `kind` of sections with several ones among them."""
    for name, annotation in _types(cls).items():
        classes = _sections(annotation)
        if classes:
            if len(classes) > 1:
                yield f"{prefix}{name}.kind"
            # A section that a new kind brought, and that has no default, is there when its own kind is said.
            if name in data:
                yield from _paths(_class_in(classes, data[name]), data[name], f"{prefix}{name}.")
        elif name != "kind":
            yield prefix + name


def _owner(cls: type, data: dict[str, Any], path: str) -> tuple[type, dict[str, Any], str]:
    """The section in which a field stands, as class and as data, and the field's own name."""
    *sections, name = path.split(".")
    for section in sections:
        data, classes = data[section], _sections(_types(cls)[section])
        cls = _class_in(classes, data)
    return cls, data, name


def _class_in(classes: "Classes", data: Mapping[str, Any]) -> type:
    return classes[0] if len(classes) == 1 else _by_kind(classes)[data["kind"]]


def _change_kind(cls: type, data: dict[str, Any], path: str, kind: object) -> None:
    owner, section, name = _owner(cls, data, path)
    classes = _sections(_types(owner)[name])
    cls = _class_of_kind(classes, kind, f"{path}.")
    new, old = _types(cls), _types(_class_in(classes, section[name])) if name in section else {}
    kept = {key: value for key, value in section.get(name, {}).items() if new.get(key) == old[key]}
    # Its own sections are there, as they are by default, for paths that lead into them.
    for inner in dataclasses.fields(cls):
        if _sections(new[inner.name]) and inner.default is not dataclasses.MISSING:
            kept.setdefault(inner.name, TypeAdapter(new[inner.name]).dump_python(inner.default, mode="json"))
    section[name] = {**kept, "kind": kind}


def _json_value(annotation: Any, value: object, path: str) -> Json:
    checked = _value(annotation, value, path, from_text=isinstance(value, str))
    return TypeAdapter(annotation).dump_python(checked, mode="json")


def _section(classes: "Classes", data: object, path: str) -> Any:
    if not isinstance(data, dict):
        where = path.rstrip(".") or "the configuration"
        raise ValueError(f"{where} ({_short(repr(data))}) should be a JSON object")
    cls = classes[0] if len(classes) == 1 else _class_of_kind(classes, data.get("kind"), path)
    types = _types(cls)
    for key in data:
        if key not in types:
            near = did_you_mean(path + key, [path + name for name in types])
            raise ValueError(f"{path}{key}: no such field{near}")
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in data:
            raise ValueError(f"{path}{field.name}: is missing; it has no default")
    values = {name: _value(types[name], value, path + name, from_text=False) for name, value in data.items()}
    return _construct(cls, values, path)


def _sections(annotation: Any) -> "Classes":
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return tuple(member for member in members if dataclasses.is_dataclass(member))


def _by_kind(classes: "Classes") -> "dict[str, type[DataclassInstance]]":
    if len(classes) < 2:
        return {}
    return {kind: cls for cls in classes for kind in get_args(_types(cls)["kind"])}


def _class_of_kind(classes: "Classes", kind: object, path: str) -> "type[DataclassInstance]":
    by_kind = _by_kind(classes)
    if not isinstance(kind, str) or kind not in by_kind:
        raise ValueError(f"{path}kind ({_short(repr(kind))}) should be one of {', '.join(by_kind)}")
    return by_kind[kind]


def _construct(cls: type[Config], values: Mapping[str, object], path: str) -> Config:
    try:
        return cls(**values)
    except ValueError as error:
        # __post_init__ may name its fields with or without the section in which they stand here.
        message = str(error)
        prefix = path if message.split(" ")[0] in values else ""
        raise ValueError(prefix + message) from None


def _value(annotation: Any, value: object, path: str, *, from_text: bool) -> object:
    if sections := _sections(annotation):
        return _section(sections, value, f"{path}.")
    adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))
    try:
        if from_text:
            return adapter.validate_python(_split(annotation, str(value)))
        return adapter.validate_json(_ANYTHING.dump_json(value), strict=True)
    except ValidationError as error:
        cause = error.errors()[0]["msg"].removeprefix("Input ").partition(", unable to")[0]
        raise ValueError(f"{path} ({_short(str(value) if from_text else repr(value))}) {cause}") from None


def _split(annotation: Any, text: str) -> object:
    members = (annotation, *get_args(annotation))
    is_tuple = any(get_origin(member) is tuple for member in members)
    if text.lower() == "none" and (is_tuple or NoneType in members):
        return None if NoneType in members else []
    return [part.strip() for part in text.split(",") if part.strip()] if is_tuple else text


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}
