"""The linear probe on features whose classes are separable."""

import torch

from flperf.data.samplers import ClipBatch
from flperf.evaluation.probe import PooledLatents, probe_accuracies


def test_a_probe_separates_classes_and_fails_on_their_opposites():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    features = torch.randn(40, 3, generator=generator) + 10.0 * (2 * labels - 1)[:, None]
    training, held_out = (labels[:20], features[:20]), features[20:]
    accuracies = probe_accuracies(training, (labels[20:], {"target": held_out, "opposite": -held_out}))
    assert accuracies == {"target": 1.0, "opposite": 0.0, "chance": 0.5}


def test_pooled_latents_are_means_of_the_valid_clips():
    pooled, latents = PooledLatents(), torch.randn(3, 2, 1, 2, 4)
    valid, rows = torch.tensor([True, False, True]), torch.arange(3)
    pooled.add({"target": latents, "copy_last": latents[:, :1]}, ClipBatch(rows % 2, rows, rows, valid))
    pooled.add({"target": latents, "copy_last": latents[:, :1]}, ClipBatch(rows + 5, rows, rows, ~valid))
    labels, features = pooled.gathered()
    assert labels.tolist() == [0, 0, 6]
    torch.testing.assert_close(features["target"], latents[[0, 2, 1]].mean((1, 2, 3)))
    torch.testing.assert_close(features["copy_last"], latents[[0, 2, 1], 0].mean((1, 2)))
