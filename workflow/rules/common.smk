# Configuration and sheets, and every function that the rules call.

import csv
import shlex
import sys
from pathlib import Path

from histrata.config import complete, find_commands
from histrata.errors import HistrataError
from histrata.sheets import read_patients, read_slides

CONFIG_FILE = Path(workflow.configfiles[-1]).absolute()


def of_config(path):
    """Resolve a path of the config, which is relative to the config file."""
    return (CONFIG_FILE.parent / Path(path).expanduser()).absolute()


def stop(sentence):
    """End with one sentence for the user, and the exit code of the commands."""
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


try:
    config = complete(config, CONFIG_FILE)
    SHEET = of_config(config["slides"])
    SLIDES = {row.slide_id: row for row in read_slides(SHEET)}
    PATIENTS = of_config(config["patients"]) if config["patients"] else None
    if PATIENTS:
        read_patients(PATIENTS)
except HistrataError as error:
    stop(error)

find_commands()

PANELS = ("highly_expressed", "highly_variable", "spatially_variable")
SCHEMES = ("leave-one-patient-out", "grouped-k-fold")
PRETRAINED = (
    of_config(config["m2ost"]["pretrained"]) if config["m2ost"]["pretrained"] else None
)
WEIGHTS = of_config(config["embed"]["weights"]) if config["embed"]["weights"] else []
PANEL = (
    [] if config["m2ost"]["panel"] in PANELS else of_config(config["m2ost"]["panel"])
)
FOLDS = (
    [] if config["m2ost"]["folds"] in SCHEMES else of_config(config["m2ost"]["folds"])
)
SURVIVAL = {
    key: of_config(value)
    for key, value in config["survival"].items()
    if key in ("instances", "rna", "gene_sets", "given_folds")
    and value
    and value != "predicted"
}
PREDICTED_RNA = config["survival"]["rna"] == "predicted"
if (
    PREDICTED_RNA
    and not PRETRAINED
    and not any(row.expression for row in SLIDES.values())
):
    stop(
        f"{CONFIG_FILE}: survival.rna is predicted and no slide has an expression to learn from; "
        "give m2ost.pretrained or the slide sheet's column expression, or leave the key out"
    )
for key, path in {
    "m2ost.pretrained": PRETRAINED,
    "m2ost.panel": PANEL,
    "m2ost.folds": FOLDS,
    "embed.weights": WEIGHTS,
    **{f"survival.{key}": path for key, path in SURVIVAL.items()},
}.items():
    if path and not path.exists():
        stop(
            f"{CONFIG_FILE}: {key} is {path}, which is not there; correct the path, or leave the key out"
        )

# What concerns the evaluation of M2OST, and not its training.
EVALUATED = ("folds", "k", "controls", "single_level", "serial")
GPU = int(config["device"].startswith("cuda"))


wildcard_constraints:
    slide="[A-Za-z0-9._-]+",


def flags(section, leave_out=()):
    """Write keys and values of a config section as the options of its command."""
    words = []
    for key, value in section.items():
        option = f"--{key.replace('_', '-')}"
        if key in leave_out or value is None:
            continue
        elif isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            for name, inner in value.items():
                words += [option.rstrip("s"), f"{name}={inner}"]
        elif isinstance(value, list):
            for inner in value:
                words += [option.rstrip("s"), inner]
        else:
            words += [option, value]
    return shlex.join(str(word) for word in words)


def m2ost_flags(leave_out=()):
    """Return the options that evaluation and training share."""
    section = config["m2ost"] | ({"panel": PANEL} if PANEL else {})
    section |= {"folds": FOLDS} if FOLDS else {}
    if section["tokens"] == "encoder":
        section |= {"encoder": config["embed"]["encoder"]} | encoder_weights()
    return flags(section, leave_out=("pretrained", *leave_out))


def encoder_weights():
    """Return the file of the encoder whose tokens M2OST takes, as an option of its command."""
    return {"encoder_weights": WEIGHTS or None}


def verdicts():
    """Return the rows of check.tsv by slide."""
    with checkpoints.check.get().output.table.open() as stream:
        return {row["slide_id"]: row for row in csv.DictReader(stream, delimiter="\t")}


def accepted():
    """Return the slides that the check did not reject, in the order of the sheet."""
    rows = verdicts()
    return [
        slide for slide in SLIDES if rows.get(slide, {}).get("status") != "rejected"
    ]


def measured():
    """Return the accepted slides with measured expression."""
    return [slide for slide in accepted() if SLIDES[slide].expression]


def can_evaluate():
    """Say whether there are two patients to split."""
    return (
        not PRETRAINED and len({SLIDES[slide].patient_id for slide in measured()}) > 1
    )


def slide_file(wildcards):
    return SLIDES[wildcards.slide].path


def mpp_flags(wildcards):
    """Return the sheet's um/px and what the check found by the spacing of measured spots.

    With both at hand a pyramid chooses as the check did.
    """
    row = SLIDES[wildcards.slide]
    found = verdicts()[row.slide_id]["mpp_candidates"] if row.expression else ""
    candidates = dict(word.partition("=")[::2] for word in found.split(";"))
    return flags({"mpp": row.mpp, "spots_mpp": candidates.get("spots")})


def measurement(wildcards):
    row = SLIDES[wildcards.slide]
    return [path for path in (row.expression, row.spots, row.annotation) if path]


def spot_flags(wildcards):
    row = SLIDES[wildcards.slide]
    own = {
        "slide_id": row.slide_id,
        "patient_id": row.patient_id,
        "expression": row.expression,
        "positions": row.spots,
        "spot_diameter_um": row.spot_diameter_um,
        "stain": row.stain,
        "annotation": row.annotation,
    }
    if not row.expression:
        return flags(own | config["spots"])
    return flags(own | {"min_tissue_fraction": config["spots"]["min_tissue_fraction"]})


def of_measured(name):
    """Return an input function: one file of every measured slide."""

    def files(wildcards):
        return [f"results/slides/{slide}/{name}" for slide in measured()]

    return files


def measured_features(wildcards):
    """Return the features that baselines learn from, where there is an encoder."""
    return (
        of_measured("embedding.h5ad")(wildcards) if config["embed"]["encoder"] else []
    )


def measured_folders(wildcards):
    return [f"results/slides/{slide}" for slide in measured()]


def accepted_folders(wildcards):
    return [f"results/slides/{slide}" for slide in accepted()]


def survival_names():
    """Return the files of a slide that survival is predicted from."""
    names = []
    if config["embed"]["encoder"] and not config["survival"]["instances"]:
        names.append("embedding.h5ad")
    if PREDICTED_RNA:
        names.append("expression.h5ad")
    return names


def survival_slides(wildcards):
    """Return what survival is predicted from of every accepted slide."""
    return [
        f"results/slides/{slide}/{name}"
        for slide in (accepted() if survival_names() else [])
        for name in survival_names()
    ]


def survival_folders(wildcards):
    return accepted_folders(wildcards) if survival_names() else []


def survival_flags():
    return flags(config["survival"] | SURVIVAL)


def evaluation(wildcards):
    """Return the evaluation that the final model and the predictions quote, where there is one."""
    return "results/m2ost/evaluation.tsv" if can_evaluate() else []


def intervals(wildcards):
    return "results/m2ost/intervals.tsv" if can_evaluate() else []


def folds(wildcards):
    return "results/m2ost/folds" if can_evaluate() else []


def evaluation_flag(wildcards):
    """Name the tables of the evaluation that the final model and the predictions quote."""
    tables = {"evaluation": evaluation(wildcards), "intervals": intervals(wildcards)}
    return flags(tables) if can_evaluate() else ""


def folds_flag(wildcards):
    return f"--folds {folds(wildcards)}" if can_evaluate() else ""


def model(wildcards):
    return PRETRAINED or "results/m2ost/model"


def slide_results(wildcards):
    """Return every file of every accepted slide."""
    names = ["pyramid.ome.zarr", "tissue.geojson", "tissue.png", "spots.h5ad"]
    if config["embed"]["encoder"]:
        names.append("embedding.h5ad")
    if PRETRAINED or measured():
        names.append("expression.h5ad")
    return [f"results/slides/{slide}/{name}" for slide in accepted() for name in names]


def m2ost_results(wildcards):
    if PRETRAINED or not measured():
        return []
    names = ("evaluation.tsv", "summary.tsv", "folds") if can_evaluate() else ()
    return [f"results/m2ost/{name}" for name in ("model", *names)]


def survival_results(wildcards):
    if not PATIENTS or survival_names() and not accepted():
        return []
    names = (
        "evaluation.tsv",
        "summary.tsv",
        "cohort.h5ad",
        "calibration.tsv",
        "kaplan_meier.png",
        "spots",
        "model",
    )
    return [f"results/survival/{name}" for name in names]
