"""What happens to a batch before and after the LAPA policy: batching, device, statistics of action and state."""

from collections.abc import Mapping
from typing import Any

import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.processor import PolicyAction, PolicyProcessorPipeline, make_default_pre_post_processors

from policies.lapa.configuration_lapa import LapaConfig

STATISTICS = {
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}


def missing_statistics(
    features: Mapping[str, PolicyFeature],
    normalization: Mapping[FeatureType, NormalizationMode],
    statistics: Mapping[str, Mapping[str, Any]] | None,
) -> dict[str, list[str]]:
    """What the normalisation of each feature needs and has not; LeRobot's normaliser passes raw numbers on there."""
    missing = {}
    for key, feature in features.items():
        known = (statistics or {}).get(key, {})
        wanted = STATISTICS.get(normalization.get(feature.type, NormalizationMode.IDENTITY), ())
        if lacking := [name for name in wanted if name not in known]:
            missing[key] = lacking
    return missing


def make_lapa_pre_post_processors(
    config: LapaConfig,
    dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None,
    dataset_meta: Any | None = None,
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """Pipelines for a new policy; `task` strings pass through, the policy reads them itself.

    Raises ValueError where the statistics of what is normalised (action, state) are missing, which LeRobot's normaliser
    would skip.
    """
    if dataset_stats is None and dataset_meta is not None:
        dataset_stats = dataset_meta.stats
    features = (config.input_features or {}) | (config.output_features or {})
    normalization = {FeatureType(kind): mode for kind, mode in config.normalization_mapping.items()}
    for key, missing in missing_statistics(features, normalization, dataset_stats).items():
        raise ValueError(
            f"the {key} statistics {missing} are missing, the policy would work in wrong units: pass "
            "dataset_stats=dataset.meta.stats, or pretrained_path=<policy folder> to load saved ones"
        )
    return make_default_pre_post_processors(config, dataset_stats, normalizer_device=config.device)
