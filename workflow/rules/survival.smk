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
        calibration="results/survival/calibration.tsv",
        cohort="results/survival/cohort.h5ad",
        spots=directory("results/survival/spots"),
        model=directory("results/survival/model"),
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
    threads: 2
    resources:
        mem_mb=8000,
        runtime=720,
        gpu=GPU,
        device=config["device"],
    params:
        folders=survival_folders,
        options=survival_flags(),
    shell:
        "histrata survival evaluate {input.patients:q} {params.folders:q} --out results/survival {params.options} --device {resources.device} > {log:q} 2>&1"
