# Snakemake runs this inside the new environment, in the folder of the workflow.
python -m pip install --no-deps --editable .
