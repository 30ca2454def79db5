"""One Hydra application a stage: compose the configuration, turn it into a dataclass, run the stage."""

import dataclasses
import inspect
import os
import re
import sys
import tempfile
import traceback
from importlib import resources

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lapa import schema
from lapa.cli import STAGES

# Stages write into folders of their own; Hydra shall neither make one nor log into a file.
HYDRA_DEFAULTS = {"hydra.run.dir": ".", "hydra.output_subdir": "null", "hydra/job_logging": "stdout"}


def register_schema() -> None:
    """Store every stage's dataclass and every group's choices where Hydra finds them."""
    store = ConfigStore.instance()
    for verb, stage in STAGES.items():
        store.store(name=f"{verb}_schema", node=getattr(schema, stage.config))
    for group, choices in schema.GROUPS.items():
        for name, node in choices.items():
            store.store(group=group, name=name, node=node)


def launch(verb: str, options: list[str]) -> None:
    """Run one stage with Hydra overrides; a user's mistake ends with its message and exit code 2.

    With --multirun, one stage for every combination of the listed values, one after the other: jobs that are complete
    are skipped, and one that fails is reported at the end while the others go on.
    """
    register_schema()
    given = {option.split("=", 1)[0] for option in options}
    is_multirun = bool({"--multirun", "-m"} & set(options))
    overrides = [option for option in options if "=" in option and not option.startswith("-")]
    flags = [option for option in options if option not in overrides]
    if not is_multirun:
        overrides = [quote_tasks(override) for override in overrides]
    if is_multirun and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # A job that fails in one process would pair it with the next job of the others.
        print("lapa: --multirun and torchrun exclude each other: start the jobs one by one", file=sys.stderr)
        sys.exit(2)
    failures: list[str] = []
    num_jobs = 0

    @hydra.main(version_base="1.3", config_path="pkg://configs", config_name=verb)
    def application(composed: DictConfig) -> None:
        # Imported here, because it brings torch, and neither --help nor --cfg needs that.
        from lapa.stage import run_stage

        nonlocal num_jobs
        num_jobs += 1
        try:
            run_stage(verb, to_dataclass(verb, composed))
        except (ValueError, OSError) as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1" and not is_multirun:
                raise
            report_failure(verb, error)
            if not is_multirun:
                sys.exit(2)
            failures.append(job_name())
        except Exception:
            if not is_multirun:
                raise
            traceback.print_exc()
            failures.append(job_name())

    with tempfile.TemporaryDirectory(prefix="lapa-multirun-") as sweep_dir:
        # Hydra keeps a description of the sweep; each stage's own stage.json says more.
        defaults = HYDRA_DEFAULTS | ({"hydra.sweep.dir": sweep_dir, "hydra.sweep.subdir": "."} if is_multirun else {})
        added = [f"{key}={value}" for key, value in defaults.items() if key not in given]
        sys.argv = [f"lapa {verb}", *overrides, *added, *flags]
        application()
    if failures:
        print(f"lapa {verb}: {len(failures)} of {num_jobs} jobs failed:", file=sys.stderr)
        print("\n".join(f"  {name}" for name in failures), file=sys.stderr)
        print("Their messages are above; the same command runs them again and skips what is complete", file=sys.stderr)
        sys.exit(2)


def quote_tasks(override: str) -> str:
    """`env=suite/task,task` as one text for Hydra, which takes a comma outside quotes for a sweep."""
    return re.sub(r"^((?:\w+\.)*env)=([^'\"\[]*,[^'\"]*)$", r"\1='\2'", override)


def report_failure(verb: str, error: Exception) -> None:
    """Tell a user's mistake without its traceback, or with it where HYDRA_FULL_ERROR asks for it."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(error)
        return
    print(f"lapa {verb}: {error}", file=sys.stderr)
    print("(HYDRA_FULL_ERROR=1 shows the whole traceback)", file=sys.stderr)


def job_name() -> str:
    """The overrides of the job at hand."""
    return " ".join(HydraConfig.get().overrides.task)


def to_dataclass(verb: str, composed: DictConfig):
    """The stage's dataclass; ValueError that names the option where one is missing or of a wrong type."""
    try:
        return OmegaConf.to_object(composed)
    except MissingMandatoryValue as error:
        option = error.full_key or str(error).rsplit(": ", 1)[-1]
        raise ValueError(f"{option} is required: lapa {verb} {option}=...  (lapa {verb} --help lists all)") from None
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from None


def stage_help(verb: str) -> str:
    """What a stage does and every option of it: name, default and comment, read from the schema."""
    config = getattr(schema, STAGES[verb].config)
    lines = [
        f"usage: lapa {verb} [option=value ...]",
        "",
        inspect.cleandoc(config.__doc__ or ""),
        "",
        "options:",
    ]
    lines += _option_lines(config(), "")
    return "\n".join(lines)


def _option_lines(config, prefix: str) -> list[str]:
    comments = _field_comments(type(config))
    choices = {base: names for names in schema.GROUPS.values() for base in _bases(names)}
    lines = []
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if field.type in choices:
            lines.append(f"  {name:<34} one of {' | '.join(choices[field.type])}, each with its options:")
            for choice, title in _presets(choices[field.type]):
                lines.append(f"    {f'{name}={choice}':<32} {title}")
            for choice, node in choices[field.type].items():
                lines.append(f"    {f'{name}={choice}':<32} {inspect.cleandoc(node.__doc__ or '').splitlines()[0]}")
                node_comments = _field_comments(node)
                for option in dataclasses.fields(node):
                    if option.name != "name":
                        default = option.default
                        if option.default_factory is not dataclasses.MISSING:
                            default = option.default_factory()
                        shown = f"{name}.{option.name}={_shown(default)}"
                        lines.append(f"      {shown:<30} {node_comments.get(option.name, '')}".rstrip())
        elif dataclasses.is_dataclass(value):
            lines += _option_lines(value, f"{name}.")
        else:
            lines.append(f"  {f'{name}={_shown(value)}':<34} {comments.get(field.name, '')}".rstrip())
    return lines


def _shown(value) -> str:
    return "required" if value == schema.MISSING else "null" if value is None else str(value)


def _bases(choices: dict[str, type]) -> set[type]:
    """The classes that a field of the group may be declared with: the choices and what they derive from."""
    return {base for node in choices.values() for base in node.__mro__ if dataclasses.is_dataclass(base)}


def _presets(choices: dict[str, type]) -> list[tuple[str, str]]:
    """Name and first comment of the files in configs/<group>/: choices with some of their options set."""
    group = next(group for group, names in schema.GROUPS.items() if names is choices)
    folder = resources.files("configs") / group
    files = sorted(folder.iterdir(), key=lambda file: file.name) if folder.is_dir() else []
    return [
        (file.name.removesuffix(".yaml"), file.read_text(encoding="utf-8").splitlines()[0].lstrip("# "))
        for file in files
        if file.name.endswith(".yaml")
    ]


def _field_comments(config: type) -> dict[str, str]:
    """Trailing comments of the fields, from the source."""
    comments: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if dataclasses.is_dataclass(base):
            comments |= dict(re.findall(r"^    (\w+):.*?  # (.+)$", inspect.getsource(base), re.MULTILINE))
    return comments
