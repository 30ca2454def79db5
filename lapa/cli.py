"""The table of contents: a verb, one line of help, and the module that is loaded when it is called.

    lapa <stage> [option=value ...]      one Hydra application a stage
    lapa run experiment=quickstart       all of them, in order

Nothing heavy is imported here, so `lapa --help` answers at once.
"""

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    help: str
    module: str
    config: str  # the dataclass in lapa/schema.py
    repeats: bool = False  # looks again at what lies in its input each time, instead of being done once
    selects: tuple[str, ...] = ()  # options that choose among its parts: with others the folder gets the missing ones


STAGES = {
    "ingest": Stage("video from any source -> curated clips in a frame store", "video_data.ingest", "IngestConfig"),
    "convert": Stage("LeRobotDataset v2.1 -> v3.0, every episode checked", "video_data.convert", "ConvertConfig"),
    "demos": Stage(
        "scripted experts in simulation -> LeRobotDataset, with and without actions", "envs.demos", "DemosConfig"
    ),
    "train_realigner": Stage(
        "clips with true captions -> captioner that edits noisy titles, measured",
        "video_data.captions.train_realigner",
        "TrainRealignerConfig",
    ),
    "train_quantizer": Stage(
        "frame pairs -> latent-action quantizer", "lapa.quantizer.train_quantizer", "TrainQuantizerConfig"
    ),
    "import_laq": Stage(
        "the released quantizer's weights (laq_openx.pt) -> quantizer folder",
        "lapa.quantizer.import_laq",
        "ImportLAQConfig",
    ),
    "evaluate_quantizer": Stage(
        "quantizer + data set -> metrics with intervals, pictures, gate",
        "lapa.quantizer.evaluate_quantizer",
        "EvaluateQuantizerConfig",
    ),
    "compare_quantizers": Stage(
        "a folder of quantizers -> one table and one picture, averaged over seeds",
        "lapa.quantizer.compare_quantizers",
        "CompareQuantizersConfig",
        repeats=True,
    ),
    "label": Stage("quantizer + data set -> a latent action for every frame", "lapa.quantizer.label", "LabelConfig"),
    "train_inverse": Stage(
        "a few demonstrations -> inverse model: two frames to the actions between them",
        "lapa.quantizer.train_inverse",
        "TrainInverseConfig",
    ),
    "label_actions": Stage(
        "inverse model + data set -> pseudo actions for every frame (VPT)",
        "lapa.quantizer.label_actions",
        "LabelActionsConfig",
    ),
    "ground": Stage(
        "video with instructions -> image tokenizer that knows what an instruction is about",
        "lapa.latent_vla.ground",
        "GroundConfig",
    ),
    "pretrain": Stage("labels -> latent vision-language-action model", "lapa.latent_vla.pretrain", "PretrainConfig"),
    "import_lapa": Stage(
        "the released LAPA-7B -> a Llama of transformers with a latent head",
        "lapa.latent_vla.import_lapa",
        "ImportLapaConfig",
    ),
    "finetune": Stage("a few demonstrations -> LeRobot policy", "policies.finetune", "FinetuneConfig"),
    "finetune_unipi": Stage(
        "a planner of frames + inverse model + a few demonstrations -> LeRobot policy (UniPi)",
        "policies.finetune_unipi",
        "FinetuneUnipiConfig",
    ),
    "preflight": Stage(
        "data set and policy -> what would go wrong on the robot, before it moves",
        "policies.preflight.preflight",
        "PreflightConfig",
        repeats=True,
    ),
    "hindsight": Stage(
        "a few labelled and many unlabelled trajectories -> labelled data sets, one an arm",
        "policies.hindsight",
        "HindsightConfig",
    ),
    "replay": Stage(
        "proposed actions for recorded episodes -> data set verified in simulation", "envs.replay", "ReplayConfig"
    ),
    "evaluate": Stage(
        "LeRobot policy -> success in simulation, with intervals and videos", "envs.evaluate", "EvaluateConfig"
    ),
    "export": Stage("policy -> ONNX, for robots without torch", "policies.export", "ExportConfig"),
    "serve": Stage("policy -> server for robots: WebSocket and HTTP", "policies.serving.server", "ServeConfig"),
    "study": Stage(
        "an experiment on the model zoo -> table with intervals",
        "lapa.studies.study",
        "StudyConfig",
        selects=("seeds", "arms"),
    ),
    "report": Stage("run directory -> report.html", "lapa.report", "ReportConfig"),
    "run": Stage("all stages in one run directory: lapa run experiment=quickstart", "lapa.pipeline", "RunConfig"),
}


def help_text() -> str:
    width = max(map(len, STAGES))
    rows = "\n".join(f"  {verb:<{width}}  {stage.help}" for verb, stage in STAGES.items())
    return (
        "usage: lapa <stage> [option=value ...]\n\nVideo without actions into robot policies.\n\nstages:\n"
        f"{rows}\n\n"
        "lapa <stage> --help      the stage's options, defaults and units\n"
        "lapa <stage> --cfg job   the composed configuration\n"
        "Every stage reads and writes folders, and goes on where it was killed when called again."
    )


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return
    verb, options = arguments[0], arguments[1:]
    if verb == "--version":
        from lapa import __version__

        print(f"lapa {__version__}")
        return
    if verb not in STAGES:
        print(f"lapa: no stage {verb!r}; stages are {', '.join(STAGES)}", file=sys.stderr)
        sys.exit(2)

    from lapa import application

    if "-h" in options or "--help" in options:
        print(application.stage_help(verb))
    else:
        application.launch(verb, options)


if __name__ == "__main__":
    main()
