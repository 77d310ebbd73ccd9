rule embed:
    input:
        pyramid="results/slides/{slide}/pyramid.ome.zarr",
        spots="results/slides/{slide}/spots.h5ad",
        weights=WEIGHTS,
    output:
        "results/slides/{slide}/embedding.h5ad",
    log:
        "results/logs/embed/{slide}.log",
    benchmark:
        "results/benchmarks/embed/{slide}.tsv"
    conda:
        "../../envs/histrata.yaml"
    threads: 4
    resources:
        mem_mb=16000,
        runtime=240,
        gpu=GPU,
        device=config["device"],
    params:
        options=flags(config["embed"] | {"weights": WEIGHTS or None}),
    shell:
        "histrata embed results/slides/{wildcards.slide:q} {params.options} --device {resources.device} > {log:q} 2>&1"
