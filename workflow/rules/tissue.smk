rule tissue:
    input:
        "results/slides/{slide}/pyramid.ome.zarr",
    output:
        polygons="results/slides/{slide}/tissue.geojson",
        picture=report(
            "results/slides/{slide}/tissue.png",
            caption="../report/tissue.rst",
            category="Slides",
            labels={"slide": "{slide}"},
        ),
    log:
        "results/logs/tissue/{slide}.log",
    benchmark:
        "results/benchmarks/tissue/{slide}.tsv"
    conda:
        "../../envs/histrata.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        options=flags(config["tissue"]),
    shell:
        "histrata tissue results/slides/{wildcards.slide:q} {params.options} > {log:q} 2>&1"
