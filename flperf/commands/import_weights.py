"""`flperf import-weights OLD.pt`: convert the weights of a FutureLatents checkpoint that a head can start from."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from flperf.commands.common import add_overrides, command_parser, make_parent_folder
from flperf.config import Config, load_config
from flperf.data import WITHOUT_VIDEO, Preprocessing, open_dataset
from flperf.errors import UserError
from flperf.files import atomic_file
from flperf.models.encoder import build_encoder
from flperf.models.futurelatents import read_checkpoint, translate
from flperf.models.heads import build_head
from flperf.models.latents import latent_geometry


def import_weights(arguments: list[str]) -> None:
    """Write the tensors that can be used, and print which parameters start fresh and why."""
    parser = command_parser(
        "import-weights",
        "Convert the weights of a FutureLatents checkpoint that a head can start its training from "
        "(model.initial_weights), and report which parameters start fresh and why.",
        "flperf import-weights OLD.pt --config configs/mine.yaml --out head.safetensors",
    )
    parser.add_argument("old", metavar="OLD.pt")
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="the configuration of the head, such as one of import-config"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="safetensors, for model.initial_weights")
    add_overrides(parser)
    options = parser.parse_intermixed_args(arguments)
    make_parent_folder(options.out)
    config = load_config(options.config, options.overrides)
    old, head = read_checkpoint(Path(options.old)), build_head_of(config)
    try:
        imported = translate(head, config.model, old)
    except UserError as error:
        raise UserError(f"{options.old}: {error}") from None
    with atomic_file(Path(options.out)) as unfinished:
        save_file(imported.weights, unfinished)
    share = sum(t.numel() for t in imported.weights.values()) / sum(p.numel() for p in head.parameters())
    print(
        f"{options.out}: {len(imported.weights)} tensors, {share:.0%} of the head's parameters; the others start fresh:"
    )
    for reason in dict.fromkeys(imported.fresh.values()):
        names = [name for name, why in imported.fresh.items() if why == reason]
        print(f"  {len(names):4} such as {names[0]}: {reason}")
    print(f"the head is not trained yet: start its training with model.initial_weights={options.out}")


def build_head_of(config: Config) -> nn.Module:
    """The head of a configuration, fresh. The shape of the latents comes from the encoder, or from cached latents."""
    if config.dataset.kind in WITHOUT_VIDEO:
        shape = open_dataset(config, None, config.seed).latent_shape
        assert shape is not None  # a dataset without video contains latents
    else:
        encoder = build_encoder(
            config.backbone,
            Preprocessing.of(config.backbone),
            dtype=torch.float32,
            device=torch.device("cpu"),
            compile=False,
        )
        shape = encoder.latent_shape(config.dataset.n_frames)
    return build_head(config.model, latent_geometry(config, *shape), seed=config.seed, compile=False)
