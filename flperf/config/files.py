"""YAML files, and those that they inherit, as mappings.

Keys are read in lower case, as FutureLatents' older files write them in upper case. A key that stands twice in a mapping is refused:
YAML would silently take the last.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from flperf.errors import UserError


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.value = key.value.lower()
                if key.value in seen:
                    problem = f"line {key.start_mark.line + 1}: the key {key.value} stands twice in one mapping"
                    raise yaml.constructor.ConstructorError(problem=problem)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, source: str) -> dict:
    """The mapping that `text` holds, {} if it is empty; `source` names it in a `UserError`."""
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
    """`${TRAINER.BATCH_SIZE}` names a key, so it is lowered with the keys; `${oc.env:HOME}` is not one."""
    return re.sub(r"\$\{[\w.]+\}", lambda reference: reference[0].lower(), text)


def layers(path: Path, open_files: tuple[Path, ...] = ()) -> Iterator[tuple[Path, dict]]:
    """Yield (file, mapping) from the most distant ancestor to the file itself."""
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
