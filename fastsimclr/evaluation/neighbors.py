"""Where an encoder puts images: a map of their features, and nearest neighbors."""

import warnings
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fastsimclr.data import Source
from fastsimclr.data.params import epoch_order
from fastsimclr.data.sources import NO_LABEL
from fastsimclr.errors import UserError

METHODS = {"umap": "UMAP", "tsne": "t-SNE", "pca": "PCA"}
COMPONENTS = 50  # of the PCA that goes before
BLOCK_BYTES = 64 << 20  # of features read at a time

_QUERIES = 1 << 31  # an "epoch" that no other order is of: the map's images are not the gallery's


def class_names(source: Source) -> dict[int, str]:
    """The class of each label that there is."""
    labels = np.unique(source.labels[source.labels != NO_LABEL]).tolist()
    return {label: source.class_name(label) for label in labels}


def choose_method(wanted: str) -> tuple[str, str]:
    """What is drawn for --map, and why, where "auto" chooses umap or tsne. Raises UserError for a umap that is not
    here."""
    try:
        version("umap-learn")  # importing it takes many seconds
    except PackageNotFoundError as error:
        if wanted == "umap":
            raise UserError(
                "--map: got umap, but umap-learn is not installed; pip install umap-learn, or use tsne"
            ) from error
        return ("tsne", "umap-learn is not installed") if wanted == "auto" else (wanted, "")
    return ("umap", "umap-learn is installed") if wanted == "auto" else (wanted, "")


def project(features: NDArray[np.float32], method: str, seed: int) -> NDArray[np.float64]:
    """Places (N, 2) of the rows of `features` (N, D) on a map.

    Rows are normalised first, so that distances are kNN's cosines; but columns are not: to give each the same variance
    would magnify those that hardly vary, and make other neighbours. PCA to 50 columns drops noise, and time.
    """
    from sklearn.decomposition import PCA  # a second to import: only when asked for
    from sklearn.manifold import TSNE

    unit = F.normalize(torch.from_numpy(np.array(features)), dim=1).numpy()
    images, seed = len(unit), seed & 0xFFFFFFFF
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of features that are all alike, and umap's of its own dependencies
        reduced = PCA(min(COMPONENTS, *unit.shape), random_state=seed).fit_transform(unit)
        if method == "umap":
            from umap import UMAP  # type: ignore[import-untyped,import-not-found,unused-ignore]

            # One job, as it is for any seed; to say so avoids a warning.
            reduced = UMAP(n_neighbors=min(15, images - 1), random_state=seed, n_jobs=1).fit_transform(reduced)
        elif method == "tsne":
            reduced = TSNE(perplexity=min(30, (images - 1) / 3), init="pca", random_state=seed).fit_transform(reduced)
    return np.asarray(reduced[:, :2], dtype=np.float64)


def choose_queries(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Up to `count` images drawn by seed, one of each class before a second of any; in the order of their classes."""
    order = epoch_order(seed, _QUERIES, len(labels))
    turn = np.zeros(len(order), np.int64)  # how many of its class come before each
    for label in np.unique(labels):
        of_class = labels[order] == label
        turn[of_class] = np.arange(of_class.sum())
    chosen = order[np.argsort(turn, kind="stable")[:count]]
    return chosen[np.lexsort((chosen, labels[chosen]))]


def nearest(
    features: NDArray[np.float32], queries: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k rows of `features` (N, D) most like each row of `queries` (Q,), itself apart: cosines (Q, k), the largest
    first, and the rows' numbers (Q, k). features may be a file larger than memory: it is read a block at a time."""
    asked = F.normalize(torch.from_numpy(features[queries]), dim=1)
    itself = torch.from_numpy(queries)[:, None]
    best, which = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    block = max(1, BLOCK_BYTES // (4 * features.shape[1]))
    for first in range(0, len(features), block):
        rows = F.normalize(torch.from_numpy(np.array(features[first : first + block])), dim=1)
        numbers = torch.arange(first, first + len(rows)).expand(len(queries), -1)
        best = torch.cat([best, (asked @ rows.T).masked_fill(numbers == itself, -torch.inf)], dim=1)
        which = torch.cat([which, numbers], dim=1)
        best, places = best.topk(min(k, len(features) - 1, best.shape[1]), dim=1)
        which = which.gather(1, places)
    return best.numpy(), which.numpy()
