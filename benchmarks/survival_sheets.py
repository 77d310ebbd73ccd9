"""Write patient sheets of TCGA BLCA and STAD and of HANCOCK, to run `histrata survival evaluate` on (docs/survival.md).

TCGA: disease-specific survival in months, age, sex, stage, tissue source site. HANCOCK: overall survival in months,
clinical and pathological data.

    python benchmarks/survival_sheets.py runs        # runs/blca/patients.tsv, runs/stad/..., runs/hancock/...
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pandas as pd
from survival_anchors import hancock_patients, tcga_patients

from histrata.files import write_tsv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("HISTRATA_DATA", "../shared/data")))
    options = parser.parse_args()
    sheets: dict[str, pd.DataFrame] = {name: tcga_patients(options.data, name) for name in ("blca", "stad")}
    sheets["hancock"] = hancock_patients(options.data)
    for name, sheet in sheets.items():
        path = options.out / name / "patients.tsv"
        write_tsv(sheet.rename_axis("patient_id").reset_index(), path)
        print(path)


if __name__ == "__main__":
    main()
