"""Loads the typed configuration from a YAML file, the files that it inherits, and the command line.

`inherits` lists paths relative to the file. Later files win over earlier ones, and the file's own keys over all of
them; mappings are merged, lists are replaced. Each file is merged into the typed tree separately, so that a wrong key
or value is reported with its file. Keys are converted to lower case: older files of FutureLatents are in upper case.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from flperf.config.futurelatents import convert_booleans, former_key
from flperf.config.schema import Config
from flperf.config.validate import check_values
from flperf.errors import UserError, first_line

RETIRED = ("model", "fused_adaln")  # configurations that earlier runs wrote have this key, which did not change results


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file with all that it inherits, apply `section.key=value` overrides, and check every key and value.

    Returns a `Config` of plain dataclasses with interpolations resolved. Raises `UserError`, one line that names the
    file and the key.
    """
    path = Path(path)
    return _resolve(layers(path), overrides, str(path), path.stem)


def parse_config(text: str, source: str, overrides: Sequence[str] = ()) -> Config:
    """Parse a configuration without `inherits`, such as `dump_config` writes. `source` names it in errors."""
    return _resolve([(source, parse_yaml(text, source))], overrides, source, "")


def _resolve(layers: Iterable[tuple[Path | str, dict]], overrides: Sequence[str], source: str, name: str) -> Config:
    tree = OmegaConf.structured(Config)
    for file, layer in layers:
        tree = _merge(tree, layer, str(file))
    for override in overrides:
        tree = _merge(tree, _parse_override(override), "command line")
    if OmegaConf.is_missing(tree, "name"):
        tree.name = name
    try:
        config = cast(Config, OmegaConf.to_object(tree))
    except MissingMandatoryValue as error:
        raise UserError(f"{source}: {error.full_key}: must be set") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {error.full_key}: {first_line(error)}") from error
    check_values(config, source)
    return config


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """A line `key: old -> new` for each value that differs between two nested dictionaries."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif _are_sections(before) and _are_sections(after) and len(before) == len(after):
            for number, pair in enumerate(zip(before, after, strict=True)):
                lines += differences(*pair, f"{prefix}{key}[{number}].")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


def _are_sections(value: Any) -> TypeGuard[list[dict]]:
    return isinstance(value, list) and all(isinstance(section, dict) for section in value)


def _parse_override(override: str) -> dict:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UserError(f"command line: {override!r} is not of the form section.key=value")
    try:
        layer = OmegaConf.from_dotlist([f"{key.lower()}={lower_references(value)}"])
        return cast(dict, OmegaConf.to_container(layer))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"command line: {override!r}: {first_line(error)}") from None


def _merge(tree: DictConfig, layer: dict, source: str, prefix: str = "") -> DictConfig:
    section, key = RETIRED
    if not prefix and isinstance(layer.get(section), dict):
        layer = layer | {section: {name: value for name, value in layer[section].items() if name != key}}
    _check_keys(tree, layer, source, prefix)
    convert_booleans(layer)
    try:
        return cast(DictConfig, OmegaConf.merge(tree, layer))
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {prefix}{error.full_key}: {first_line(error)}") from None


def _check_keys(tree: DictConfig, layer: dict, source: str, prefix: str = "") -> None:
    """Raise `UserError` for unknown keys, and for values where the tree has a section, a list or a mapping. OmegaConf
    would refuse them too, but could not name the most similar known key."""
    known = [str(key) for key in tree]
    for key, value in layer.items():
        full_key = f"{prefix}{key}"
        if key not in known:
            raise UserError(f"{source}: unknown key {full_key}: {_hint(full_key, prefix, known)}")
        section = _listed_section(tree, key)
        if section is not None:
            _check_listed_sections(section, value, source, full_key)
            continue
        node = OmegaConf.select(tree, key, throw_on_missing=False)
        is_section = isinstance(node, DictConfig) and OmegaConf.get_type(node) is not dict
        if is_section and isinstance(value, dict):
            _check_keys(node, value, source, f"{full_key}.")
        elif is_section and not (isinstance(value, str) and value.startswith("${")):
            raise UserError(f"{source}: {full_key}: is a section with the keys {', '.join(node.keys())}, not a value")
        elif isinstance(node, ListConfig) and isinstance(value, dict):
            raise UserError(f"{source}: {full_key}: must be a list")
        elif isinstance(node, DictConfig) and isinstance(value, list):
            raise UserError(f"{source}: {full_key}: must be a mapping of keys to values")


def _listed_section(tree: DictConfig, key: str) -> Any:
    """The dataclass of the elements of a key that is a list of sections; None for any other key."""
    hint = get_type_hints(OmegaConf.get_type(tree)).get(key)
    lists = [part for part in (hint, *get_args(hint)) if get_origin(part) is list]
    return next((part for listed in lists for part in get_args(listed) if is_dataclass(part)), None)


def _check_listed_sections(section: type, value: Any, source: str, full_key: str) -> None:
    """Raise `UserError` unless `value` is a list of mappings that fit the section, or null."""
    if value is None or (isinstance(value, str) and value.startswith("${")):
        return
    if not isinstance(value, list) or not all(isinstance(element, dict) for element in value):
        known = ", ".join(field.name for field in fields(section))
        raise UserError(f"{source}: {full_key}: must be a list of sections with the keys {known}, is {value!r}")
    for number, element in enumerate(value):
        _merge(OmegaConf.structured(section), element, source, f"{full_key}[{number}].")


def _hint(full_key: str, prefix: str, known: Sequence[str]) -> str:
    """What to use instead of an unknown key: the new name of an old key, or the most similar known one."""
    former = former_key(full_key)
    if former:
        return former
    nearest = difflib.get_close_matches(full_key.removeprefix(prefix), known, n=1)
    return f"did you mean {prefix}{nearest[0]}?" if nearest else f"known here: {', '.join(known)}"


class _Loader(yaml.SafeLoader):
    """Converts keys to lower case, and refuses a key that occurs twice in a mapping: YAML would use the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.value = key.value.lower()
                if key.value in seen:
                    problem = f"line {key.start_mark.line + 1}: the key {key.value} occurs twice in one mapping"
                    raise yaml.constructor.ConstructorError(problem=problem)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, source: str) -> dict:
    """The mapping in a YAML text, {} if it is empty. Raises `UserError`, which names `source`."""
    try:
        mapping = yaml.load(lower_references(text), _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise UserError(f"{source}: a configuration file must be a mapping of keys to values")
    return mapping


def lower_references(text: str) -> str:
    """Convert references to keys to lower case, as the keys are: `${TRAINER.BATCH_SIZE}`, but not `${oc.env:HOME}`."""
    return re.sub(r"\$\{[\w.]+\}", lambda reference: reference[0].lower(), text)


def layers(path: Path, open_files: tuple[Path, ...] = ()) -> Iterator[tuple[Path, dict]]:
    """Yield (file, mapping) for all inherited files and then the file itself. Raises `UserError`; `open_files` are the
    files that inherit this one."""
    resolved = path.resolve()
    if resolved in open_files:
        chain = " -> ".join(file.name for file in (*open_files, resolved))
        raise UserError(f"{open_files[-1]}: inherits: circular: {chain}")
    mapping = parse_yaml(_read(path, open_files), str(path))
    parents = mapping.pop("inherits", [])
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UserError(f"{path}: inherits: must be a list of paths, is {parents!r}")
    for parent in parents:
        yield from layers(path.parent / parent, (*open_files, resolved))
    yield path, mapping


def _read(path: Path, open_files: tuple[Path, ...]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        where = f"{open_files[-1]}: inherits" if open_files else "--config"
        raise UserError(f"{where}: there is no file {path}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
