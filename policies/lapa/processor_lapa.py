"""What happens to a batch before and after the LAPA policy: batching, device, action statistics."""

from typing import Any

import torch
from lerobot.processor import PolicyAction, PolicyProcessorPipeline, make_default_pre_post_processors
from lerobot.utils.constants import ACTION

from policies.lapa.configuration_lapa import LapaConfig


def make_lapa_pre_post_processors(
    config: LapaConfig,
    dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None,
    dataset_meta: Any | None = None,
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """Pipelines for a new policy; `task` strings pass through, the policy reads them itself.

    Raises ValueError where the statistics of the action are missing, which LeRobot's normaliser would skip.
    """
    if dataset_stats is None and dataset_meta is not None:
        dataset_stats = dataset_meta.stats
    action_stats = (dataset_stats or {}).get(ACTION, {})
    missing = [name for name in ("mean", "std") if name not in action_stats]
    if missing:
        raise ValueError(
            f"the action statistics {missing} are missing, the policy would act in wrong units: pass "
            "dataset_stats=dataset.meta.stats, or pretrained_path=<policy folder> to load saved ones"
        )
    return make_default_pre_post_processors(config, dataset_stats, normalizer_device=config.device)
