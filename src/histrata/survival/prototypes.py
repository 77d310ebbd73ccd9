"""Unsupervised prototypes: bags summarised by a mixture of Gaussians, and a ridge Cox regression on the summary.

As PANTHER (Song et al., CVPR 2024) and MMP (Song et al., ICML 2024) do: a mixture with diagonal covariances is fitted
to instances of the training patients, without their outcomes. A patient is then, for each prototype, the share of its
instances, and how far the mean of those lies from the prototype. Shares and means are the responsibilities' of one
expectation step; `PRIOR` instances at the prototype itself are added to each mean, so that a prototype that a patient
hardly has says nothing. The summary goes where the mean embedding goes in `histrata.survival.cox`: standardised, its
leading principal components, ridge Cox. There are d means for each share, and most of what they say is noise; so shares
are given the weight of d columns, as multiple factor analysis gives blocks of columns the same weight (Escofier & Pages
1994). Without it the components were those of the means, and shares that were planted were hardly found.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import save_file
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from histrata.errors import HistrataError, TableError
from histrata.survival.bags import Bags, parts_of
from histrata.survival.cohort import Cohort
from histrata.survival.cox import CoxModel, fit_cox, load_cox, save_cox
from histrata.survival.folder import read_arrays, read_config

Array = NDArray[np.float64]
FORMAT = "histrata-prototypes-cox-1"
PRIOR = 1.0
_MIXTURE = ("weights", "means", "covariances", "precisions_cholesky")


@dataclass(frozen=True)
class PrototypeOptions:
    """How prototypes are fitted: see `fit_prototypes`."""

    prototypes: int = 16
    per_patient: int = 200

    def __post_init__(self) -> None:
        for name in ("prototypes", "per_patient"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise HistrataError(f"{name} is {value!r}, where a whole number, 1 or more, is expected")


@dataclass(frozen=True)
class PrototypeModel:
    """A fitted model.

    Attributes
    ----------
    features
        Names of the d features of an instance.
    mean, scale
        float64 (d,): of the training instances; the scale of a constant feature is infinite.
    mixture
        C prototypes, in standardised features.
    cox
        The regression on the summary (C + C d columns).
    """

    features: tuple[str, ...]
    mean: Array
    scale: Array
    mixture: GaussianMixture
    cox: CoxModel

    @property
    def cut(self) -> float:
        """Median risk of the training patients."""
        return self.cox.cut

    def risk(self, cohort: Cohort) -> Array:
        """Return the log hazard relative to the mean training patient, float64 (patients,)."""
        return self.cox.risk(self._summarised(cohort))

    def survival(self, cohort: Cohort, times: ArrayLike) -> Array:
        """Return the probability to be free of the event at each time, float64 (patients, times)."""
        return self.cox.survival(self._summarised(cohort), times)

    def embedding(self, cohort: Cohort) -> NDArray[np.float32]:
        """Return the share of each prototype in each patient, float32 (patients, C); NaN without instances."""
        return self._summarised(cohort).pool[:, : self.mixture.n_components]

    def explain(self, instances: Any) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return of each instance of a bag what it adds to the log hazard, float32 (n,), and its prototype, int64 (n,).

        The log hazard is linear in the summary, and the summary a sum over instances: what they add sums to the
        bag's log hazard, up to what all patients have in common.
        """
        summary = self._summarise(instances)
        c = self.mixture.n_components
        pooling = self.cox.pooling
        slope = (self.cox.coefficients[: len(pooling.axes)] @ pooling.axes) / pooling.scale
        of_share, of_mean = slope[:c], slope[c:].reshape(c, -1)
        weight = 1.0 / (summary[:c] * len(instances) + PRIOR)
        told = [np.zeros(0)]
        nearest = [np.zeros(0, np.int64)]
        for x, shares in self._chunks(instances):
            along = x @ of_mean.T - (self.mixture.means_ * of_mean).sum(axis=1)
            told.append((shares * (of_share / len(instances) + weight * along)).sum(axis=1))
            nearest.append(shares.argmax(axis=1))
        return np.concatenate(told).astype(np.float32), np.concatenate(nearest)

    def name_prototype(self, index: int) -> str:
        """Name a prototype that `explain` gave by its number."""
        return f"prototype {index}"

    def _chunks(self, instances: Any) -> Iterator[tuple[Array, Array]]:
        """Give instances, standardised, and their responsibilities, a chunk at a time."""
        for part in parts_of(instances):
            x = (part - self.mean) / self.scale
            yield x, self.mixture.predict_proba(x)

    def _summarise(self, instances: Any) -> Array:
        """Return shares (C,) and mean offsets (C d,) of a bag, side by side; NaN without instances."""
        means = self.mixture.means_
        if not len(instances):
            return np.full(len(means) * (1 + means.shape[1]), np.nan)
        total, offsets = np.zeros(len(means)), np.zeros_like(means)
        for x, shares in self._chunks(instances):
            total += shares.sum(axis=0)
            offsets += shares.T @ x - shares.sum(axis=0)[:, None] * means
        return np.concatenate([total / len(instances), (offsets / (total + PRIOR)[:, None]).ravel()])

    def _summarised(self, cohort: Cohort) -> Cohort:
        """Return the cohort with the summaries in place of the mean embeddings."""
        c, d = self.mixture.means_.shape
        names = (*(f"share_{k}" for k in range(c)), *(f"{k}_{f}" for k in range(c) for f in self.features))
        if cohort.bags is not None and cohort.bags.features != self.features:
            raise TableError(
                f"The survival model was trained on {d} features that are not those of these bags "
                f"({len(cohort.bags.features)}); embed the slides with the encoder that it was trained on."
            )
        pool = np.full((len(cohort), len(names)), np.nan, np.float32)
        counts = np.zeros(len(cohort), np.int64)
        if cohort.bags is not None:
            counts = cohort.bags.counts
            for row, (first, last) in zip(pool, cohort.bags.ranges, strict=True):
                row[:] = self._summarise(cohort.bags.instances[first:last])
        return replace(cohort, pool=pool, features=names, patients=cohort.patients.assign(n_spots=counts))


def fit_prototypes(
    cohort: Cohort,
    seed: int = 0,
    *,
    prototypes: int = PrototypeOptions.prototypes,
    per_patient: int = PrototypeOptions.per_patient,
    components: int = 10,
    penalizer: float = 0.1,
) -> PrototypeModel:
    """Fit prototypes, and the regression on them, to the patients of a cohort that have follow-up.

    Parameters
    ----------
    cohort
        The training patients.
    seed
        Of the draw of instances, and of the start of the mixture.
    prototypes
        Components of the mixture; fewer where there are fewer instances.
    per_patient
        Most instances of a patient that the mixture is fitted to; all count in the patient's summary.
    components, penalizer
        Of the regression: see `histrata.survival.cox.fit_cox`.

    Raises
    ------
    HistrataError
        Less than one prototype, no instances, or what `fit_cox` raises.
    """
    PrototypeOptions(prototypes, per_patient)
    train = cohort.followed()
    known = 0 if train.bags is None else int(train.bags.counts.sum())
    if train.bags is None or known < 2:
        raise HistrataError(
            f"The prototypes have no instances to learn from: of the {len(train)} training patients {known} "
            "instance(s) are known in all; give slides, or a table of instances, of more of them."
        )
    x = _draw(train.bags, per_patient, np.random.default_rng(seed))
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 1e-8 * np.abs(mean) + 1e-12, scale, np.inf)
    mixture = GaussianMixture(min(prototypes, len(x)), covariance_type="diag", reg_covar=1e-3, random_state=seed)
    with warnings.catch_warnings():
        # It warns of fewer distinct instances than prototypes, and of a mixture that has not quite come to rest: both
        # are prototypes all the same.
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit((x - mean) / scale)
    blank = PrototypeModel(train.bags.features, mean, scale, mixture, None)  # type: ignore[arg-type]
    fit: dict[str, Any] = {"components": components, "penalizer": penalizer}
    weights = np.ones(mixture.n_components * (1 + len(mean)))
    weights[: mixture.n_components] = np.sqrt(len(mean))
    return replace(blank, cox=fit_cox(blank._summarised(train), pool=True, covariates=False, weights=weights, **fit))


def _draw(bags: Bags, most: int, rng: np.random.Generator) -> Array:
    """Return at most so many instances of each patient, float64 (n, features)."""
    drawn = []
    for first, last in bags.ranges:
        rows = np.arange(first, last)
        if len(rows) > most:
            rows = np.sort(rng.choice(rows, most, replace=False))
        drawn.append(np.asarray(bags.instances[rows], np.float64))
    return np.concatenate(drawn)


def save_prototypes(model: PrototypeModel, folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json (what the model needs, and `config` beside it), model.safetensors, and the folder cox."""
    arrays = {"mean": model.mean, "scale": model.scale}
    arrays |= {name: getattr(model.mixture, f"{name}_") for name in _MIXTURE}
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, folder / "model.safetensors")
    content = {"format": FORMAT, "features": model.features, "cut": model.cut, **config}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "cox").mkdir()
    save_cox(model.cox, folder / "cox", {})


def load_prototypes(folder: Path) -> PrototypeModel:
    """Read a model that `save_prototypes` wrote.

    Raises
    ------
    HistrataError
        A folder that does not hold such a model.
    """
    folder = Path(folder)
    config = read_config(folder, FORMAT)
    arrays = read_arrays(folder, ("mean", "scale", *_MIXTURE))
    c, d = arrays["means"].shape
    mixture = GaussianMixture(c, covariance_type="diag")
    mixture.n_features_in_ = d
    for name in _MIXTURE:
        setattr(mixture, f"{name}_", arrays[name])
    return PrototypeModel(tuple(config["features"]), arrays["mean"], arrays["scale"], mixture, load_cox(folder / "cox"))
