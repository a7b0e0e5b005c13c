"""What a run of hierarchical self-supervision shows while it trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from ignite.engine import Engine
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dissect_monai.contrast import LEVELS, retrieval_accuracy
from dissect_monai.figures import show_mask, view_figure
from dissect_monai.hssl import HSSLOutput
from dissect_monai.metrics import effective_rank, feature_std
from dissect_monai.monitors import NUM_PICTURES, Monitor
from dissect_monai.views import HierarchyTarget

MIN_SIDE, GAP = 192, 4  # pixels: of a tile, in which anatomy can be recognised, and between two


class HSSLMonitor(Monitor):
    """Writes every loss term, retrieval, accuracy, collapse indicators and the views; stops a run that is lost.

    Arguments and errors are those of `Monitor`; the network is an `HSSLNet`. Over several processes all must attach it,
    as the contrasts are those of the joined batch; all else is of the writing process alone. The picture `views` has
    a row per item: the first view as it is and as the network sees it, the masked voxels blue, then the second view.
    """

    spread = "collapse/feature_std"
    spread_of = "pooled bottleneck's standard deviation"
    # The pooled features of a SegResNet share most of their direction, which `feature_std` does not subtract: it is
    # about 0.07 at the start, and runs that end at 0.2 and more first pass through 0.013.
    collapsed_std = 0.001
    remedy = "Lower --learning_rate, lengthen --warmup_epochs, enlarge --batch_size or raise --reconstruction_weight."

    def _indicators(self, output: HSSLOutput, target: HierarchyTarget) -> dict[str, Tensor]:
        logits = (output.task_logits, output.group_logits)
        levels = level_metrics(output.embeddings, logits, (target.task, target.group))
        return {
            **{f"batch/{name}": value for name, value in levels.items()},
            "collapse/feature_std": feature_std(output.embedding),
            "collapse/effective_rank": effective_rank(output.embedding),
        }

    def _draw(self, engine: Engine, writer: SummaryWriter) -> None:
        seen, target = engine.state.output["image"], engine.state.output["label"]
        num_items = len(target.task)
        shown = [slice(start, start + min(NUM_PICTURES, num_items)) for start in (0, num_items)]
        inputs = show_mask(seen, target.masked)
        columns = [images[view] for view in shown for images in (target.views, inputs)]
        writer.add_image("views", view_figure(columns, MIN_SIDE, GAP, slices=True), engine.state.epoch)


def level_metrics(
    embeddings: Sequence[Tensor], logits: Sequence[Tensor], labels: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Retrieval at every level, and accuracy of the classifiers of task and group.

    An image must find its other view. For task and group the first views alone are compared, where the other view would
    be too easy an answer, and the first views alone are classified.

    Args:
        embeddings: of the image, task and group level, each (2·B, D): all first views, then all second ones.
        logits: of task and group, each (2·B, number of classes) in that order.
        labels: task and group, each (B,), int64.

    Returns:
        scalars in [0, 1]: `retrieval_image`, `retrieval_task`, `retrieval_group`, `accuracy_task`, `accuracy_group`;
        a single item has no task or group to find.
    """
    num_items = len(labels[0])
    image = torch.arange(num_items, device=embeddings[0].device).repeat(2)
    metrics = {"retrieval_image": retrieval_accuracy(embeddings[0], image)}
    for level, embedding, label in zip(LEVELS[1:], embeddings[1:], labels, strict=True):
        if num_items > 1:
            metrics[f"retrieval_{level}"] = retrieval_accuracy(embedding[:num_items], label)
    for level, logit, label in zip(LEVELS[1:], logits, labels, strict=True):
        metrics[f"accuracy_{level}"] = (logit[:num_items].argmax(1) == label).float().mean()
    return metrics
