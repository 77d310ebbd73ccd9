rule survival_evaluate:
    input:
        patients=PATIENTS or [],
        slides=survival_slides,
        files=list(SURVIVAL.values()),
    output:
        evaluation="results/survival/evaluation.tsv",
        summary=report(
            "results/survival/summary.tsv",
            caption="../report/survival.rst",
            category="Survival",
        ),
        cohort="results/survival/cohort.h5ad",
        curve=report(
            "results/survival/kaplan_meier.png",
            caption="../report/survival.rst",
            category="Survival",
        ),
    log:
        "results/logs/survival_evaluate.log",
    benchmark:
        "results/benchmarks/survival_evaluate.tsv"
    conda:
        "../../envs/histrata.yaml"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=120,
    params:
        folders=survival_folders,
        options=survival_flags(),
    shell:
        "histrata survival evaluate {input.patients:q} {params.folders:q} --out results/survival {params.options} > {log:q} 2>&1"


rule survival_train:
    input:
        patients=PATIENTS or [],
        slides=survival_slides,
        files=list(SURVIVAL.values()),
        summary="results/survival/summary.tsv",
    output:
        directory("results/survival/model"),
    log:
        "results/logs/survival_train.log",
    benchmark:
        "results/benchmarks/survival_train.tsv"
    conda:
        "../../envs/histrata.yaml"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=60,
    params:
        folders=survival_folders,
        options=survival_flags(leave_out=("folds", "seed")),
    shell:
        "histrata survival train {input.patients:q} {params.folders:q} --out {output:q} --summary {input.summary:q} {params.options} > {log:q} 2>&1"
