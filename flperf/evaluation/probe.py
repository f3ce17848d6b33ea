"""A linear probe: do forecast latents still say what a video shows?

It is trained on the true target latents of training clips, averaged over frames and places, and applied to those of
validation clips and of their forecasts. Accuracy on the true ones is the upper bound; on the copied last context
latent, what needs no forecast.
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
    """labels [n] and pooled true target latents [n d] of the first `evaluation.probe_clips` training clips, of all
    processes."""
    pooled, process = PooledLatents(), run.process
    count = min(run.config.evaluation.probe_clips, run.dataset.train_size)
    mine = range(process.rank, count, process.world_size)
    for batch in run.dataset.chosen_batches([mine], run.share.micro_batch_size, "train", process.device):
        _, target = run.latents(batch)
        pooled.add({"target": target.float()}, batch)
    labels, features = pooled.gathered()
    return labels, features["target"]


def probe_accuracies(training: tuple[Tensor, Tensor], validation: tuple[Tensor, dict[str, Tensor]]) -> dict[str, float]:
    """Top-1 accuracy by whose latents were probed, and `chance`: that of always naming the commonest class of the
    training clips."""
    labels, features = training
    true_labels, by_name = validation
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(features.numpy(), labels.numpy())
    accuracies = {name: probe.score(pooled.numpy(), true_labels.numpy()) for name, pooled in by_name.items()}
    return accuracies | {"chance": (true_labels == labels.mode().values).double().mean().item()}


def probe_summary(accuracies: dict[str, float]) -> str:
    """One line of top-1 accuracies."""
    return "linear probe, top-1: " + ", ".join(
        f"{name.replace('_', ' ')} {value:.1%}" for name, value in accuracies.items()
    )


def has_classes(labels: list[int]) -> bool:
    return len(set(labels)) > 1


@dataclass
class PooledLatents:
    """Latents of every valid clip averaged over places and frames, by whose forecast they are ("target": the truth),
    for probes."""

    labels: list[Tensor] = field(default_factory=list)
    features: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, latents: dict[str, Tensor], batch: ClipBatch) -> None:
        """latents by whose forecast they are, `b t h w d` each."""
        valid = batch.valid.cpu()
        self.labels.append(batch.label[valid])
        for name, values in latents.items():
            self.features.setdefault(name, []).append(values.mean((1, 2, 3)).float().cpu()[valid])

    def gathered(self) -> tuple[Tensor, dict[str, Tensor]]:
        """labels [n] and features [n d] by name, of all processes."""
        mine = torch.cat(self.labels), {name: torch.cat(parts) for name, parts in self.features.items()}
        everyone = [mine]
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        labels = torch.cat([labels for labels, _ in everyone])
        return labels, {name: torch.cat([features[name] for _, features in everyone]) for name in mine[1]}
