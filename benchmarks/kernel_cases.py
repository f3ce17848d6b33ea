"""Calls of the flow-matching kernels that a configuration can make, as cases to compile: see kernel_report.py."""

import dataclasses
import functools
import itertools

import torch
from flperf_kernels.flow_matching import LOSSES
from flperf_kernels.flow_matching_reference import LossArguments, NoiseArguments
from flperf_kernels.flow_matching_triton import loss_launch, noise_launch
from flperf_kernels.launching import Launch

REFERENCE_SIZE = (8, 4096, 1024)  # b, n, d


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op, by all that chooses its specialisation."""

    op: str  # noise | loss
    latents: torch.dtype = torch.bfloat16
    other: torch.dtype = torch.bfloat16  # the dtype of x_tau, or of the prediction
    per_channel: bool = False
    norm: str = "none"
    loss: str = "mse"
    weighted: bool = False
    training: bool = True
    size: tuple[int, int, int] = REFERENCE_SIZE

    def __str__(self):
        short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
        words = [self.op, *([self.loss] if self.op == "loss" else []), f"{short[self.latents]}>{short[self.other]}"]
        words += [self.norm] * (self.norm != "none") + ["standardise"] * self.per_channel + ["weighted"] * self.weighted
        return " ".join(
            words + ["value only"] * (not self.training) + [f"d={self.size[2]}"] * (self.size != REFERENCE_SIZE)
        )

    def launch(self) -> Launch:
        """The launch of this call, on tensors without memory."""
        b, n, d = self.size
        latents, other = (torch.empty(self.size, dtype=t, device="meta") for t in (self.latents, self.other))
        vector = functools.partial(torch.empty, device="meta")
        sample, mean = vector(b, dtype=torch.int64), vector(d) if self.per_channel else None
        if self.op == "noise":
            noise = NoiseArguments(latents, vector(b), sample, 1234, mean, mean, self.norm, 1e-6, self.other)
            return noise_launch(noise, other)
        weight, gradient = vector(b) if self.weighted else None, other if self.training else None
        loss = LossArguments(
            other, latents, sample, 1234, self.loss, mean, mean, self.norm, 1e-6, weight, "sample", 1.0, self.training
        )
        return loss_launch(loss, gradient, gain=0.5, gradient_gain=0.5)

    @property
    def bytes_bound(self) -> int:
        """Each input read once, each output written once."""
        return self.latents.itemsize + self.other.itemsize * (2 if self.op == "loss" and self.training else 1)


# bf16 encoders with bf16 or fp32 heads; cached latents in fp32 or fp16; fp16 training.
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = ((BF16, BF16), (FP32, BF16), (FP16, BF16), (BF16, FP32), (FP32, FP32), (FP16, FP16))
# ViT-L divides into the tiles. ViT-B with an odd number of tokens doesn't, nor does ViT-g, which a norm pads to the
# next power of two.
SIZES = (REFERENCE_SIZE, (4, 1569, 768), (2, 2048, 1408))
PREPARATIONS = ((False, "none"), (True, "none"), (False, "l2"), (False, "layer"), (True, "l2"), (True, "layer"))


def headline() -> list[Case]:
    """The cases of usual training: bf16, at the reference size."""
    cases = [Case("noise", per_channel=per_channel, norm=norm) for per_channel, norm in PREPARATIONS]
    cases += [Case("loss", per_channel=per_channel, norm=norm) for per_channel, norm in PREPARATIONS]
    cases += [Case("loss", loss=loss, per_channel=True) for loss in ("l1", "smooth_l1")]
    return cases + [Case("loss", per_channel=True, training=False)]


def every() -> list[Case]:
    """The full product of the fields of `Case`."""
    cases = []
    for (per_channel, norm), (latents, other), size in itertools.product(PREPARATIONS, DTYPES, SIZES):
        cases.append(Case("noise", latents, other, per_channel, norm, size=size))
        for loss, weighted, training in itertools.product(LOSSES, (False, True), (False, True)):
            cases.append(Case("loss", latents, other, per_channel, norm, loss, weighted, training, size))
    return cases


def covering(cases: list[Case]) -> list[Case]:
    """A few of the cases in which every pair of their choices occurs, chosen greedily."""
    pairs = {case: set(itertools.combinations(dataclasses.asdict(case).items(), 2)) for case in cases}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs[case] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen
