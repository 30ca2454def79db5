"""`lapa demos`: scripted experts act; their successful episodes become LeRobotDataset v3 folders.

output_dir/
    demos/          frames, states, actions, instructions
    video/          the same episodes as video and instructions alone (cfg.video)
    mp4/            the same as one file an episode, with clips.csv (cfg.mp4)
    episodes.jsonl  family (the task), seed, instruction and failed attempts of every episode
    demos.json      the options and the results; written last
"""

import csv
import json
import shutil
from concurrent.futures import as_completed
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from envs.dataset import Shard, read_shard, write_dataset
from envs.shards import ShardOptions, write_shard
from envs.suites import choose, load_suite
from envs.workers import worker_pool

# What a folder that is older than these options was made with.
NEWER_OPTIONS = {"play": False, "suite": "tabletop", "action_noise_share": 0.0, "action_repeat": 0}


def run(cfg) -> dict:
    """Write the demonstrations that `cfg` (lapa.schema.DemosConfig) asks for.

    Episode i is of task i modulo their number and starts from seed cfg.seed + i, so the tasks are balanced and
    the same options give the same episodes for any number of workers. Goes on where a killed run stopped.
    Play (cfg.play) comes without instructions; episodes.jsonl alone knows what its goals were.

    Returns num_episodes, num_frames, mean_episode_frames, num_failed_attempts (by the experts, repeated with
    another seed) and num_skipped (episodes whose every attempt failed).

    Raises:
        ValueError: for an unknown task, a suite without experts, or no episodes asked for.
    """
    suite, tasks = choose(cfg)
    understood = load_suite(suite).UNDERSTOOD
    if not load_suite(suite).HAS_EXPERT:
        raise ValueError(
            f"env={cfg.env} has no scripted expert: take demonstrations that people recorded, as a LeRobotDataset, "
            "and give its folder to `lapa finetune data=`"
        )
    if cfg.num_episodes < 1:
        raise ValueError(f"num_episodes is {cfg.num_episodes}, expected at least 1")
    options = ShardOptions(
        families=tasks,
        num_episodes=cfg.num_episodes,
        seed=cfg.seed,
        split=cfg.split,
        image_size=cfg.image_size,
        num_blocks=(cfg.num_blocks_min, cfg.num_blocks_max),
        variant=cfg.variant,
        action_noise_m=cfg.action_noise_m if "action_noise_m" in understood else 0.0,
        mp4=cfg.mp4,
        play=cfg.play,
        suite=suite,
        action_repeat=cfg.action_repeat,
        action_noise_share=cfg.action_noise_share if "action_noise_share" in understood else 0.0,
    )
    output_dir = Path(cfg.output_dir).expanduser()
    # As JSON gives them back.
    written_options = json.loads(json.dumps(asdict(options) | {"video": cfg.video}))
    record_path = output_dir / "demos.json"
    if record_path.is_file():
        record = json.loads(record_path.read_text(encoding="utf-8"))
        if NEWER_OPTIONS | record["options"] != written_options:
            raise ValueError(
                f"{output_dir} holds demonstrations with options {record['options']}, asked for are "
                f"{written_options}: choose another output_dir, or delete the folder"
            )
        return record["results"]
    shards = roll_out(output_dir / "shards", options, cfg.num_workers)
    if not any(shard.episodes for shard in shards):
        raise ValueError(f"the experts solved none of {cfg.num_episodes} episodes with {options}")

    wanted = {"demos": True, "video": False} if cfg.video else {"demos": True}
    for name, with_actions in wanted.items():
        if not (output_dir / name).is_dir():
            write_dataset(output_dir / name, shards, cfg.image_size, with_actions, not cfg.play)
    if cfg.mp4:
        write_clips(output_dir / "mp4", shards, not cfg.play)
    write_episodes(output_dir / "episodes.jsonl", shards)
    num_frames = int(sum(shard.lengths.sum() for shard in shards))
    num_episodes = sum(len(shard.episodes) for shard in shards)
    results = {
        "num_episodes": num_episodes,
        "num_frames": num_frames,
        "mean_episode_frames": num_frames / num_episodes,
        "num_failed_attempts": sum(episode["num_failures"] for shard in shards for episode in shard.episodes),
        "num_skipped": sum(len(shard.skipped) for shard in shards),
    }
    write_text(record_path, json.dumps({"options": written_options, "results": results}, indent=2))
    shutil.rmtree(output_dir / "shards")
    return results


def roll_out(folder: Path, options: ShardOptions, num_workers: int) -> list[Shard]:
    """Write the shards that `folder` lacks, and read all of them."""
    folders = [folder / f"shard-{number:05d}" for number in range(options.num_shards)]
    missing = [number for number, path in enumerate(folders) if not path.is_dir()]
    with tqdm(total=options.num_shards, initial=options.num_shards - len(missing), desc="demos", unit="shard") as bar:
        if num_workers <= 1 or len(missing) <= 1:
            for number in missing:
                write_shard(folders[number], options, number)
                bar.update()
        else:
            with worker_pool(min(num_workers, len(missing))) as pool:
                jobs = [pool.submit(write_shard, folders[number], options, number) for number in missing]
                for job in as_completed(jobs):
                    job.result()
                    bar.update()
    return [read_shard(path, options) for path in folders]


def write_clips(folder: Path, shards: list[Shard], with_instructions: bool = True) -> None:
    """Plain mp4 files and clips.csv (path, caption, lab, family), as `lapa ingest` reads them."""
    folder.mkdir(exist_ok=True)
    partial = folder / "clips.csv.partial"
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption", "lab", "family"])
        for shard in shards:
            for episode in shard.episodes:
                name = f"episode_{episode['index']:06d}.mp4"
                shutil.copyfile(shard.folder / name, folder / name)
                caption = episode["instruction"] if with_instructions else ""
                writer.writerow([name, caption, shard.body.robot_type, episode["family"]])
    partial.replace(folder / "clips.csv")


def write_episodes(path: Path, shards: list[Shard]) -> None:
    lines = [
        json.dumps(episode | {"num_frames": int(length)})
        for shard in shards
        for episode, length in zip(shard.episodes, shard.lengths, strict=True)
    ]
    write_text(path, "\n".join(lines) + "\n")


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
