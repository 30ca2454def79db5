import pytest

from policies.finetune import save_policy
from policies.lapa.processor_lapa import make_lapa_pre_post_processors
from tests.policies.test_lapa_policy import STATISTICS, new_policy


@pytest.fixture
def policy_folder(tmp_path):
    """A LAPA policy of random weights that moves 2 numbers, saved as `lapa finetune` does."""
    policy = new_policy()
    folder = tmp_path / "policy"
    folder.mkdir()
    save_policy(folder, policy, *make_lapa_pre_post_processors(policy.config, STATISTICS))
    return folder
