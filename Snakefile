# Snakemake forgets the default target of what a plain `include:` brings; this is the same include, with its target.
workflow.include("workflow/Snakefile", overwrite_default_target=True)
