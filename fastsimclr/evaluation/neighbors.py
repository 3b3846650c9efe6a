"""A two-dimensional map of features, and nearest neighbors."""

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
COMPONENTS = 50  # of the PCA before UMAP or t-SNE
BLOCK_BYTES = 64 << 20  # bytes of features to read at a time

_QUERIES = 1 << 31  # an epoch that no run reaches: the gallery is sampled independently of the map


def class_names(source: Source) -> dict[int, str]:
    """Map each label of the images to the name of its class."""
    labels = np.unique(source.labels[source.labels != NO_LABEL]).tolist()
    return {label: source.class_name(label) for label in labels}


def choose_method(wanted: str) -> tuple[str, str]:
    """Return the method for --map; for "auto" also the reason, else "". Raises UserError if umap is not installed."""
    try:
        version("umap-learn")  # faster than importing it, indices takes many seconds
    except PackageNotFoundError as error:
        if wanted == "umap":
            raise UserError(
                "--map: got umap, but umap-learn is not installed; pip install umap-learn, or use tsne"
            ) from error
        return ("tsne", "umap-learn is not installed") if wanted == "auto" else (wanted, "")
    return ("umap", "umap-learn is installed") if wanted == "auto" else (wanted, "")


def project(features: NDArray[np.float32], method: str, seed: int) -> NDArray[np.float64]:
    """Project `features` (N, D) to points (N, 2) of a map.

    Rows are normalized, so that distances correspond to kNN's cosines. Columns are not standardized: that would amplify
    columns that hardly vary and change the neighbors. PCA to 50 columns reduces noise and run time.
    """
    from sklearn.decomposition import PCA  # here: takes a second to import
    from sklearn.manifold import TSNE

    unit = F.normalize(torch.from_numpy(np.array(features)), dim=1).numpy()
    images, seed = len(unit), seed & 0xFFFFFFFF
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for constant features, and from umap's dependencies
        reduced = PCA(min(COMPONENTS, *unit.shape), random_state=seed).fit_transform(unit)
        if method == "umap":
            from umap import UMAP  # type: ignore[import-untyped,import-not-found,unused-ignore]

            # A seed implies n_jobs=1; passing it avoids a warning.
            reduced = UMAP(n_neighbors=min(15, images - 1), random_state=seed, n_jobs=1).fit_transform(reduced)
        elif method == "tsne":
            reduced = TSNE(perplexity=min(30, (images - 1) / 3), init="pca", random_state=seed).fit_transform(reduced)
    return np.asarray(reduced[:, :2], dtype=np.float64)


def choose_queries(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Sample up to `count` images, spread evenly over the classes, and sort them by class."""
    order = epoch_order(seed, _QUERIES, len(labels))
    rank_in_class = np.zeros(len(order), np.int64)
    for label in np.unique(labels):
        of_class = labels[order] == label
        rank_in_class[of_class] = np.arange(of_class.sum())
    chosen = order[np.argsort(rank_in_class, kind="stable")[:count]]
    return chosen[np.lexsort((chosen, labels[chosen]))]


def nearest(
    features: NDArray[np.float32], queries: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Find the k nearest neighbors of the rows `queries` (Q,) among all other rows of `features` (N, D).

    Returns cosines (Q, k), largest first, and row indices (Q, k). `features` may be a memory-mapped file larger than
    memory: it is read one block at a time.
    """
    query_rows = F.normalize(torch.from_numpy(features[queries]), dim=1)
    itself = torch.from_numpy(queries)[:, None]
    cosines, indices = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    block = max(1, BLOCK_BYTES // (4 * features.shape[1]))
    for first in range(0, len(features), block):
        rows = F.normalize(torch.from_numpy(np.array(features[first : first + block])), dim=1)
        numbers = torch.arange(first, first + len(rows)).expand(len(queries), -1)
        cosines = torch.cat([cosines, (query_rows @ rows.T).masked_fill(numbers == itself, -torch.inf)], dim=1)
        indices = torch.cat([indices, numbers], dim=1)
        cosines, order = cosines.topk(min(k, len(features) - 1, cosines.shape[1]), dim=1)
        indices = indices.gather(1, order)
    return cosines.numpy(), indices.numpy()
