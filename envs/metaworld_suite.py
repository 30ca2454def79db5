"""Meta-World (Yu et al., 2019, arXiv 1910.10897; version 3) as `lapa demos` and `lapa evaluate` see it.

env=metaworld/push-v3    env=metaworld/mt10    env=metaworld/mt50    (env=metaworld is mt10)
"""

from typing import Any

# Meta-World names its tasks and has no sentences for them.
INSTRUCTIONS = {
    "assembly-v3": "put the ring on the peg",
    "basketball-v3": "drop the ball into the basket",
    "bin-picking-v3": "move the cube from one bin to the other",
    "box-close-v3": "put the lid on the box",
    "button-press-topdown-v3": "press the button from above",
    "button-press-topdown-wall-v3": "press the button from above, behind the wall",
    "button-press-v3": "press the button",
    "button-press-wall-v3": "press the button behind the wall",
    "coffee-button-v3": "press the button of the coffee machine",
    "coffee-pull-v3": "pull the mug away from the coffee machine",
    "coffee-push-v3": "push the mug under the coffee machine",
    "dial-turn-v3": "turn the dial",
    "disassemble-v3": "take the ring off the peg",
    "door-close-v3": "close the door",
    "door-lock-v3": "lock the door",
    "door-open-v3": "open the door",
    "door-unlock-v3": "unlock the door",
    "drawer-close-v3": "close the drawer",
    "drawer-open-v3": "open the drawer",
    "faucet-close-v3": "close the faucet",
    "faucet-open-v3": "open the faucet",
    "hammer-v3": "hammer the nail into the wall",
    "hand-insert-v3": "put the hand into the hole",
    "handle-press-side-v3": "press the handle down from the side",
    "handle-press-v3": "press the handle down",
    "handle-pull-side-v3": "pull the handle up from the side",
    "handle-pull-v3": "pull the handle up",
    "lever-pull-v3": "pull the lever up",
    "peg-insert-side-v3": "insert the peg into the hole from the side",
    "peg-unplug-side-v3": "pull the peg out of the hole",
    "pick-out-of-hole-v3": "lift the puck out of the hole to the goal",
    "pick-place-v3": "pick up the puck and hold it at the goal",
    "pick-place-wall-v3": "carry the puck over the wall to the goal",
    "plate-slide-back-side-v3": "slide the plate sideways out of the cabinet",
    "plate-slide-back-v3": "slide the plate back out of the cabinet",
    "plate-slide-side-v3": "slide the plate sideways into the cabinet",
    "plate-slide-v3": "slide the plate into the cabinet",
    "push-back-v3": "push the puck back to the goal",
    "push-v3": "push the puck to the goal",
    "push-wall-v3": "push the puck around the wall to the goal",
    "reach-v3": "reach the goal",
    "reach-wall-v3": "reach the goal behind the wall",
    "shelf-place-v3": "put the cube on the shelf",
    "soccer-v3": "push the ball into the soccer goal",
    "stick-pull-v3": "pull the thermos with the stick",
    "stick-push-v3": "push the thermos with the stick",
    "sweep-into-v3": "sweep the cube into the hole",
    "sweep-v3": "sweep the cube off the table",
    "window-close-v3": "close the window",
    "window-open-v3": "open the window",
}

TASKS = tuple(INSTRUCTIONS)
GROUPS = {
    "mt10": (
        "reach-v3",
        "push-v3",
        "pick-place-v3",
        "door-open-v3",
        "drawer-open-v3",
        "drawer-close-v3",
        "button-press-topdown-v3",
        "peg-insert-side-v3",
        "window-open-v3",
        "window-close-v3",
    ),
    "mt50": TASKS,
}
DEFAULT_TASKS = GROUPS["mt10"]
UNDERSTOOD = frozenset(("action_repeat", "action_noise_share"))
STATE_NAMES = ("x", "y", "z", "gripper")
ACTION_NAMES = ("dx", "dy", "dz", "gripper")
HAS_EXPERT = True
ACTION_REPEAT = 4


def make_env(task: str, image_size: int, action_repeat: int = 0) -> Any:
    """A MetaWorldEnv; action_repeat 0 is ACTION_REPEAT. ValueError with the install command without Meta-World."""
    try:
        from envs.metaworld_env import MetaWorldEnv
    except ModuleNotFoundError:
        raise ValueError(
            "env=metaworld needs the package metaworld: pip install 'lerobot_policy_lapa[metaworld]'"
        ) from None
    return MetaWorldEnv(task, image_size, action_repeat or ACTION_REPEAT)
