"""Draw the picture of the data flow at the top of the README: `python docs/data_flow.py docs/data_flow.png`."""

import sys

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

STAGES = [  # (title, detail) from left to right, one unit of the x axis each
    ("video files", "any codec\nand size"),
    ("decode", "PyAV, NVDEC:\nresize, crop"),
    ("encode", "frozen V-JEPA 2,\nDINOv3 or 4DS"),
    ("normalise,\nsplit", "context | target,\nb t h w d"),
    ("head", "predictor, DiT,\ncross-attention"),
    ("objective", "regression or\nflow matching"),
    ("update", "AdamW, EMA"),
]
LEARNT = {4}
BANDS = [  # (label, colour, spans of (first stage, last stage, text))
    ("background", "#e4e4e4", [(0, 1, "processes read ahead"), (6, 6, "checkpoints")]),
    ("compiled", "#cfe3f7", [(2, 2, "block by block"), (4, 4, "block by block")]),
    ("fused", "#d5ecd0", [(3, 5, "Triton (flow matching): normalise, noise, loss")]),
    ("distributed", "#f6dfc4", [(0, 3, "each process: its own clips"), (4, 6, "DeepSpeed ZeRO 0 to 3, bf16")]),
]
WIDTH, GAP, EDGE = 0.9, 0.1, "#555555"
STAGE_Y, CACHE_Y, BANDS_Y, BAND_HEIGHT = 2.9, 4.35, 1.55, 0.42


def box(axes: Axes, left: float, bottom: float, width: float, height: float, colour: str, edge: str = EDGE) -> None:
    shape = FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.07", fc=colour, ec=edge)
    axes.add_patch(shape)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": EDGE, "shrinkA": 0, "shrinkB": 0})


def draw(axes: Axes) -> None:
    for x, (title, detail) in enumerate(STAGES):
        box(axes, x, STAGE_Y - 0.6, WIDTH, 1.2, "#ffd9a8" if x in LEARNT else "#f4f7fb")
        axes.text(x + WIDTH / 2, STAGE_Y + 0.3, title, ha="center", va="center", fontsize=9.5, weight="bold")
        axes.text(x + WIDTH / 2, STAGE_Y - 0.28, detail, ha="center", va="center", fontsize=7.6, linespacing=1.2)
        if x:
            arrow(axes, (x - GAP, STAGE_Y), (x, STAGE_Y))
    cached = 3 + WIDTH / 2
    box(axes, 2, CACHE_Y - 0.24, 1 + WIDTH, 0.48, "#f4f7fb")
    axes.text(3 - GAP / 2, CACHE_Y, "cached latents (safetensors)", ha="center", va="center", fontsize=8.5)
    arrow(axes, (2 + WIDTH / 2, STAGE_Y + 0.6), (2 + WIDTH / 2, CACHE_Y - 0.24))
    arrow(axes, (cached, CACHE_Y - 0.24), (cached, STAGE_Y + 0.6))
    for number, (label, colour, spans) in enumerate(BANDS):
        y = BANDS_Y - number * (BAND_HEIGHT + 0.1)
        axes.text(-0.06, y + BAND_HEIGHT / 2, label, ha="right", va="center", fontsize=8.5, style="italic")
        for first, last, text in spans:
            box(axes, first, y, last - first + WIDTH, BAND_HEIGHT, colour, colour)
            axes.text((first + last + WIDTH) / 2, y + BAND_HEIGHT / 2, text, ha="center", va="center", fontsize=8)
    axes.set(xlim=(-0.82, 6.93), ylim=(-0.1, 4.65))
    axes.axis("off")


def main(out: str) -> None:
    figure, axes = pyplot.subplots(figsize=(8, 3.1))
    figure.subplots_adjust(0, 0, 1, 1)
    draw(axes)
    figure.savefig(out, dpi=200)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/data_flow.py PICTURE.png")
    main(sys.argv[1])
