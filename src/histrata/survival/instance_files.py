"""Files of instances that `instances.gather` reads: embeddings, ready-made tables and arrays, TRIDENT features.

Formats
-------
embedding.h5ad
    What `histrata embed` writes: one slide, spots on tissue, ordered by name.
.h5ad
    `X` (instances, features); `obs["patient_id"]` or `obs["slide_id"]` or both, and optionally `obs["instance_id"]`;
    where there is `obs["in_tissue"]`, what lies off tissue is left out. The names of obs are not used.
.npz, .h5
    `features` (instances, features), `patient_id` or `slide_id` or both (instances,), and optionally `instance_id`.
    Other arrays are named in the log.
.csv, .tsv (or .txt), also .gz
    Columns `patient_id` or `slide_id` or both, and optionally `instance_id`; every other column is a feature.
A folder of .h5
    As TRIDENT and CLAM write them: one file a slide, called `<slide_id>.h5`, with `features` (n, d) or (1, n, d) and
    `coords` (n, 2) or (1, n, 2), by which instances are ordered.

Where only slides are named, the patient sheet's column `slide_id` says whose they are; without such a column, the slide
is the patient. Instances are ordered by `instance_id` or coords where these are unique in a slide, else by values. All
are read by blocks, in any float or integer type, and nothing is unpickled.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, sparse_dataset
from numpy.typing import NDArray

from histrata.errors import TableError, quoted
from histrata.files import separator
from histrata.survival.instances import Source, rows_at_once
from histrata.survival.text import ids_of, read_lines, tell

log = logging.getLogger(__name__)

IDS = ("patient_id", "slide_id")
NAME = "instance_id"
SLIDE_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".dcm", ".svslide", ".czi")
_READ_ERRORS = (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile, EOFError)
Columns = Mapping[str, NDArray[np.str_]]


def open_embedding(path: Path) -> Source | None:
    """Open the embedding of one slide; None, with a warning, where it has no spots.

    Raises
    ------
    TableError
        A file that is missing or no embedding, or that does not name one slide and one patient.
    """
    source = _open_h5ad(Path(path), None, {}, embedding=True)
    if source is None:
        log.warning("%s has no spots and is left out of its patient's mean.", path)
    return source


def spots_of(path: Path) -> NDArray[np.str_]:
    """Return the names of a slide's spots on tissue, in the order in which they are its patient's instances.

    Parameters
    ----------
    path
        `embedding.h5ad` of the slide.
    """
    obs = _read_h5ad(path, embedding=True)[0]
    names = obs.index.to_numpy().astype(np.str_)
    kept = _on_tissue(obs)
    return np.sort(names if kept is None else names[kept], kind="stable")


def patches_of(path: Path) -> tuple[NDArray[np.float64], float | None] | None:
    """Return where the patches of a slide lie, in the order in which they are its patient's instances.

    Parameters
    ----------
    path
        A file of features that TRIDENT or CLAM wrote for one slide.

    Returns
    -------
    float64 (n, 2), the upper left corners (x, y) in level-0 px, and the side of a patch in the same unit, None where
    the file does not tell it (TRIDENT's `patch_size_level0`); None where the places are not told, or not unique.
    """
    with h5py.File(path) as file:
        if "coords" not in file:
            return None
        coords, side = _coords(file), file["coords"].attrs.get("patch_size_level0")
    order = _by_place(coords)
    return None if order is None else (coords[order].astype(np.float64), None if side is None else float(side))


def _coords(file: h5py.File) -> NDArray[Any]:
    return np.asarray(file["coords"][()]).reshape(-1, 2)


def _by_place(coords: NDArray[Any]) -> NDArray[np.int64] | None:
    """Sort by row and column; None for two patches of one place, which have no order but that of their values."""
    unique = len(np.unique(coords, axis=0)) == len(coords)
    return np.lexsort((coords[:, 0], coords[:, 1])).astype(np.int64) if unique else None


def open_instances(
    path: Path, patient_of: Mapping[str, str] | None = None, where: Mapping[str, str] | None = None
) -> list[Source]:
    """Open ready-made instances: a table, an array, or a folder of TRIDENT features (see the formats above).

    Parameters
    ----------
    path
        The file or folder.
    patient_of
        Patient of each slide_id, for what names slides alone; None takes the slide for the patient.
    where
        Takes only the rows whose columns have these values, such as `{"stain": "HE"}`; not for a folder.

    Raises
    ------
    TableError
        A file that cannot be read, or that lacks ids or features.
    """
    path, where = Path(path), where or {}
    if path.is_dir():
        return _open_folder(path, patient_of, where)
    if not path.is_file():
        raise TableError(f"{path}: no such file of instances; correct the path.")
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    openers: dict[str, Callable[..., Source | None]] = {
        ".h5ad": _open_h5ad,
        ".npz": _open_npz,
        **dict.fromkeys((".h5", ".hdf5"), _open_h5),
        **dict.fromkeys((".csv", ".tsv", ".txt"), _open_text),
    }
    if suffix not in openers:
        raise TableError(
            f"{path}: instances are read from {', '.join(openers)} (text also .gz), or from a folder of .h5 files; "
            "write them as one of these."
        )
    source = openers[suffix](path, patient_of, where)
    if source is None or not (source.slide >= 0).any():
        chosen = f" with {' and '.join(f'{k} = {v}' for k, v in where.items())}" if where else ""
        raise TableError(f"{path} holds no instance{chosen}; give a file that does.")
    # A slide of which no row was chosen is a slide without instances.
    return [source.keep(np.bincount(source.slide[source.slide >= 0], minlength=len(source.slides)) > 0)]


def clean_slide_id(slide_id: str) -> str:
    """Return a slide_id without the suffix of a slide file, which feature files do not keep."""
    stem, dot, suffix = slide_id.rpartition(".")
    return stem if stem and f"{dot}{suffix}".lower() in SLIDE_SUFFIXES else slide_id


# ---- ids --------------------------------------------------------------------------------------------------


def _source(
    path: Path,
    columns: Columns,
    features: Sequence[str],
    dtype: Any,
    blocks: Callable[[], Iterator[NDArray]],
    patient_of: Mapping[str, str] | None,
    where: Mapping[str, str],
    *,
    names: NDArray[np.str_] | None = None,
    kept: NDArray[np.bool_] | None = None,
    first_row: int = 0,
) -> Source:
    """Say to which slide and patient each row belongs; `columns` has the ids and what `where` asks for."""
    _require_numbers(path, np.dtype(dtype), len(features))
    ids = columns["slide_id"] if "slide_id" in columns else columns["patient_id"]
    codes, unique = pd.factorize(ids, sort=True)
    slides = [str(slide) for slide in unique]
    if "patient_id" in columns:
        patients = _patients(path, codes, slides, columns["patient_id"])
    else:
        patients = _patients_of_slides(path, slides, patient_of)
    chosen = np.ones(len(codes), bool) if kept is None else kept
    for column, value in where.items():
        chosen = chosen & (columns[column] == value)
    source = Source(
        path=path,
        slides=tuple(slides),
        patients=tuple(patients),
        slide=np.where(chosen, codes, -1).astype(np.int64),
        order=_ranks(codes, columns.get(NAME) if names is None else names),
        features=tuple(map(str, features)),
        dtype=np.dtype(dtype),
        blocks=blocks,
        first_row=first_row,
    )
    return source.keep(np.array([bool(patient) for patient in patients]))


def _ranks(codes: NDArray[np.int64], names: NDArray[np.str_] | None) -> NDArray[np.int64] | None:
    """Give the place of each name among all; None where there are none, or some are not unique in their slide."""
    if names is None or pd.DataFrame({"slide": codes, "name": names}).duplicated().any():
        return None
    return np.argsort(np.argsort(names, kind="stable"), kind="stable").astype(np.int64)


def _patients(path: Path, codes: NDArray[np.int64], slides: Sequence[str], ids: NDArray[np.str_]) -> list[str]:
    """Give the patient of each slide, which has to be one."""
    pairs = pd.DataFrame({"slide": codes, "patient": ids}).drop_duplicates()
    twice = pairs[pairs["slide"].duplicated(keep=False)]
    if len(twice):
        first = twice[twice["slide"] == twice["slide"].iloc[0]]
        raise TableError(
            f"{path}: slide '{slides[int(first['slide'].iloc[0])]}' belongs to the patients "
            f"'{first['patient'].iloc[0]}' and '{first['patient'].iloc[1]}'; write one patient for each slide."
        )
    return [str(p) for p in pairs.sort_values("slide")["patient"]]


def _patients_of_slides(path: Path, slides: Sequence[str], patient_of: Mapping[str, str] | None) -> list[str]:
    """Give the patient of each slide, "" for a slide that the patient sheet does not have."""
    if patient_of is None:
        return list(slides)
    patients = [patient_of.get(clean_slide_id(slide), "") for slide in slides]
    lost = [slide for slide, patient in zip(slides, patients, strict=True) if not patient]
    if slides and len(lost) == len(slides):
        raise TableError(
            f"{path}: none of its {len(slides)} slides (such as '{lost[0]}') stands in the patient sheet's column "
            f"slide_id (such as '{next(iter(patient_of), '')}'); write the names of these slides there."
        )
    tell(f"slide(s) of {path} stand in no row of the patient sheet's column slide_id and are left out", lost)
    here = {clean_slide_id(slide) for slide in slides}
    tell(f"slide(s) of the patient sheet have no instance in {path}", sorted(set(patient_of) - here))
    return patients


def _require_numbers(path: Path, dtype: np.dtype, width: int) -> None:
    if dtype.kind not in "fiu":
        raise TableError(f"{path}: its features are of type {dtype} and no numbers; store them as float32.")
    if not width:
        raise TableError(f"{path}: it has ids and no feature; give each instance at least one.")


def _require_columns(path: Path, there: Collection[str], where: Mapping[str, str]) -> list[str]:
    """Give the columns of ids that a file has, and those that `where` asks for."""
    ids = [name for name in IDS if name in there]
    if not ids:
        raise TableError(
            f"{path} names neither patients nor slides; add patient_id or slide_id for each row (features of a single "
            "slide, as TRIDENT writes them, are read from the folder that they lie in)."
        )
    for name in where:
        if name not in there:
            raise TableError(f"{path} has no column '{name}' to choose rows by; it has {', '.join(sorted(there))}.")
    return list(dict.fromkeys([*ids, *(name for name in (NAME,) if name in there), *where]))


def _text(values: Any, path: Path, name: str, first_row: int = 0) -> NDArray[np.str_]:
    """Turn ids into text (bytes are UTF-8); an empty one is refused."""
    column = pd.Series(np.asarray(values).ravel() if not isinstance(values, pd.Series) else values.to_numpy())
    if column.dtype == object:
        column = column.map(lambda v: v.decode("utf-8", "replace") if isinstance(v, bytes) else v)
    text, empty = ids_of(column)
    if empty.any() and name in IDS:
        row = int(np.flatnonzero(empty)[0]) + first_row
        raise TableError(f"{path}, row {row}: {name} is empty ({int(empty.sum())} such row(s)); fill it in.")
    return text.to_numpy(dtype=np.str_)


def _numbered(width: int) -> list[str]:
    return [f"feature_{i}" for i in range(width)]


# ---- AnnData ----------------------------------------------------------------------------------------------


def _open_h5ad(
    path: Path, patient_of: Mapping[str, str] | None, where: Mapping[str, str], embedding: bool = False
) -> Source | None:
    obs, features, dtype = _read_h5ad(path, embedding)
    if not len(obs):
        return None
    columns = {name: _text(obs[name], path, name) for name in _require_columns(path, obs.columns, where)}
    blocks = partial(_h5ad_blocks, path, rows_at_once(len(features)))
    # Of ready-made instances, names are often numbers that were given after the rows were put in some order.
    spots = obs.index.to_numpy().astype(np.str_) if embedding else None
    return _source(path, columns, features, dtype, blocks, patient_of, where, names=spots, kept=_on_tissue(obs))


def _read_h5ad(path: Path, embedding: bool) -> tuple[pd.DataFrame, list[str], np.dtype]:
    """Give all of AnnData but its numbers: obs, the names of var, and the type of X."""
    mend = "make it again with `histrata embed`" if embedding else "write it with AnnData.write_h5ad"
    if not path.is_file():
        raise TableError(f"{path}: no such file; {mend.replace(' again', '')}.")
    try:
        with h5py.File(path) as file:
            obs, features, x = read_elem(file["obs"]), list(read_elem(file["var"]).index), file["X"]
            dtype = x["data"].dtype if isinstance(x, h5py.Group) else x.dtype
    except _READ_ERRORS as error:
        raise TableError(f"{path}: not a readable .h5ad file with X ({quoted(error)}); {mend}.") from error
    for column in IDS if embedding and len(obs) else ():
        if column not in obs or obs[column].astype(str).nunique() != 1:
            raise TableError(f"{path} must name one slide and one patient, but obs['{column}'] does not; {mend}.")
    if embedding and not obs.index.is_unique:
        twice = obs.index[obs.index.duplicated()]
        raise TableError(f"{path}: spot '{twice[0]}' stands more than once ({len(twice)} row(s) too many); {mend}.")
    return obs, features, dtype


def _on_tissue(obs: pd.DataFrame) -> NDArray[np.bool_] | None:
    return np.asarray(obs["in_tissue"].astype(float) == 1) if "in_tissue" in obs else None


def _h5ad_blocks(path: Path, rows: int) -> Iterator[NDArray]:
    with h5py.File(path) as file:
        x = file["X"]
        matrix = sparse_dataset(x) if isinstance(x, h5py.Group) else x
        for at in range(0, matrix.shape[0], rows):
            block = matrix[at : at + rows]
            yield block.toarray() if hasattr(block, "toarray") else block


# ---- HDF5 -------------------------------------------------------------------------------------------------


def _shape(file: h5py.File, path: Path) -> tuple[int, int, np.dtype]:
    """Give n, d and the type of the dataset `features`, (n, d) or (1, n, d)."""
    if "features" not in file:
        raise TableError(f"{path} has no dataset 'features' but {', '.join(file) or 'nothing'}; rename or add it.")
    features = file["features"]
    shape: tuple[int, ...] = getattr(features, "shape", ())
    if len(shape) != 2 and not (len(shape) == 3 and shape[0] == 1):
        raise TableError(f"{path}: features has the shape {shape} where (n, d) or (1, n, d) was expected; reshape it.")
    return int(shape[-2]), int(shape[-1]), features.dtype


def _h5_blocks(path: Path, rows: int) -> Iterator[NDArray]:
    with h5py.File(path) as file:
        features = file["features"]
        for at in range(0, features.shape[-2], rows):
            yield features[at : at + rows] if features.ndim == 2 else features[0, at : at + rows]


def _open_h5(path: Path, patient_of: Mapping[str, str] | None, where: Mapping[str, str]) -> Source:
    try:
        with h5py.File(path) as file:
            n, width, dtype = _shape(file, path)
            names = [k for k, v in file.items() if isinstance(v, h5py.Dataset) and k != "features"]
            columns = {k: _text(file[k][()], path, k) for k in _require_columns(path, names, where)}
    except _READ_ERRORS as error:
        raise TableError(f"{path}: not a readable HDF5 file ({quoted(error)}); write it again.") from error
    _same_length(path, columns, n)
    _tell_ignored(path, set(names) - set(columns))
    blocks = partial(_h5_blocks, path, rows_at_once(width))
    return _source(path, columns, _numbered(width), dtype, blocks, patient_of, where)


def _same_length(path: Path, columns: Columns, n: int) -> None:
    for name, column in columns.items():
        if len(column) != n:
            raise TableError(f"{path}: {name} has {len(column)} rows and features {n}; write one id for each row.")


def _tell_ignored(path: Path, names: Collection[str]) -> None:
    if names:
        log.info("%s: %s not used.", path, ", ".join(sorted(names)))


def _open_folder(path: Path, patient_of: Mapping[str, str] | None, where: Mapping[str, str]) -> list[Source]:
    """Open every `.h5` of a folder, each the features of one slide."""
    files = sorted(f for f in path.iterdir() if f.suffix == ".h5" and f.is_file())
    if not files:
        raise TableError(f"{path}: no .h5 file lies in this folder; give the folder of the slides' feature files.")
    if where:
        raise TableError(
            f"{path}: rows are chosen by a column ({', '.join(where)}) and feature files have none; drop it."
        )
    tell(f"file(s) in {path} are no .h5 and are not read", sorted(f.name for f in path.iterdir() if f not in files))
    slides = [f.stem for f in files]
    patients = _patients_of_slides(path, slides, patient_of)
    opened = (_open_features(*row) for row in zip(files, slides, patients, strict=True) if row[2])
    return [source for source in opened if source is not None]


def _open_features(path: Path, slide: str, patient: str) -> Source | None:
    """Open the features of one slide, ordered by the place of the patches where it is told."""
    try:
        with h5py.File(path) as file:
            n, width, dtype = _shape(file, path)
            coords = _coords(file) if "coords" in file else None
    except _READ_ERRORS as error:
        raise TableError(f"{path}: not a readable file of features ({quoted(error)}); make it again.") from error
    if not n:
        log.warning("%s has no instance and is left out.", path)
        return None
    _require_numbers(path, dtype, width)
    order = None
    if coords is not None:
        if len(coords) != n:
            raise TableError(f"{path}: coords has {len(coords)} rows and features {n}; make the file again.")
        if (places := _by_place(coords)) is not None:
            order = np.argsort(places).astype(np.int64)
    blocks = partial(_h5_blocks, path, rows_at_once(width))
    return Source(path, (slide,), (patient,), np.zeros(n, np.int64), order, tuple(_numbered(width)), dtype, blocks)


# ---- NumPy ------------------------------------------------------------------------------------------------


def _open_npz(path: Path, patient_of: Mapping[str, str] | None, where: Mapping[str, str]) -> Source:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = [name for name in arrays.files if name != "features"]
            if "features" not in arrays.files:
                raise TableError(f"{path} has no array 'features' but {', '.join(names)}; rename or add it.")
            columns = {k: _text(arrays[k], path, k) for k in _require_columns(path, names, where)}
        with zipfile.ZipFile(path) as archive, archive.open("features.npy") as stream:
            shape, by_column, dtype = _header(stream)
    except _READ_ERRORS as error:
        raise TableError(
            f"{path}: not a readable .npz of numbers and text ({quoted(error)}); write it again."
        ) from error
    if len(shape) != 2:
        raise TableError(f"{path}: features has the shape {shape} where (n, d) was expected; reshape it.")
    _same_length(path, columns, shape[0])
    _tell_ignored(path, set(names) - set(columns))
    blocks = partial(_npz_blocks, path, rows_at_once(shape[1]), by_column)
    return _source(path, columns, _numbered(shape[1]), dtype, blocks, patient_of, where)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of a `.npy`; leave the stream where the numbers begin."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_column, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("features holds Python objects, which are not unpickled")
    return shape, by_column, dtype


def _npz_blocks(path: Path, rows: int, by_column: bool) -> Iterator[NDArray]:
    if by_column:  # Its rows lie scattered; there is no reading it in part.
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays["features"]
        return
    with zipfile.ZipFile(path) as archive, archive.open("features.npy") as stream:
        shape, _, dtype = _header(stream)
        size = shape[1] * dtype.itemsize
        for at in range(0, shape[0], rows):
            content = stream.read(min(rows, shape[0] - at) * size)
            yield np.frombuffer(content[: len(content) // size * size], dtype).reshape(-1, shape[1])


# ---- text -------------------------------------------------------------------------------------------------


def _open_text(path: Path, patient_of: Mapping[str, str] | None, where: Mapping[str, str]) -> Source:
    header, first = read_lines(path, 2)
    if len(first) > len(header):
        raise TableError(f"{path}, row 2: {len(first)} cells under a header of {len(header)}; name each column.")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise TableError(f"{path}: column '{twice[0]}' stands twice in the header; keep one of them.")
    used = _require_columns(path, header, where)
    # A column without a name is the index that pandas writes.
    features = [name for name in header if name and name not in used]
    _tell_ignored(path, {"a column without a name"} if "" in header else set())
    try:
        table = pd.read_csv(
            path,
            sep=separator(path),
            header=None,
            skiprows=1,
            names=header,
            usecols=used,
            dtype=str,
            index_col=False,
            keep_default_na=False,
        )
    except (ValueError, OSError, EOFError) as error:
        raise TableError(f"{path}: not a readable text table ({quoted(error)}); save it as CSV or TSV.") from error
    columns = {name: _text(table[name], path, name, first_row=2) for name in used}
    blocks = partial(_text_blocks, path, header, features, rows_at_once(len(features), 8))
    return _source(path, columns, features, np.float64, blocks, patient_of, where, first_row=2)


def _text_blocks(path: Path, header: list[str], features: list[str], rows: int) -> Iterator[NDArray]:
    # Of all columns: where it reads some, pandas drops cells beyond the header's last in silence.
    read = pd.read_csv(
        path, sep=separator(path), header=None, skiprows=1, names=header, chunksize=rows, index_col=False,
        low_memory=False,
    )  # fmt: skip
    at = 2
    try:
        for chunk in read:
            for name in features:
                if chunk[name].dtype.kind not in "fiu":
                    _refuse_word(path, chunk[name], at)
            yield chunk[features].to_numpy()
            at += len(chunk)
    except pd.errors.ParserError as error:
        raise TableError(f"{path}: a row does not fit the header ({quoted(error)}); correct it.") from error


def _refuse_word(path: Path, column: pd.Series, first_row: int) -> None:
    wrong = pd.to_numeric(column, errors="coerce").isna() & column.notna()
    i = int(np.argmax(wrong.to_numpy()))
    raise TableError(
        f"{path}, row {first_row + i}, column {column.name}: found '{column.iloc[i]!s}' where a number was expected; "
        f"every column but {', '.join((*IDS, NAME))} is a feature, so correct it or remove the column."
    )
