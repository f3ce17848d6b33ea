"""A linear probe: can the class of a video still be read from its forecast latents?

A linear classifier is trained on the true target latents of training clips, averaged over frames and positions, and
applied to the true and the forecast latents of validation clips. Its accuracy on the true latents is an upper bound;
on the last context latent, repeated, it needs no forecast.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from flperf.data.samplers import ClipBatch
from flperf.run import Run


def training_features(run: Run) -> tuple[Tensor, Tensor]:
    """Labels int64 [n] and pooled true target latents fp32 [n d] of the first `evaluation.probe_clips` training clips,
    gathered from all processes. Of several sources they are the first of each, in the proportions of the mixture."""
    pooled, process = PooledLatents(), run.process
    clips = run.dataset.training_sampler.first_clips(run.config.evaluation.probe_clips)
    mine = clips[process.rank :: process.world_size]
    for batch in run.dataset.chosen_batches([mine], run.share.micro_batch_size, "train", process.device):
        _, target = run.latents(batch)
        pooled.add({"target": target.float()}, batch)
    labels, features = pooled.gathered()
    return labels, features["target"]


def probe_accuracies(training: tuple[Tensor, Tensor], validation: tuple[Tensor, dict[str, Tensor]]) -> dict[str, float]:
    """Train a probe and apply it.

    `training` is labels [n] and features [n d], `validation` labels [m] and features [m d] by name. Returns the top-1
    accuracy by name, and as `chance` that of always predicting the most frequent class of the training clips.
    """
    labels, features = training
    true_labels, by_name = validation
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(features.numpy(), labels.numpy())
    accuracies = {name: probe.score(pooled.numpy(), true_labels.numpy()) for name, pooled in by_name.items()}
    return accuracies | {"chance": (true_labels == labels.mode().values).double().mean().item()}


def probe_summary(accuracies: dict[str, float]) -> str:
    """The accuracies as one line of text."""
    return "linear probe, top-1: " + ", ".join(
        f"{name.replace('_', ' ')} {value:.1%}" for name, value in accuracies.items()
    )


def has_classes(labels: list[int]) -> bool:
    """Whether there are at least two classes to tell apart."""
    return len(set(labels)) > 1


@dataclass
class PooledLatents:
    """An observer that averages the latents of each valid clip over frames and positions, as features of a probe."""

    labels: list[Tensor] = field(default_factory=list)
    features: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, latents: dict[str, Tensor], batch: ClipBatch) -> None:
        """Add a batch: latents `b t h w d` by name, such as "forecast" or "target"."""
        valid = batch.valid.cpu()
        self.labels.append(batch.label[valid])
        for name, values in latents.items():
            self.features.setdefault(name, []).append(values.mean((1, 2, 3)).float().cpu()[valid])

    def gathered(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Labels [n] and features [n d] by name, of all processes, on the CPU."""
        mine = torch.cat(self.labels), {name: torch.cat(parts) for name, parts in self.features.items()}
        everyone: list = [mine]
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        labels = torch.cat([labels for labels, _ in everyone])
        return labels, {name: torch.cat([features[name] for _, features in everyone]) for name in mine[1]}
