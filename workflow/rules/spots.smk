rule spots:
    input:
        pyramid="results/slides/{slide}/pyramid.ome.zarr",
        tissue="results/slides/{slide}/tissue.geojson",
        measurement=measurement,
    output:
        "results/slides/{slide}/spots.h5ad",
    log:
        "results/logs/spots/{slide}.log",
    benchmark:
        "results/benchmarks/spots/{slide}.tsv"
    conda:
        "../../envs/histrata.yaml"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=30,
    params:
        options=spot_flags,
    shell:
        "histrata spots results/slides/{wildcards.slide:q} {params.options} > {log:q} 2>&1"
