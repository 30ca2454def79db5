"""The gripper suite: pick, place and stack with two fingers, registered with Gymnasium.

    import envs, gymnasium
    env = gymnasium.make("gripper/Stack-v0", image_size=64, split="train", variant="default")

Importing this package loads neither MuJoCo nor OpenGL; `gymnasium.make` does.
"""

import gymnasium

FAMILIES = {"pick": "gripper/Pick-v0", "place": "gripper/Place-v0", "stack": "gripper/Stack-v0"}

for _family, _id in FAMILIES.items():
    if _id not in gymnasium.registry:
        gymnasium.register(_id, entry_point="envs.gripper.env:GripperEnv", kwargs={"family": _family})
