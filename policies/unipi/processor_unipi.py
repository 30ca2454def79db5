"""What happens to a batch before and after the UniPi policy: batching, device, the inverse model's statistics."""

from typing import Any

import torch
from lerobot.processor import PolicyAction, PolicyProcessorPipeline, make_default_pre_post_processors
from lerobot.utils.constants import ACTION

from policies.unipi.configuration_unipi import UnipiConfig


def make_unipi_pre_post_processors(
    config: UnipiConfig,
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
    missing = [name for name in ("mean", "std") if name not in (dataset_stats or {}).get(ACTION, {})]
    if missing:
        raise ValueError(
            f"the action statistics {missing} are missing, the policy would act in wrong units: pass the mean and "
            "standard deviation that the inverse model was trained with"
        )
    return make_default_pre_post_processors(config, dataset_stats, normalizer_device=config.device)
