"""`flperf locator`: train what finds the bouncing shapes in latents, to judge forecasts by."""

from pathlib import Path

from flperf.commands.common import command_parser, make_folder_of
from flperf.config import load_config
from flperf.engine.compile_cache import use_compile_cache


def locator(arguments: list[str]) -> None:
    """`flperf locator`: one safetensors file for `evaluate --locator`."""
    parser = command_parser(
        "locator",
        "Train a head that finds the bouncing shapes in latents, for `flperf evaluate --locator`.",
        "flperf locator --config configs/shapes/predictor.yaml --out experiment/locator.safetensors",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="whose encoder and bouncing shapes are taken")
    parser.add_argument("--out", required=True, metavar="FILE", help="such as locator.safetensors")
    parser.add_argument(
        "--head", default="coordinates", help="coordinates (default): regression; heatmap: the likeliest patches"
    )
    parser.add_argument("--steps", type=int, default=600, help="updates of 32 clips (default: 600)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a key of the configuration")
    options = parser.parse_intermixed_args(arguments)
    make_folder_of(options.out)
    config = load_config(options.config, options.overrides)
    use_compile_cache(config.experiment)
    import torch

    from flperf.evaluation.locator import save_locator, train_locator

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained, error = train_locator(config, options.head, options.steps, device)
    save_locator(Path(options.out), trained, config)
    print(
        f"{options.out}: finds the shapes in held-out clips to {error:.2f} pixels of {config.dataset.shapes.image_size}"
    )
