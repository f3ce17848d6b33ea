"""`flperf locator`: train a model that finds the bouncing shapes in latents, to evaluate forecasts with."""

from pathlib import Path

from flperf.commands.common import add_overrides, command_parser, make_parent_folder
from flperf.config import load_config
from flperf.engine.compile_cache import use_compile_cache


def locator(arguments: list[str]) -> None:
    """Write the safetensors file that `evaluate --locator` reads."""
    parser = command_parser(
        "locator",
        "Train a model that finds the bouncing shapes in latents, for `flperf evaluate --locator`.",
        "flperf locator --config configs/shapes/predictor.yaml --out experiment/locator.safetensors",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="names the encoder and the bouncing shapes")
    parser.add_argument("--out", required=True, metavar="FILE", help="such as locator.safetensors")
    parser.add_argument(
        "--head",
        default="coordinates",
        help="coordinates (default): regression; heatmap: a distribution over patches",
    )
    parser.add_argument("--steps", type=int, default=600, help="updates of 32 clips (default: 600)")
    add_overrides(parser)
    options = parser.parse_intermixed_args(arguments)
    make_parent_folder(options.out)
    config = load_config(options.config, options.overrides)
    use_compile_cache(config.experiment)
    import torch

    from flperf.evaluation.locator import save_locator, train_locator

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained, error = train_locator(config, options.head, options.steps, device)
    save_locator(Path(options.out), trained, config)
    size = config.dataset.shapes.image_size
    print(f"{options.out}: finds the shapes in validation clips with an error of {error:.2f} pixels of {size}")
