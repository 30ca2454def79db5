"""What is finetuned on: trajectories picked and labelled, as data sets, and as proposals for `lapa replay`."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np

from lapa.text import words_of


def relabel(data: Path, labels: dict[int, str], folder: Path) -> None:
    """The episodes of a LeRobotDataset that `labels` names, with their new instructions, as a data set of its own."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from lerobot.datasets.dataset_tools import delete_episodes, modify_tasks
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    source = LeRobotDataset(data.name, root=data, video_backend="pyav")
    dropped = sorted(set(range(source.meta.total_episodes)) - set(labels))
    logging.disable(logging.INFO)  # LeRobot's tools tell every step and every instruction
    try:
        if dropped:
            picked = delete_episodes(source, dropped, output_dir=temporary, repo_id=folder.name)
        else:
            shutil.copytree(data, temporary)
            picked = LeRobotDataset(folder.name, root=temporary, video_backend="pyav")
        modify_tasks(picked, episode_tasks=dict(enumerate(labels[episode] for episode in sorted(labels))))
    finally:
        logging.disable(logging.NOTSET)
    temporary.replace(folder)


def write_proposals(path: Path, labels: dict[int, str], candidates: dict[int, list[np.ndarray]] | None) -> None:
    """One line an episode, as `lapa replay` reads them; without candidates, for a policy to act."""
    rows = []
    for episode in sorted(labels):
        row: dict = {"episode": episode, "instruction": labels[episode]}
        if candidates is not None:
            row["candidates"] = [np.round(actions, 6).tolist() for actions in candidates[episode]]
        rows.append(json.dumps(row) + "\n")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(rows), encoding="utf-8")
    temporary.replace(path)


def slot_accuracy(labels: list[str], truths: list[str], slots: dict[str, list[str]]) -> dict[str, float]:
    """Share of labels with the same word as the truth in each slot, and in all of them.

    slots: by name, the words that can fill it; where the truth has none of them, the slot is not counted.
    """
    right: dict[str, list[bool]] = {name: [] for name in [*slots, "all_slots"]}
    for label, truth in zip(labels, truths, strict=True):
        of_label, of_truth = (
            {name: [word for word in words_of(text) if word in words] for name, words in slots.items()}
            for text in (label, truth)
        )
        told = [name for name in slots if of_truth[name]]
        for name in told:
            right[name].append(of_label[name] == of_truth[name])
        if told:
            right["all_slots"].append(all(of_label[name] == of_truth[name] for name in told))
    return {name: float(np.mean(hits)) for name, hits in right.items() if hits}
