"""A bundle with random weights, and features for it in which actions come and go.

    BenchModel -> random_bundle -> material

The weights are random, so the features are chosen by what the model makes of them: a quiet one, and
those that let an action of some class begin. Features without a choice would give scores that are
noise, with a border in every snippet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.wire import HrproError
from hrpro.export.bundle import Precision

if TYPE_CHECKING:
    from hrpro.engine.inference import Backend
    from hrpro.export.bundle import Bundle
    from hrpro.training.config import TrainingConfig
    from hrpro.training.model import SnippetModel
    from hrpro.training.run import RunDescription
    from hrpro.training.train import TrainedModel

Floats = NDArray[np.float32]

# How long an action lasts, in snippets.
_ACTION_SNIPPETS = (8, 32)
# Features of which the quietest and the loudest make a stream, each tried in a window full of it.
_CANDIDATES = 32
_CONSTANT_SNIPPETS = 8
# What a class says of them, before the sigmoid; and what the likeliest class says of the quietest:
# the median of what a trained model says of snippets without an action (GTEA, simulated).
_LOGIT_DEVIATION = 4.0
_QUIET_SCORE = 0.013


class BenchError(HrproError):
    """A benchmark cannot be run here; the message says what is missing."""


@dataclass(frozen=True)
class BenchModel:
    """Sizes of a snippet model, as in `hrpro config train`; the attention's band is its default."""

    feature_dim: int = 2048
    classes: int = 20
    size: str = "full"
    attention_past: int = 32
    precision: Precision = "fp32"


def random_bundle(model: BenchModel, target: Path) -> Bundle:
    """Export a model with random weights. Raises BenchError where torch is not installed."""
    try:
        import torch

        from hrpro.export.export import export_bundle
        from hrpro.training.config import ModelConfig, TrainingConfig
        from hrpro.training.run import RunDescription
    except ModuleNotFoundError as error:
        raise BenchError(
            f"hrpro bench: expected the package {error.name}, which makes the model with random "
            "weights: pip install hrpro-stream[train]"
        ) from None

    settings = {"size": model.size, "attention_past": model.attention_past}
    config = TrainingConfig(model=ModelConfig.model_validate(settings))
    description = RunDescription(
        config=config,
        data_set="random weights",
        classes=tuple(f"class{n}" for n in range(model.classes)),
        feature_dim=model.feature_dim,
        recordings=0,
        points=0,
        data_digest="",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trained = _random_model(config, description)
        return export_bundle(description, trained, {}, target, model.precision)


def _random_model(config: TrainingConfig, description: RunDescription) -> TrainedModel:
    """Untrained, but with scores that depend on the features and borders that move."""
    import torch

    from hrpro.training.instance_stage import new_instance_model
    from hrpro.training.snippet_stage import new_snippet_model
    from hrpro.training.train import TrainedModel

    snippet = new_snippet_model(config, description.feature_dim, len(description.classes))
    instance = new_instance_model(config, snippet)
    snippet.eval()
    with torch.no_grad():
        snippet.prototypes.normal_()
        snippet.attend.bias.fill_(2)
        _spread(snippet)
        for head in (instance.heads.score, instance.heads.regress):
            for weight in (*head.parameters(),)[-2:-1]:  # of the last layer
                weight.mul_(4)
    return TrainedModel(snippet, instance.eval())


def _spread(snippet: SnippetModel) -> None:
    """Let the classes tell features apart, and the quietest of some features be of no class."""
    import torch

    candidates = torch.from_numpy(_candidates(snippet.feature_dim))
    windows = candidates[:, None].expand(-1, _CONSTANT_SNIPPETS, -1)
    cas = torch.cat(
        [
            snippet(each[None], torch.ones(1, _CONSTANT_SNIPPETS, dtype=torch.bool)).cas
            for each in windows
        ]
    )
    logits = torch.logit(cas[:, -2])  # (N, C)
    scale = _LOGIT_DEVIATION / logits.std()
    quietest = (scale * logits).max(dim=1).values.min()
    weight, bias = snippet.classify.weight, snippet.classify.bias
    weight.mul_(scale)
    quiet_logit = math.log(_QUIET_SCORE / (1 - _QUIET_SCORE))
    bias.copy_(scale * bias + quiet_logit - quietest)


def _candidates(feature_dim: int) -> Floats:
    random = np.random.default_rng(0)
    return random.standard_normal((_CANDIDATES, feature_dim)).astype(np.float32)


def material(
    bundle: Bundle, backend: Backend, quiet_share: float = 0.5, snippets: int = 2048
) -> Floats:
    """A recording (snippets, D) in which actions come and go, as this bundle sees them.

    ``quiet_share`` of it is without an action, on average.
    """
    random = np.random.default_rng(0)
    D = bundle.manifest.feature_dim
    candidates = _candidates(D)
    highest = np.array([_highest_score(backend, each) for each in candidates])
    order = np.argsort(highest)
    quiet, loud = candidates[order[0]], candidates[order[-_CANDIDATES // 4 :]]
    recording = np.empty((snippets, D), dtype=np.float32)
    at = 0
    while at < snippets:
        action = int(random.integers(*_ACTION_SNIPPETS))
        pause = max(1, round(action * quiet_share / (1 - quiet_share)))
        recording[at : at + pause] = quiet
        recording[at + pause : at + pause + action] = loud[random.integers(len(loud))]
        at += pause + action
    recording += 0.05 * random.standard_normal(recording.shape, dtype=np.float32)
    return recording


def _highest_score(backend: Backend, feature: Floats) -> float:
    """P of the best class, in the middle of a window that holds nothing but this feature (D,)."""
    T = _CONSTANT_SNIPPETS
    window = np.repeat(feature[None, None], T, axis=1)  # (1, T, D)
    scores, _, _ = backend.score_snippets(window, np.ones((1, T), dtype=np.bool_))
    return float(scores[0, -2].max())
