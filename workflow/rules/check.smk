checkpoint check:
    input:
        sheet=SHEET,
    output:
        table=report(
            "results/check.tsv", caption="../report/check.rst", category="Slides"
        ),
    log:
        "results/logs/check.log",
    benchmark:
        "results/benchmarks/check.tsv"
    conda:
        "../../envs/histrata.yaml"
    threads: 4
    resources:
        mem_mb=4000,
        runtime=30,
    shell:
        "histrata check {input.sheet:q} --out {output.table:q} --threads {threads} > {log:q} 2>&1"
