"""Limits of a launch."""

import pytest
import torch
from flow_matching_inputs import batch
from flperf_kernels import philox
from flperf_kernels.flow_matching_triton import loss_launch, noise_launch, scale_launch
from flperf_kernels.residual_norm import backward_launch


@pytest.mark.parametrize("name", ["noise", "loss", "scale", "normal", "residual norm"])
def test_a_batch_that_no_grid_holds_is_refused(name):
    b = 2**16
    x, vector, gate = (torch.empty(shape, device="meta") for shape in ((b, 4, 8), (b,), (b, 8)))
    sample = vector.long()
    inputs = batch((1, 1, 1))
    inputs.latents, inputs.prediction, inputs.tau, inputs.sample = x, x, vector, sample
    launch = {
        "noise": lambda: noise_launch(inputs.noise_arguments("none"), x),
        "loss": lambda: loss_launch(inputs.loss_arguments("none", "mse"), x, 1.0, 1.0),
        "scale": lambda: scale_launch(x, vector, 1.0),
        "normal": lambda: philox.normal_launch(sample, gate, 0),
        "residual norm": lambda: backward_launch(x, x, x, x, gate, gate, 1.0, 1e-6, x, x),
    }[name]()
    with pytest.raises(ValueError, match="CUDA allows at most 65535 samples a batch"):
        launch.run()
