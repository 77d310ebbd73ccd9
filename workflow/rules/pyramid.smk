rule pyramid:
    input:
        slide=slide_file,
        # For um/px by spots; a table that is merely newer makes no pyramid again.
        check=ancient("results/check.tsv"),
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
        # Who does the work changes nothing in the result, and so is no parameter that makes it again.
        dask=flags({"scheduler": config["pyramid"]["scheduler"]}),
    params:
        mpp=mpp_flags,
        options=flags(config["pyramid"], leave_out=["scheduler"]),
    shell:
        "histrata pyramid {input.slide:q} {output:q} {params.mpp} {params.options} {resources.dask} --threads {threads}"
        " > {log:q} 2>&1"
