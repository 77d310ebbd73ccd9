rule m2ost_evaluate:
    input:
        pyramids=of_measured("pyramid.ome.zarr"),
        spots=of_measured("spots.h5ad"),
        panel=PANEL,
        weights=WEIGHTS,
        folds=FOLDS,
        features=measured_features,
    output:
        evaluation="results/m2ost/evaluation.tsv",
        summary=report(
            "results/m2ost/summary.tsv",
            caption="../report/m2ost.rst",
            category="Expression",
        ),
        structure="results/m2ost/structure.tsv",
        intervals="results/m2ost/intervals.tsv",
        folds=directory("results/m2ost/folds"),
    log:
        "results/logs/m2ost_evaluate.log",
    benchmark:
        "results/benchmarks/m2ost_evaluate.tsv"
    conda:
        "../../envs/histrata.yaml"
    threads: 8
    resources:
        mem_mb=16000,
        runtime=1440,
        gpu=GPU * config["m2ost"]["processes"],
        device=config["device"],
    params:
        folders=measured_folders,
        options=m2ost_flags(),
    shell:
        "histrata m2ost evaluate {params.folders:q} --out results/m2ost {params.options} --device {resources.device} > {log:q} 2>&1"


rule m2ost_train:
    input:
        pyramids=of_measured("pyramid.ome.zarr"),
        spots=of_measured("spots.h5ad"),
        evaluation=evaluation,
        intervals=intervals,
        panel=PANEL,
        weights=WEIGHTS,
    output:
        directory("results/m2ost/model"),
    log:
        "results/logs/m2ost_train.log",
    benchmark:
        "results/benchmarks/m2ost_train.tsv"
    conda:
        "../../envs/histrata.yaml"
    threads: 8
    resources:
        mem_mb=16000,
        runtime=1440,
        gpu=GPU * config["m2ost"]["processes"],
        device=config["device"],
    params:
        folders=measured_folders,
        evaluation=evaluation_flag,
        options=m2ost_flags(leave_out=EVALUATED),
    shell:
        "histrata m2ost train {params.folders:q} --out {output:q} {params.evaluation} {params.options} --device {resources.device} > {log:q} 2>&1"


rule m2ost_predict:
    input:
        pyramid="results/slides/{slide}/pyramid.ome.zarr",
        spots="results/slides/{slide}/spots.h5ad",
        model=model,
        folds=folds,
        evaluation=evaluation,
        intervals=intervals,
        weights=WEIGHTS,
    output:
        "results/slides/{slide}/expression.h5ad",
    log:
        "results/logs/m2ost_predict/{slide}.log",
    benchmark:
        "results/benchmarks/m2ost_predict/{slide}.tsv"
    conda:
        "../../envs/histrata.yaml"
    threads: 4
    resources:
        mem_mb=8000,
        runtime=240,
        gpu=GPU,
        device=config["device"],
    params:
        folds=folds_flag,
        evaluation=evaluation_flag,
        encoder=flags(encoder_weights()),
    shell:
        "histrata m2ost predict results/slides/{wildcards.slide:q} --model {input.model:q} {params.folds} {params.evaluation} {params.encoder} --cache results/m2ost/tokens --device {resources.device} > {log:q} 2>&1"
