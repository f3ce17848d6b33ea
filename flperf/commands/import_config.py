"""`flperf import-config OLD.yaml`: convert a FutureLatents configuration and report what changed."""

from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flperf.commands.common import command_parser, make_parent_folder
from flperf.config import parse_config
from flperf.config.futurelatents import translate
from flperf.config.load import layers
from flperf.errors import UserError, first_line
from flperf.files import write_atomically


def import_config(arguments: list[str]) -> None:
    """Write the new file and print what changed."""
    parser = command_parser(
        "import-config",
        "Convert a FutureLatents configuration and report what changed.",
        "flperf import-config OLD.yaml --out configs/mine.yaml --processes 8",
    )
    parser.add_argument("old", metavar="OLD.yaml")
    parser.add_argument("--out", metavar="FILE", help="the new file (default: OLD.flperf.yaml beside the old one)")
    parser.add_argument(
        "--processes", type=int, default=1, help="the number of devices that the old file was run on (default: 1)"
    )
    options = parser.parse_args(arguments)
    old = Path(options.old)
    if not old.is_file():
        raise UserError(f"{old}: there is no such file")
    out = Path(options.out) if options.out else old.with_suffix(".flperf.yaml")
    make_parent_folder(out)
    values, report = translate(read_old(old), options.processes)
    tree = OmegaConf.create({})
    for key, value in values.items():
        OmegaConf.update(tree, key, value, force_add=True)
    text = yaml.safe_dump(OmegaConf.to_container(tree), sort_keys=False)
    parse_config(text, str(out), ["name=imported"])  # raises if flperf could not load the new file
    header = [f"From {old.name} of FutureLatents by `flperf import-config`.", *report]
    write_atomically(out, "".join(f"# {line}\n" for line in header) + text)
    print("\n".join([f"{out}: written", *(f"  {line}" for line in report)]))


def read_old(path: Path) -> dict:
    """The merged mapping of a file and all that it inherits, with interpolations resolved and keys in lower case.
    Raises `UserError`."""
    merged: Any = OmegaConf.create({})
    for _, layer in layers(path):
        merged = OmegaConf.merge(merged, OmegaConf.create(layer))
    try:
        return cast(dict, OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(
            f"{path}: {error.full_key}: {first_line(error)}; add that key to the file (an image_size is in pixels, "
            "usually 256), or replace the reference by a value"
        ) from None
