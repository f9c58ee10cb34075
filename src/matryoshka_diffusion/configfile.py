"""Configs as YAML files, and `--set` on top of them. Every error is one line with the key.

YAML is read and written by ruamel.yaml: its YAML 1.2 refuses a key that is written twice and reads
1e-3 as a number. This file imports no torch.
"""

from __future__ import annotations

import difflib
import io
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML, Node, SafeConstructor, ScalarNode, YAMLError
from ruamel.yaml.constructor import ConstructorError
from ruamel.yaml.error import MarkedYAMLError

from matryoshka_diffusion.codecconfig import CodecRunConfig
from matryoshka_diffusion.config import ConfigError, RunConfig

Config = TypeVar("Config", RunConfig, CodecRunConfig)
Changes = Iterable[tuple[str, Any]]
"""Pairs of a path such as "train.stages[0].lr" and its new value, applied in order."""
NAMES_ELSEWHERE = {
    **dict.fromkeys(("cfg", "cfg_scale", "guidance_scale"), "sampling.guidance"),
    **dict.fromkeys(("num_inference_steps", "num_steps"), "sampling.steps"),
    "scheduler": "sampling.sampler",
}
"""Our keys by their names in other programs, whose spelling is not near."""
MOST_REPEATED = 100_000
"""Values that the aliases of a file may add, since ten lines of them can stand for billions."""


def to_yaml(config: RunConfig | CodecRunConfig) -> str:
    """The config as YAML text that `from_yaml` reads back to an equal value."""
    return dump(config.model_dump(mode="json"))


def dump(data: Any, *, compact: bool = False) -> str:
    """Plain data as YAML text; `compact` writes the innermost lists and mappings on one line."""
    text, yaml = io.StringIO(), _yaml()
    yaml.default_flow_style = None if compact else False
    yaml.representer.ignore_aliases = lambda _: True  # a value that occurs twice is written twice
    yaml.dump(data, text)
    return text.getvalue()


def from_dict(
    data: Mapping[Any, Any], kind: type[Config] = RunConfig, *, where: str = "config"
) -> Config:
    """Validate a plain mapping; `where` names its origin in errors.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a wrong type or value, parts that
            do not fit together.
    """
    try:
        return kind.model_validate(_tuples(data))
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, kind)}") from None
    except RecursionError as error:
        raise ConfigError(f"{where}: values are nested too deeply") from error


def from_yaml(text: str, kind: type[Config] = RunConfig, *, where: str = "config") -> Config:
    """Parse YAML text. Raises `ConfigError` as `from_dict` does, also for text that is no YAML."""
    data = _parse(text, where)
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected keys such as {', '.join(kind.model_fields)}")
    return from_dict(data, kind, where=where)


def load_config(path: Path, kind: type[Config] = RunConfig) -> Config:
    """Read a config file. Raises `ConfigError` as `from_yaml` does, also for an unreadable file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({_one_line(error)})") from error
    return from_yaml(text, kind, where=str(path))


def override(config: Config, assignments: Iterable[str]) -> Config:
    """Apply `path.to.key=value` assignments of `--set`; a value is YAML.

    Raises:
        ConfigError: no `=`, an unknown path (with the nearest known one), a bad value.
    """
    return changed(config, [assignment(text) for text in assignments], where="--set")


def changed(config: Config, changes: Changes, *, where: str = "config") -> Config:
    """The config with new values at these paths, validated. Raises `ConfigError`."""
    data = config.model_dump(mode="json")
    for path, value in changes:
        if not _assign(data, _dotted(path).split("."), value):
            raise ConfigError(f"{where}: {path}: unknown key{_nearest(path, type(config))}")
    return from_dict(data, type(config), where=where)


# --- YAML ------------------------------------------------------------------------------------


class _Constructor(SafeConstructor):
    """Safe values only, and 08 as text: earlier versions wrote a class of this name so."""

    def construct_document(self, node: Node) -> Any:
        sizes: dict[int, int] = {}
        if _size(node, sizes) - len(sizes) > MOST_REPEATED:
            reason = f"its aliases stand for more than {MOST_REPEATED:,} values: write them out"
            raise ConstructorError(problem=reason)
        return super().construct_document(node)


def _size(node: Node, sizes: dict[int, int]) -> int:
    """The number of values in a YAML node with every alias written out; notes it in `sizes`."""
    if (size := sizes.get(id(node))) is not None:
        if not size:  # it is being counted
            raise ConstructorError(problem="a value contains itself", problem_mark=node.start_mark)
        return size
    sizes[id(node)] = 0
    parts = () if isinstance(node, ScalarNode) else node.value
    entries = (entry for part in parts for entry in (part if isinstance(part, tuple) else (part,)))
    sizes[id(node)] = size = 1 + sum(_size(entry, sizes) for entry in entries)
    return size


def _read_integer(constructor: SafeConstructor, node: ScalarNode) -> int | str:
    is_text = re.match("[-+]?0.", node.value)
    return node.value if is_text else constructor.construct_yaml_int(node)


_Constructor.add_constructor("tag:yaml.org,2002:int", _read_integer)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)  # the C parser reads YAML 1.1
    yaml.Constructor = _Constructor
    yaml.width = 100
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    return yaml


def _parse(text: str, where: str) -> Any:
    try:
        return _yaml().load(text)
    except MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise ConfigError(f"{where}: {line}{error.problem or error.context}") from error
    except (YAMLError, ValueError, RecursionError) as error:  # `\0`, `!!float x`, `[[[[...`
        raise ConfigError(f"{where}: {_one_line(error)}") from error


def assignment(text: str, option: str = "--set") -> tuple[str, Any]:
    """The path and value of `path.to.key=value`. Raises `ConfigError`, which names the option."""
    path, separator, value = text.partition("=")
    if not separator or not path.strip():
        raise ConfigError(f"{option} {text}: write path.to.key=value")
    return path.strip(), _parse(value, f"{option} {text}")


def _assign(data: Any, keys: list[str], value: Any) -> bool:
    """Set a value inside nested dicts and lists; False if the keys lead into something else."""
    key, *deeper = keys
    if isinstance(data, dict):
        index: Any = key
        if deeper and data.get(key) is None:  # a part that is not set; validation knows its keys
            data[key] = {}
    elif isinstance(data, list) and re.fullmatch("-?[0-9]{1,4}", key):
        index = int(key)
        if not -len(data) <= index < len(data):
            return False
    else:
        return False
    if deeper:
        return _assign(data[index], deeper, value)
    data[index] = value
    return True


def _tuples(data: Any) -> Any:
    """Lists as tuples all the way down: strict types take nothing else."""
    if isinstance(data, Mapping):
        return {key: _tuples(value) for key, value in data.items()}
    return tuple(_tuples(value) for value in data) if isinstance(data, list | tuple) else data


# --- errors people can act on ----------------------------------------------------------------


def explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """The first three problems of a pydantic error, one clause each."""
    clauses = []
    for problem in error.errors()[:3]:
        steps = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in problem["loc"])
        path = "".join(steps).removeprefix(".")
        if problem["type"] == "extra_forbidden":
            clauses.append(f"{path}: unknown key{_nearest(path, kind)}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "tuple_type" and isinstance(problem["input"], str | int | float):
                message = f"a list is needed; write [{problem['input']}]"
            clauses.append(f"{path}: {message}" if path else message)
    return "; ".join(clauses)


def _nearest(path: str, kind: type[BaseModel]) -> str:
    """' (did you mean X?)': the closest path, by the spelling of its last key and of the whole."""

    path = NAMES_ELSEWHERE.get(path.rpartition(".")[2], _dotted(path))

    def closeness(candidate: str) -> float:
        pairs = ((path, candidate), (path.rsplit(".", 1)[-1], candidate.rsplit(".", 1)[-1]))
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return f" (did you mean {max(paths(kind), key=closeness)}?)"


def _dotted(path: str) -> str:
    """`train.stages[0].lr` as `train.stages.0.lr`, which every shell leaves alone."""
    return path.replace("[", ".").replace("]", "")


def paths(annotation: Any, prefix: str = "") -> Iterator[str]:
    """Every path below a type; the entries of a list are written with index 0."""
    origin = typing.get_origin(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            path = f"{prefix}.{name}".removeprefix(".")
            yield path
            yield from paths(field.annotation, path)
    elif origin in (tuple, types.UnionType, typing.Union):
        for part in typing.get_args(annotation):
            yield from paths(part, f"{prefix}.0" if origin is tuple else prefix)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
