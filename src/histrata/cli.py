"""The `histrata` command: one sub-command a stage, no logic.

Modules are imported where they are used, so that `histrata --help` and the light stages start at once.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml

from histrata import __version__
from histrata.errors import HistrataError
from histrata.folders import SlideFolder

if TYPE_CHECKING:
    from histrata.expression.training import M2OSTOptions
    from histrata.survival.inputs import Inputs as SurvivalInputs
    from histrata.survival.plan import SurvivalOptions

app = typer.Typer(
    name="histrata",
    help="Whole-slide images to tables that scanpy opens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
m2ost = typer.Typer(help="Predict spatial expression with M2OST.", no_args_is_help=True)
survival = typer.Typer(help="Predict survival from the slides of a patient.", no_args_is_help=True)
app.add_typer(m2ost, name="m2ost")
app.add_typer(survival, name="survival")


def main() -> None:
    """Run the command; a mistake that the user can mend is one sentence and exit code 2."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("histrata").setLevel(logging.INFO)
    for noisy in ("lightning", "lightning.pytorch", "timm"):  # which set levels of their own
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        app()
    except HistrataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _version(asked: bool) -> None:
    if asked:
        print(f"histrata {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


Threads = Annotated[int, typer.Option(min=1, help="Threads to work with.")]
Device = Annotated[
    str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, or cuda:N for one of several GPUs.")
]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]
Folder = Annotated[Path, typer.Argument(help="Result folder of the slide, results/slides/<slide_id>.")]
Folders = Annotated[list[Path], typer.Argument(help="Result folders of the measured slides.")]


@app.command()
def check(
    sheet: Annotated[Path, typer.Argument(help="The slide sheet (TSV).")],
    out: Annotated[Path, typer.Option(help="Table to write.")] = Path("results/check.tsv"),
    threads: Threads = 1,
) -> None:
    """Open every slide of the sheet and say which can be used, and why the others cannot.

    Example: histrata check config/slides.tsv --out results/check.tsv
    """
    from histrata.files import write_tsv
    from histrata.sheets import read_slides
    from histrata.slides.check import check_slides
    from histrata.spots import preflight

    rows = read_slides(sheet)
    table = check_slides(rows, preflight, threads)
    write_tsv(table, out)
    for verdict in table.itertuples():
        print(f"{verdict.slide_id}: {verdict.status}{': ' if verdict.reason else ''}{verdict.reason}")


@app.command()
def pyramid(
    slide: Annotated[Path, typer.Argument(help="Slide file; the folder for DICOM.")],
    out: Annotated[Path, typer.Argument(help="OME-Zarr folder to write.")],
    mpp: Annotated[float | None, typer.Option(help="um/px of level 0; default: what the file says.")] = None,
    spots_mpp: Annotated[
        float | None, typer.Option(help="um/px by the spacing of measured spots, for where the file says nothing.")
    ] = None,
    codec: Annotated[
        Literal["auto", "jpeg", "zstd"],
        typer.Option(
            help="auto (JPEG tiles are copied, all else is stored without loss), jpeg (what cannot be copied is "
            "encoded) or zstd (all is decoded and stored without loss)."
        ),
    ] = "auto",
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of what is encoded.")] = 85,
    levels: Annotated[
        int | None, typer.Option(min=1, help="Number of levels; default: until the longer side is 512 px or less.")
    ] = None,
    tile: Annotated[int, typer.Option(help="Side of a chunk in px where none are copied, a power of two.")] = 256,
    shard: Annotated[int, typer.Option(help="Chunks along a side of a shard of level 0, a power of two.")] = 8,
    scheduler: Annotated[
        str | None, typer.Option(help="Dask scheduler whose workers do it, such as tcp://host:8786; default: threads.")
    ] = None,
    threads: Threads = 1,
) -> None:
    """Write a slide as a multi-scale OME-Zarr.

    Example: histrata pyramid A.svs results/slides/A/pyramid.ome.zarr --threads 4
    """
    from histrata.pyramid.writer import write_pyramid

    write_pyramid(
        slide,
        out,
        mpp=mpp,
        spots_mpp=spots_mpp,
        codec=codec,
        quality=quality,
        levels=levels,
        tile=tile,
        shard=shard,
        threads=threads,
        scheduler=scheduler,
    )


@app.command()
def tissue(
    folder: Folder,
    mpp: Annotated[float, typer.Option(min=0, help="um/px at which tissue, pen and folds are looked for.")] = 4.0,
    min_area_um2: Annotated[float, typer.Option(min=0, help="Smaller pieces are dropped.")] = 50_000.0,
    max_hole_um2: Annotated[float, typer.Option(min=0, help="Smaller holes are filled.")] = 20_000.0,
    smooth_um: Annotated[float, typer.Option(min=0, help="Gaps up to this width are closed.")] = 40.0,
    blur_mpp: Annotated[float, typer.Option(min=0, help="um/px at which blur is looked for.")] = 1.0,
) -> None:
    """Find the tissue of a slide, and pen, blur and folds on it; write tissue.geojson and tissue.png.

    Example: histrata tissue results/slides/A
    """
    from histrata.tissue import write_tissue

    paths = SlideFolder(folder)
    write_tissue(
        paths.pyramid,
        paths.tissue,
        paths.tissue_picture,
        mpp=mpp,
        min_area_um2=min_area_um2,
        max_hole_um2=max_hole_um2,
        smooth_um=smooth_um,
        blur_mpp=blur_mpp,
    )


@app.command()
def spots(
    folder: Folder,
    slide_id: Annotated[str | None, typer.Option(help="Name of the slide; default: of the folder.")] = None,
    patient_id: Annotated[str | None, typer.Option(help="Subject; default: slide_id.")] = None,
    expression: Annotated[
        Path | None, typer.Option(help="Measured counts: Space Ranger outs, .h5ad or legacy ST .tsv[.gz].")
    ] = None,
    positions: Annotated[Path | None, typer.Option(help="Spot positions of legacy ST counts.")] = None,
    spot_diameter_um: Annotated[float | None, typer.Option(help="Diameter of a measured spot.")] = None,
    stain: Annotated[str | None, typer.Option(help="Stain of the slide; default: H&E.")] = None,
    annotation: Annotated[
        Path | None, typer.Option(help="What a person named at measured spots: TSV of spot and label.")
    ] = None,
    pitch_um: Annotated[float, typer.Option(help="Distance of neighbouring spots of a grid.")] = 100.0,
    diameter_um: Annotated[float, typer.Option(help="Diameter of a spot of a grid.")] = 55.0,
    arrangement: Annotated[
        Literal["hexagonal", "square"], typer.Option(help="Of a grid: hexagonal or square.")
    ] = "hexagonal",
    min_tissue_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a spot that must be tissue to be in_tissue.")
    ] = 0.5,
) -> None:
    """Write spots.h5ad: the measured spots with their counts, or a grid on the tissue.

    Example: histrata spots results/slides/A --pitch-um 100 --diameter-um 55
    """
    from histrata.sheets import SlideRow
    from histrata.spots.step import write_spots

    name = slide_id or folder.resolve().name
    row = SlideRow(
        slide_id=name,
        path=SlideFolder(folder).pyramid,
        patient_id=patient_id or name,
        expression=expression,
        spots=positions,
        spot_diameter_um=spot_diameter_um,
        stain=stain,
        annotation=annotation,
    )
    write_spots(
        folder,
        SlideFolder(folder).spots,
        row,
        pitch_um=pitch_um,
        diameter_um=diameter_um,
        arrangement=arrangement,
        min_tissue_fraction=min_tissue_fraction,
    )


@app.command()
def embed(
    folder: Folder,
    encoder: Annotated[str, typer.Option(help="A timm model, or hf-hub:<repository>.")],
    weights: Annotated[
        Path | None, typer.Option(help="Local safetensors file; default: download the pretrained weights.")
    ] = None,
    mpp: Annotated[list[float], typer.Option(help="um/px of the windows; may be given several times.")] = [0.5],  # noqa: B006 (Typer copies it)
    batch_size: Annotated[int, typer.Option(min=1, help="Windows encoded at once.")] = 64,
    device: Device = "auto",
) -> None:
    """Encode a window around every spot with a timm model; write embedding.h5ad.

    Example: histrata embed results/slides/A --encoder resnet50 --mpp 0.5
    """
    from histrata.encoders import embed as run

    run(
        folder,
        SlideFolder(folder).embedding,
        encoder=encoder,
        weights=weights,
        mpp=mpp,
        batch_size=batch_size,
        device=device,
    )


Model = Annotated[str, typer.Option(help="A model of histrata.list_models().")]
ModelOption = Annotated[
    list[str], typer.Option(help="key=value of the model's configuration; may be given several times.")
]
Levels = Annotated[int, typer.Option(help="Levels of a spot; each sees twice as far as the one before.")]
FieldUm = Annotated[
    float | None,
    typer.Option(help="Side of the finest level's windows in um; default: 154, or what a coarser slide can show."),
]
LevelMpp = Annotated[
    list[float],
    typer.Option(help="um/px of a level, finest first; given once for each level, instead of levels and field."),
]
Size = Annotated[int | None, typer.Option(help="Side of the windows in px; default: the model's.")]
Panel = Annotated[
    str,
    typer.Option(
        help="highly_expressed, highly_variable, spatially_variable, or a file with a gene symbol in each line."
    ),
]
NGenes = Annotated[int, typer.Option(help="Genes of the panel.")]
Tokens = Annotated[
    Literal["patches", "encoder"], typer.Option(help="Tokens of the windows' pixels, or of a frozen encoder.")
]
Encoder = Annotated[str | None, typer.Option(help="The encoder: a timm model, or hf-hub:<repository>.")]
EncoderWeights = Annotated[
    Path | None, typer.Option(help="Local safetensors file of the encoder; default: download the pretrained weights.")
]
TokenGrid = Annotated[int, typer.Option(min=1, help="The encoder's patches are averaged to so many tokens a side.")]
Cache = Annotated[Path | None, typer.Option(help="Folder of the encoder's tokens, computed once.")]
Loss = Annotated[
    Literal["mse", "gaussian", "negative_binomial"],
    typer.Option(help="What is learned; gaussian and negative_binomial give each prediction a standard deviation."),
]
Standardise = Annotated[bool, typer.Option(help="Bring every gene to variance 1, so that all weigh the same.")]
SmoothUm = Annotated[
    float, typer.Option(min=0, help="Training targets are means over the spots within so many um; 0: as measured.")
]
Epochs = Annotated[int, typer.Option(help="Times that every spot is seen.")]
BatchSize = Annotated[int, typer.Option(help="Spots in a step.")]
LearningRate = Annotated[float, typer.Option(help="Peak of the learning rate.")]
Optimizer = Annotated[Literal["adamw", "adam"], typer.Option(help="adamw or adam.")]
Warmup = Annotated[float, typer.Option(min=0, help="Share of the steps in which the learning rate rises.")]
Clip = Annotated[float, typer.Option(min=0, help="Largest norm of a gradient; 0: any.")]
Ema = Annotated[float, typer.Option(min=0, help="Decay of the average of the weights that predicts; 0: the last ones.")]
EarlyStopping = Annotated[
    int,
    typer.Option(
        min=0,
        help="Epochs without a better score on one training patient, kept for that, until training stops; 0: never.",
    ),
]
Balance = Annotated[bool, typer.Option(help="Every slide gives as many spots to an epoch.")]
WeightDecay = Annotated[float, typer.Option(help="Weight decay of the optimizer.")]
Jitter = Annotated[float, typer.Option(help="Largest relative change of a colour channel in training.")]
Processes = Annotated[
    int, typer.Option(min=1, help="Processes that share a training, one for each of several GPUs, from the first on.")
]
Checkpoints = Annotated[
    Path | None,
    typer.Option(help="Folder for the state of the training, from which a stopped one goes on."),
]


def _model_options(pairs: list[str]) -> dict[str, Any]:
    """Turn key=value pairs into a dictionary; values are read as YAML."""
    return {key: yaml.safe_load(value) for key, value in _pairs("--model-option", pairs, "depth=4").items()}


def _pairs(option: str, pairs: list[str], such_as: str = "stain=HE") -> dict[str, str]:
    """Turn key=value pairs into a dictionary of text."""
    chosen = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise HistrataError(f"{option} '{pair}' has no '='; write it as key=value, such as {such_as}")
        chosen[key] = value
    return chosen


def _m2ost_options(given: dict[str, Any], cache: Path) -> M2OSTOptions:
    """Pick what `M2OSTOptions` takes out of the arguments of a command."""
    from histrata.expression.training import M2OSTOptions

    chosen = {field.name: given[field.name] for field in fields(M2OSTOptions) if field.name in given}
    return M2OSTOptions(**chosen | {"cache": cache}, model_options=_model_options(given["model_option"]))


@m2ost.command("evaluate")
def m2ost_evaluate(
    folders: Folders,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/m2ost"),
    folds: Annotated[
        str,
        typer.Option(
            help="leave-one-patient-out, grouped-k-fold, or a TSV of what each fold holds out: fold and patient_id (or "
            "slide_id)."
        ),
    ] = "leave-one-patient-out",
    k: Annotated[int, typer.Option(min=2, help="Number of folds of grouped-k-fold.")] = 5,
    controls: Annotated[
        bool, typer.Option(help="Also train with permuted images, and with permuted labels; both must fail.")
    ] = True,
    single_level: Annotated[bool, typer.Option(help="Also train on the finest level alone.")] = True,
    serial: Annotated[
        bool, typer.Option(help="Also train on the leaky split by slide, to see what it would have promised.")
    ] = False,
    model: Model = "m2ost_small",
    model_option: ModelOption = [],  # noqa: B006
    levels: Levels = 3,
    field_um: FieldUm = None,
    mpp: LevelMpp = [],  # noqa: B006
    size: Size = None,
    tokens: Tokens = "patches",
    encoder: Encoder = None,
    encoder_weights: EncoderWeights = None,
    token_grid: TokenGrid = 4,
    cache: Cache = None,
    panel: Panel = "highly_expressed",
    n_genes: NGenes = 250,
    loss: Loss = "mse",
    standardise: Standardise = True,
    smooth_um: SmoothUm = 0.0,
    epochs: Epochs = 15,
    batch_size: BatchSize = 32,
    optimizer: Optimizer = "adamw",
    learning_rate: LearningRate = 1e-3,
    weight_decay: WeightDecay = 0.05,
    warmup: Warmup = 0.3,
    clip: Clip = 1.0,
    ema: Ema = 0.0,
    early_stopping: EarlyStopping = 0,
    balance: Balance = False,
    jitter: Jitter = 0.05,
    processes: Processes = 1,
    seed: Seed = 0,
    checkpoints: Checkpoints = None,
    device: Device = "auto",
) -> None:
    """Cross-validate M2OST by patient, beside its baselines on the same folds.

    Writes evaluation.tsv, structure.tsv, intervals.tsv, summary.tsv and folds/ (the model of each fold) into the
    output folder.

    Example: histrata m2ost evaluate results/slides/* --out results/m2ost
    """
    given = locals()
    from histrata.expression.evaluation import evaluate

    options = _m2ost_options(given, cache or out / "tokens")
    evaluate(
        folders,
        out,
        options,
        folds=folds,
        k=k,
        controls=controls,
        single_level=single_level,
        serial=serial,
        checkpoints=checkpoints or out / "checkpoints-folds",
    )


@m2ost.command("train")
def m2ost_train(
    folders: Folders,
    out: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("results/m2ost/model"),
    evaluation: Annotated[Path | None, typer.Option(help="evaluation.tsv, whose figures go beside each gene.")] = None,
    intervals: Annotated[Path | None, typer.Option(help="intervals.tsv, calibrated in the evaluation.")] = None,
    model: Model = "m2ost_small",
    model_option: ModelOption = [],  # noqa: B006
    levels: Levels = 3,
    field_um: FieldUm = None,
    mpp: LevelMpp = [],  # noqa: B006
    size: Size = None,
    tokens: Tokens = "patches",
    encoder: Encoder = None,
    encoder_weights: EncoderWeights = None,
    token_grid: TokenGrid = 4,
    cache: Cache = None,
    panel: Panel = "highly_expressed",
    n_genes: NGenes = 250,
    loss: Loss = "mse",
    standardise: Standardise = True,
    smooth_um: SmoothUm = 0.0,
    epochs: Epochs = 15,
    batch_size: BatchSize = 32,
    optimizer: Optimizer = "adamw",
    learning_rate: LearningRate = 1e-3,
    weight_decay: WeightDecay = 0.05,
    warmup: Warmup = 0.3,
    clip: Clip = 1.0,
    ema: Ema = 0.0,
    early_stopping: EarlyStopping = 0,
    balance: Balance = False,
    jitter: Jitter = 0.05,
    processes: Processes = 1,
    seed: Seed = 0,
    checkpoints: Checkpoints = None,
    device: Device = "auto",
) -> None:
    """Train M2OST on every measured slide.

    Example: histrata m2ost train results/slides/* --evaluation results/m2ost/evaluation.tsv
    """
    given = locals()
    from histrata.expression.final import train_final

    options = _m2ost_options(given, cache or out.parent / "tokens")
    train_final(
        folders,
        out,
        options,
        evaluation=evaluation,
        intervals=intervals,
        checkpoints=checkpoints or out.parent / "checkpoints-final",
    )


@m2ost.command("predict")
def m2ost_predict(
    folder: Folder,
    model: Annotated[Path, typer.Option(help="Folder of the trained model.")],
    folds: Annotated[
        Path | None,
        typer.Option(help="folds/ of an evaluation: a slide held out there is predicted by its fold's model."),
    ] = None,
    evaluation: Annotated[Path | None, typer.Option(help="evaluation.tsv: figures of each gene.")] = None,
    intervals: Annotated[
        Path | None, typer.Option(help="intervals.tsv: those of a slide that was held out; else the model's are used.")
    ] = None,
    encoder_weights: EncoderWeights = None,
    cache: Cache = None,
    device: Device = "auto",
) -> None:
    """Predict expression at every spot of a slide; write expression.h5ad.

    Example: histrata m2ost predict results/slides/A --model results/m2ost/model
    """
    from histrata.expression.prediction import predict

    predict(
        folder,
        SlideFolder(folder).expression,
        model,
        folds=folds,
        evaluation=evaluation,
        intervals=intervals,
        encoder_weights=encoder_weights,
        cache=cache,
        device=device,
    )


Patients = Annotated[Path, typer.Argument(help="The patient sheet (TSV).")]
Embeddings = Annotated[
    list[Path] | None,
    typer.Argument(help="Result folders of the slides, with embedding.h5ad (expression.h5ad for --rna predicted)."),
]
Covariates = Annotated[
    list[str] | None, typer.Option("--covariate", help="Column of the sheet to use; default: all of them.")
]
Instances = Annotated[
    Path | None,
    typer.Option(
        help="Instances in place of the slides' embeddings: .npz, .h5, .h5ad, .csv or .tsv, or a folder of "
        "TRIDENT or CLAM features."
    ),
]
InstancesWhere = Annotated[
    list[str], typer.Option(help="Take only the instances whose column has this value, such as stain=HE.")
]
Rna = Annotated[
    str | None, typer.Option(help="RNA of the patients (table or .h5ad), or predicted: what M2OST predicted.")
]
GeneSets = Annotated[Path | None, typer.Option(help="Gene sets: GMT, or a table with a column for each.")]
Site = Annotated[str | None, typer.Option(help="Column of the sheet that names where a patient was treated.")]
BasicCovariates = Annotated[
    list[str] | None,
    typer.Option("--basic-covariate", help="Column of a baseline with few covariates; default: age and sex."),
]
SurvivalModelName = Annotated[
    Literal["pibd", "pibd_reference", "attention_mil", "mean_mil", "prototypes", "cox"],
    typer.Option(
        "--model",
        help="PIBD, as recommended or as published; attention over instances, their mean, or prototypes of them; or "
        "ridge Cox.",
    ),
]
Head = Annotated[
    Literal["hazards", "cox"], typer.Option(help="The network tells hazards of bins of time, or one risk.")
]
Bins = Annotated[int, typer.Option(min=1, help="Bins of time, from quantiles of the training patients' events.")]
SurvivalEpochs = Annotated[int, typer.Option("--epochs", min=1, help="Times that every patient is seen.")]
PatientsAStep = Annotated[int, typer.Option("--batch-size", min=1, help="Patients in a step.")]
Seeds = Annotated[int, typer.Option(min=1, help="Networks of so many seeds speak together.")]
Components = Annotated[int, typer.Option(min=1, help="Principal components of the mean embedding, for Cox.")]
RnaComponents = Annotated[int, typer.Option(min=1, help="Principal components of RNA, for Cox.")]
Penalizer = Annotated[float, typer.Option(min=0, help="Strength of the ridge of the Cox models.")]


def _survival_inputs(given: dict[str, Any]) -> SurvivalInputs:
    """Pick what `Inputs` takes out of the arguments of a command."""
    from histrata.survival.inputs import Inputs

    chosen = {field.name: given[field.name] for field in fields(Inputs) if field.name in given}
    chosen["embeddings"] = [SlideFolder(slide).embedding for slide in given["slides"] or []]
    return Inputs(**chosen, where=_pairs("--instances-where", given["instances_where"]))


def _survival_options(given: dict[str, Any]) -> SurvivalOptions:
    """Pick what `SurvivalOptions` takes out of the arguments of a command."""
    from histrata.survival.plan import SurvivalOptions

    chosen = {field.name: given[field.name] for field in fields(SurvivalOptions) if field.name in given}
    return SurvivalOptions(**chosen, model_options=_model_options(given["model_option"]))


@survival.command("evaluate")
def survival_evaluate(
    patients: Patients,
    slides: Embeddings = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/survival"),
    covariates: Covariates = None,
    basic_covariates: BasicCovariates = None,
    instances: Instances = None,
    instances_where: InstancesWhere = [],  # noqa: B006
    rna: Rna = None,
    gene_sets: GeneSets = None,
    site: Site = None,
    model: SurvivalModelName = "cox",
    model_option: ModelOption = [],  # noqa: B006
    head: Head = "cox",
    bins: Bins = 4,
    epochs: SurvivalEpochs = 30,
    batch_size: PatientsAStep = 128,
    learning_rate: LearningRate = 1e-2,
    weight_decay: WeightDecay = 0.1,
    seeds: Seeds = 3,
    components: Components = 10,
    rna_components: RnaComponents = 30,
    penalizer: Penalizer = 0.1,
    controls: Annotated[bool, typer.Option(help="Fit the model with each modality shuffled, too.")] = True,
    folds: Annotated[int, typer.Option(min=2, help="Number of folds by patient.")] = 5,
    given_folds: Annotated[
        Path | None, typer.Option(help="Folds of your own: a table (fold, patient_id), or a folder of splits_*.csv.")
    ] = None,
    horizons: Annotated[
        list[float], typer.Option("--horizon", help="Time of AUC and calibration; default: quartiles of the events.")
    ] = [],  # noqa: B006
    tau: Annotated[
        float | None, typer.Option(help="End of the time that Uno's c looks at; default: from training events.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Cross-validate survival by patient, beside its baselines and controls; write the cohort table.

    Writes evaluation.tsv, summary.tsv, calibration.tsv, cohort.h5ad, kaplan_meier.png, spots/ and model/.

    Example: histrata survival evaluate config/patients.tsv results/slides/*

    Example: histrata survival evaluate patients.tsv --instances bags.npz --rna rna.csv --gene-sets sets.gmt
    """
    from histrata.survival.steps import evaluate

    given = locals()
    evaluate(
        _survival_inputs(given),
        out,
        _survival_options(given),
        folds=folds,
        given_folds=given_folds,
        horizons=horizons,
        tau=tau,
        seed=seed,
    )


@survival.command("train")
def survival_train(
    patients: Patients,
    slides: Embeddings = None,
    out: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("results/survival/model"),
    summary: Annotated[Path | None, typer.Option(help="summary.tsv: figures for the card.")] = None,
    covariates: Covariates = None,
    instances: Instances = None,
    instances_where: InstancesWhere = [],  # noqa: B006
    rna: Rna = None,
    gene_sets: GeneSets = None,
    site: Site = None,
    model: SurvivalModelName = "cox",
    model_option: ModelOption = [],  # noqa: B006
    head: Head = "cox",
    bins: Bins = 4,
    epochs: SurvivalEpochs = 30,
    batch_size: PatientsAStep = 128,
    learning_rate: LearningRate = 1e-2,
    weight_decay: WeightDecay = 0.1,
    seeds: Seeds = 3,
    components: Components = 10,
    rna_components: RnaComponents = 30,
    penalizer: Penalizer = 0.1,
    device: Device = "auto",
) -> None:
    """Fit the survival model on every patient with follow-up, without judging it: evaluate writes it, too.

    Example: histrata survival train config/patients.tsv results/slides/*
    """
    from histrata.survival.steps import train

    given = locals()
    train(_survival_inputs(given), out, _survival_options(given), summary=summary)


@survival.command("predict")
def survival_predict(
    patients: Patients,
    slides: Embeddings = None,
    model: Annotated[Path, typer.Option(help="Folder of a trained model.")] = Path("results/survival/model"),
    out: Annotated[Path, typer.Option(help="Table to write (TSV).")] = Path("results/survival/predicted.tsv"),
    instances: Instances = None,
    instances_where: InstancesWhere = [],  # noqa: B006
    rna: Rna = None,
    gene_sets: GeneSets = None,
) -> None:
    """Predict the patients of a sheet, from whatever is known of them; their follow-up may be empty.

    Example: histrata survival predict new/patients.tsv new/slides/* --model results/survival/model
    """
    from histrata.survival.steps import predict

    predict(_survival_inputs(locals()), model, out)


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="Folder of the results.")] = Path("results"),
    out: Annotated[Path | None, typer.Option(help="Page to write; default: report.html there.")] = None,
    gene: Annotated[
        list[str], typer.Option(help="Gene to draw; default: those predicted best in cross-validation.")
    ] = [],  # noqa: B006
    n_genes: Annotated[int, typer.Option(min=1, help="Genes to draw where none is named.")] = 4,
    config: Annotated[Path | None, typer.Option(help="Configuration of the run, to be shown.")] = None,
) -> None:
    """Write one HTML page to look at: slides, tissue, figures beside their baselines, genes on the tissue.

    Example: histrata report results
    """
    from histrata.report import write_report

    write_report(results, out or results / "report.html", genes=gene, n_genes=n_genes, config=config)


@app.command("demo-data")
def demo_data(
    folder: Annotated[Path, typer.Argument(help="Folder to write the cohort to.")],
    patients: Annotated[
        int | None, typer.Option(min=2, help="Patients, one slide each; default: 12, with --survival 500.")
    ] = None,
    measured: Annotated[int, typer.Option(min=2, help="Patients with measured expression.")] = 4,
    size_px: Annotated[int, typer.Option(help="Width and height of a slide in px.")] = 3072,
    survival: Annotated[
        bool, typer.Option("--survival", help="Write bags, RNA and follow-up of more patients, without slides.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Write a small cohort with known truth: slides, counts, follow-up, sheets and config.

    Example: histrata demo-data demo
    """
    if survival:
        from histrata.demo.cohort import write_cohort

        write_cohort(folder, patients or 500, seed)
        print(
            f"written to {folder}; run it with: histrata survival evaluate {folder}/patients.tsv "
            f"--instances {folder}/instances.npz --rna {folder}/rna.tsv.gz --gene-sets {folder}/gene_sets.gmt "
            "--site site"
        )
        return
    from histrata.demo import write_demo

    write_demo(folder, patients=patients or 12, measured=measured, size_px=size_px, seed=seed)
    print(
        f"written to {folder}; run it with: snakemake --cores 2 --directory {folder} --configfile {folder}/config.yaml"
    )
