"""The tabletop suite: MuJoCo environments after Language Table (Lynch et al., 2022), registered with Gymnasium.

    import envs, gymnasium
    env = gymnasium.make("tabletop/BlockToBlock-v0", image_size=64, split="train", variant="default")

Importing this package loads neither MuJoCo nor OpenGL; `gymnasium.make` does.
"""

import gymnasium

# Family (the word used in configs and data sets) to the versioned id.
FAMILIES = {
    "reach": "tabletop/Reach-v0",
    "block_to_block": "tabletop/BlockToBlock-v0",
    "block_to_absolute": "tabletop/BlockToAbsolute-v0",
    "block_to_side": "tabletop/BlockToSide-v0",
    "block_to_relative": "tabletop/BlockToRelative-v0",
    "separate_blocks": "tabletop/SeparateBlocks-v0",
}

for _family, _id in FAMILIES.items():
    if _id not in gymnasium.registry:
        gymnasium.register(_id, entry_point="envs.tabletop:TabletopEnv", kwargs={"family": _family})

import envs.gripper  # noqa: E402, F401  registers its environments too
