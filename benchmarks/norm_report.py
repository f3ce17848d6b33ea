"""Bytes that the norms of a DiT block move: Inductor's generated kernels against the least possible.

    python -m benchmarks.norm_report

Between two layers of a block there are the gated residual of one branch, then the norm and modulation of the next:

    x' = x + gate * y        h = LayerNorm(x') * (1 + scale) + shift        [DiT, arXiv:2212.09748, section 3.2]

Forward reads x, y and writes x', h: 4 passes over [b, n, d]. Backward reads the gradients of h and x', and x', y, and
writes the gradients of x and y: 6 passes, if it sums those of gate, shift and scale over tokens on the way. Inductor
counts the bytes of the buffers that each generated kernel reads and writes. There are no matrix products here, so
nothing is missing from that count.
"""

import logging

import torch
import torch.nn.functional as F

LEAST = {"forward": 4, "backward": 6}


def between_layers(x, y, gate, shift, scale):
    """(x', h) in plain PyTorch."""
    x = x + gate[:, None] * y
    return x, F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def count(size: tuple[int, int, int] = (2, 512, 1024), dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Passes over [b, n, d] that Inductor's kernels make, forward and backward."""
    from torch._inductor import compile_fx, config, metrics

    compile_fx.inductor_metrics_log.setLevel(logging.INFO)  # it counts only where it would log

    b, _, d = size
    inputs = [torch.randn(s, dtype=dtype, requires_grad=True) for s in (size, size, (b, d), (b, d), (b, d))]
    one_pass, passes = torch.Size(size).numel() * dtype.itemsize, {}
    with config.patch(force_disable_caches=True):
        metrics.reset()
        outputs = torch.compile(between_layers, fullgraph=True)(*inputs)
        passes["forward"] = metrics.num_bytes_accessed / one_pass
        metrics.reset()
        torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])
        passes["backward"] = metrics.num_bytes_accessed / one_pass
    return passes


def main() -> None:
    print(f"{'':10}{'Inductor':>10}{'least':>8}   passes over [b, n, d]")
    for direction, passes in count().items():
        print(f"{direction:10}{passes:10.2f}{LEAST[direction]:8}")


if __name__ == "__main__":
    main()
