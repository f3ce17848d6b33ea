"""`flperf export`: write a trained head as one safetensors file."""

from flperf.commands.trained import trained_parser


def export(arguments: list[str]) -> None:
    """Write the file that `load_forecaster` reads."""
    parser = trained_parser(
        "export",
        "Write a trained head (averaged weights), its latent statistics and its configuration as one safetensors file.",
        "flperf export --checkpoint experiment/demo --out demo.safetensors",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="such as forecaster.safetensors")
    options = parser.parse_args(arguments)
    from flperf.forecaster import read_trained, write_export

    trained = read_trained(options.checkpoint, average=options.weights == "average")
    write_export(trained, options.out)
    parameters = sum(tensor.numel() for tensor in trained.weights.values())
    print(
        f"{options.out}: the head of {trained.source} after {trained.step} steps, {parameters / 1e6:.1f} M parameters"
    )
