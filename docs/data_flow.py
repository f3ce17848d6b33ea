"""Draws the README's picture of the data flow: `python docs/data_flow.py docs/data_flow.png`."""

import sys

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

BOXES = {  # name → (x, y of the centre, text, whether it learns)
    "files": (0.9, 2.0, "video files\nshapes", False),
    "decoder": (3.0, 2.0, "DALI (NVDEC)\nor PyAV:\ndecode, resize, crop", False),
    "encoder": (5.3, 2.0, "frozen encoder,\ncompiled: V-JEPA 2,\nDINOv3, 4DS", False),
    "cache": (3.0, 0.5, "cached latents\n(safetensors)", False),
    "latents": (7.6, 1.25, "latents\nb t h w d,\nstandardised:\ncontext | target", False),
    "trivial": (9.9, 0.2, "trivial forecasts:\nlast, mean, median,\nridge", False),
    "head": (9.9, 2.0, "predictor,\ncross-attention\nor DiT", True),
    "objective": (9.9, 3.4, "regression or flow\nmatching (Triton)", False),
    "engine": (12.2, 3.4, "DeepSpeed ZeRO,\nbf16: checkpoints", False),
    "judge": (12.2, 1.1, "forecasts\nand their skill", False),
}
ARROWS = [
    *(("files", "decoder"), ("decoder", "encoder"), ("encoder", "latents"), ("encoder", "cache"), ("cache", "latents")),
    *(
        ("latents", "head"),
        ("latents", "trivial"),
        ("objective", "head"),
        ("objective", "engine"),
        ("head", "judge"),
        ("trivial", "judge"),
    ),
]


def draw(axes: Axes) -> None:
    styles = {
        learns: {"boxstyle": "round,pad=0.4", "fc": colour, "ec": "0.3"}
        for learns, colour in ((False, "#eef3fa"), (True, "#ffe3c2"))
    }
    texts = {
        name: axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=styles[learns])
        for name, (x, y, text, learns) in BOXES.items()
    }
    for start, end in ARROWS:
        arrow = {"arrowstyle": "-|>", "color": "0.3", "shrinkA": 2, "shrinkB": 2}
        axes.annotate(
            "",
            xy=BOXES[end][:2],
            xytext=BOXES[start][:2],
            arrowprops=arrow | {"patchA": texts[start].get_bbox_patch(), "patchB": texts[end].get_bbox_patch()},
        )
    axes.set(xlim=(0, 13.3), ylim=(-0.5, 4))
    axes.axis("off")


def main(out: str) -> None:
    figure, axes = pyplot.subplots(figsize=(12, 4), layout="constrained")
    draw(axes)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/data_flow.py PICTURE.png")
    main(sys.argv[1])
