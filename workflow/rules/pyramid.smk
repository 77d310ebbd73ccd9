rule pyramid:
    input:
        slide=slide_file,
    output:
        directory("results/slides/{slide}/pyramid.ome.zarr"),
    log:
        "results/logs/pyramid/{slide}.log",
    benchmark:
        "results/benchmarks/pyramid/{slide}.tsv"
    conda:
        "../../envs/histrata.yaml"
    threads: 4
    resources:
        mem_mb=6000,
        runtime=120,
    params:
        mpp=slide_mpp,
        options=flags(config["pyramid"]),
    shell:
        "histrata pyramid {input.slide:q} {output:q} {params.mpp} {params.options} --threads {threads} > {log:q} 2>&1"
