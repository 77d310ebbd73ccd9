rule report:
    input:
        check="results/check.tsv",
        slides=slide_results,
        m2ost=m2ost_results,
        survival=survival_results,
    output:
        "results/report.html",
    log:
        "results/logs/report.log",
    benchmark:
        "results/benchmarks/report.tsv"
    conda:
        "../../envs/histrata.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        config=CONFIG_FILE,
        options=flags(config["report"]),
    shell:
        "histrata report results --out {output:q} --config {params.config:q} {params.options} > {log:q} 2>&1"
