"""Trains the three regimes on bouncing shapes and on demo clips, and plots the skill of their forecasts by horizon.

    python -m benchmarks.forecasts --out docs

The encoders are trained by `benchmarks.small_encoder`. 4096 demo clips are used, since heads soon overfit the demo's
96; they are encoded once. One head also compares `split` with `joint` encoding, on natural and on spliced clips. The
future of a spliced clip can't be predicted, so any skill there is a leak.

Runs are in experiment/forecasts/; existing ones are not trained again. Writes forecasts.png, the tables forecasts.md,
and overview.png of one clip.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from flperf.data.demo import write_demo  # noqa: E402

RUNS = Path("experiment/forecasts")
DEMO_CLIPS, DEMO_FOLDER = {"train": 4096, "validation": 128}, Path("data/forecasts/demo")
ENCODERS = {"shapes": "configs/shapes/predictor.yaml", "demo": "configs/demo.yaml"}
REGIMES = ("predictor", "cross_attention", "flow_matching")
VIDEOS = [
    "dataset.kind=kinetics_400",
    *(f"dataset.{key}={DEMO_FOLDER}/{key}.csv" for key in ("train", "validation", "labels")),
]
LATENTS = Path("data/forecasts/demo_latents")
DEMO = [
    *(
        "dataset.kind=kinetics_400_cached",
        *(f"dataset.{split}={LATENTS}/{split}/manifest.csv" for split in ("train", "validation")),
    ),
    f"dataset.labels={DEMO_FOLDER}/labels.csv",
    *("trainer.batch_size=16", "trainer.learning_rate=3e-3", "evaluation.eval_every=500", "checkpoint.save_every=500"),
]
DEMO_HEADS = {
    "predictor": ["model.head=predictor", "objective.kind=regression", "trainer.max_steps=3000"],
    "cross_attention": ["model.head=cross_attention", "objective.kind=regression", "trainer.max_steps=3000"],
    "flow_matching": [
        *(
            "objective.tau_distribution=uniform",
            "evaluation.sampling.samples=16",
            "trainer.ema_decay=0.99",
            "trainer.max_steps=8000",
        )
    ],
}
STEPS = ["trainer.max_steps=1500"]  # on shapes
SPLICED = ["dataset.shapes.splice_at=8"]  # the first target frame: configs/shapes has 4 context latents of 2 frames
LEAKS = {
    "natural, split": [],
    "natural, joint": ["backbone.encode=joint"],
    "spliced, split": SPLICED,
    "spliced, joint": [*SPLICED, "backbone.encode=joint"],
}
LABELS = {"predictor": "predictor", "cross_attention": "cross-attention", "flow_matching": "DiT, flow matching"}


def call(*arguments: str) -> None:
    print("+", *arguments, flush=True)
    subprocess.run([sys.executable, *arguments], check=True)


def encoder(data: str) -> str:
    folder = f"data/encoders/{data}"
    if not Path(folder, "model.safetensors").is_file():
        call(
            "-m",
            "benchmarks.small_encoder",
            "--config",
            ENCODERS[data],
            "--out",
            folder,
            *(VIDEOS if data == "demo" else []),
        )
    return folder


def locator(data: str) -> str:
    file = RUNS / f"locator_{data}.safetensors"
    if not file.is_file():
        call(
            "flperf/cli.py",
            "locator",
            "--config",
            ENCODERS[data],
            "--out",
            str(file),
            f"backbone.weights={encoder(data)}",
        )
    return str(file)


def encode_demo() -> None:
    """Write demo clips and their latents, unless they exist."""
    if not DEMO_FOLDER.is_dir():
        write_demo(DEMO_FOLDER, DEMO_CLIPS)
    call(
        "flperf/cli.py",
        "encode",
        "--config",
        ENCODERS["demo"],
        "--out",
        str(LATENTS),
        *VIDEOS,
        f"backbone.weights={encoder('demo')}",
    )


def trained(name: str, config: str, data: str, overrides: list[str]) -> dict:
    """The evaluation of a run, which is trained if it does not exist."""
    run = RUNS / name
    common = [f"experiment={RUNS}", f"name={name}", f"backbone.weights={encoder(data)}", "evaluation.dump_examples=0"]
    call("flperf/train.py", "--config", config, *common, *overrides)
    result = run / "evaluation.jsonl"
    if not result.is_file():
        located = ["--locator", locator(data)] if data == "shapes" else []
        call("flperf/cli.py", "evaluate", "--checkpoint", str(run), "--out", str(result), *located)
    return json.loads(result.read_text().splitlines()[-1])


def skills(result: dict, error: str) -> list[float]:
    return result["horizon"][f"skill_{error}"]


def draw(regimes: dict[str, dict[str, dict]], leaks: dict[str, dict], out: Path) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8), constrained_layout=True)
    for axis, (data, results) in zip(axes, regimes.items(), strict=False):
        for regime, result in results.items():
            axis.plot(
                range(1, 1 + len(skills(result, "mse"))),
                [100 * s for s in skills(result, "mse")],
                "o-",
                label=LABELS[regime],
            )
        axis.set(
            title=f"skill on {'bouncing shapes' if data == 'shapes' else 'the demo clips'}", ylabel="skill in MSE (%)"
        )
        axis.legend(fontsize=8)
    for condition, result in leaks.items():
        axes[2].plot(
            range(1, 1 + len(skills(result, "mse"))), [100 * s for s in skills(result, "mse")], "o-", label=condition
        )
    axes[2].set(title="encoding split or joint (predictor)", ylabel="skill in MSE (%)")
    axes[2].legend(fontsize=8)
    shown = regimes["shapes"]
    for regime, result in shown.items():
        errors = result["locator"]["forecast"]
        axes[3].plot(range(1, 1 + len(errors)), errors, "o-", label=LABELS[regime])
    for name, style in (("copy_last", "k--"), ("target", "k:")):
        errors = shown["predictor"]["locator"][name]
        axes[3].plot(
            range(1, 1 + len(errors)), errors, style, label={"copy_last": "copy last", "target": "true latents"}[name]
        )
    axes[3].set(title="where the shapes will be", ylabel="mean error of the centres (pixels of 256)", ylim=(0, None))
    axes[3].legend(fontsize=8)
    for axis in axes:
        axis.set_xlabel("latent frames ahead")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.axhline(0, color="grey", linewidth=0.8)
    figure.savefig(out / "forecasts.png", dpi=80)


def tables(regimes: dict[str, dict[str, dict]], leaks: dict[str, dict]) -> str:
    """Tables in Markdown: skill in L1 and MSE, and the error of the locator, at each latent frame ahead."""
    horizon = len(skills(regimes["shapes"]["predictor"], "l1"))
    ahead = " | ".join(f"+{frame}" for frame in range(1, horizon + 1))
    lines = [f"| clips | head | error | {ahead} |", "| --- " * (3 + horizon) + "|"]
    rows = [(data, LABELS[regime], result) for data, results in regimes.items() for regime, result in results.items()]
    rows += [(f"shapes, {condition}", "predictor", result) for condition, result in leaks.items()]
    for data, head, result in rows:
        for error in ("l1", "mse"):
            lines.append(
                f"| {data} | {head} | {error.upper()} | "
                + " | ".join(f"{skill:.1%}" for skill in skills(result, error))
                + " |"
            )
    lines += ["", f"| locator, pixels of 256 | {ahead} |", "| --- " * (1 + horizon) + "|"]
    results = regimes["shapes"]
    located = {LABELS[regime]: result["locator"]["forecast"] for regime, result in results.items()}
    located |= {
        "copy last": results["predictor"]["locator"]["copy_last"],
        "true latents": results["predictor"]["locator"]["target"],
    }
    lines += [
        f"| {name} | " + " | ".join(f"{error:.1f}" for error in errors) + " |" for name, errors in located.items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs", metavar="DIR")
    options = parser.parse_args()
    encode_demo()
    regimes = {
        "shapes": {
            regime: trained(f"shapes_{regime}", f"configs/shapes/{regime}.yaml", "shapes", STEPS) for regime in REGIMES
        },
        "demo": {
            regime: trained(f"demo_{regime}", "configs/demo.yaml", "demo", [*DEMO, *DEMO_HEADS[regime]])
            for regime in REGIMES
        },
    }
    leaks = {"natural, split": regimes["shapes"]["predictor"]}
    for condition in list(LEAKS)[1:]:
        name = "shapes_" + condition.replace(", ", "_")
        leaks[condition] = trained(name, "configs/shapes/predictor.yaml", "shapes", [*STEPS, *LEAKS[condition]])
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    draw(regimes, leaks, out)
    call(
        "flperf/cli.py",
        "sample",
        "--checkpoint",
        str(RUNS / "shapes_flow_matching"),
        "--out",
        str(RUNS / "sample"),
        "--clips",
        "1",
    )
    shutil.copy(RUNS / "sample/clip_00000/overview.png", out / "overview.png")
    text = tables(regimes, leaks)
    (out / "forecasts.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
