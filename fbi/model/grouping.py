"""Equal groups of vectors: k-means, then one balanced assignment of least cost; plain numpy, one layer at a time."""

import itertools

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int

Rows = Float[np.ndarray, "n d"]
Labels = Int[np.ndarray, " n"]


def unit(x: Rows | Bool[np.ndarray, "n d"]) -> Rows:
    """Each row divided by its L2 norm, in float32; a row of zeros stays."""
    x = np.asarray(x, np.float32)
    norm = np.sqrt(np.einsum("nd,nd->n", x, x))[:, None]
    return x / np.where(norm == 0, np.float32(1), norm)


def distances(x: Rows, centres: Float[np.ndarray, "k d"]) -> Float[np.ndarray, "n k"]:
    """Squared Euclidean distances of rows to centres, by one product of matrices; not below zero."""
    squares = np.einsum("nd,nd->n", x, x)[:, None] + np.einsum("kd,kd->k", centres, centres)[None, :]
    return np.maximum(squares - 2 * (x @ centres.T), 0)


def _spread_start(x: Rows, k: int, rng: np.random.Generator) -> Float[np.ndarray, "k d"]:
    """k-means++ (Arthur & Vassilvitskii, 2007): each centre a row drawn by its squared distance to the nearest."""
    chosen = [int(rng.integers(len(x)))]
    nearest = distances(x, x[chosen])[:, 0].astype(np.float64)
    nearest[chosen] = 0
    for _ in range(k - 1):
        total = nearest.sum()
        shares = nearest / total if total > 0 else None  # fewer different rows than centres: any row
        chosen.append(int(rng.choice(len(x), p=shares)))
        nearest = np.minimum(nearest, distances(x, x[chosen[-1:]])[:, 0])
        nearest[chosen[-1]] = 0
    return x[chosen]


def kmeans(x: Rows, k: int, rng: np.random.Generator, rounds: int = 20) -> Float[np.ndarray, "k d"]:
    """The centres of Lloyd's iterations from a k-means++ start, until no row changes its centre or for `rounds`."""
    centres = _spread_start(x, k, rng)
    labels = np.full(len(x), -1)
    for _ in range(rounds):
        new = distances(x, centres).argmin(1)
        if np.array_equal(new, labels):
            break
        labels = new
        members = scipy.sparse.csr_array((np.ones(len(x), x.dtype), (labels, np.arange(len(x)))), shape=(k, len(x)))
        sizes = np.bincount(labels, minlength=k)[:, None]
        # A centre without rows stays where it is.
        centres = np.where(sizes > 0, (members @ x) / np.maximum(sizes, 1).astype(x.dtype), centres)
    return centres


def balanced(cost: Float[np.ndarray, "n k"], size: int) -> Labels:
    """Labels of least total cost that give each of the k columns exactly `size` of the n = k size rows.

    Exact: minimum-cost flow by successive shortest paths (Ahuja, Magnanti & Orlin, Network Flows, 1993, section 9.7).
    Each row starts at its cheapest column; while a column has too many, one row moves along each edge of the cheapest
    path to a column with room. Paths lie in the graph of the k columns, where the edge a -> b costs what the cheapest
    row of a adds by moving to b: nothing of size n x n is formed.
    """
    cost = np.asarray(cost, np.float64)
    n, k = cost.shape
    assert n == k * size
    labels, columns = cost.argmin(1), np.arange(k)
    count = np.bincount(labels, minlength=k)
    edge, mover = np.full((k, k), np.inf), np.zeros((k, k), np.int64)
    slack = 1e-12 * max(float(np.abs(cost).max()), 1e-300)  # equal up to rounding is not better

    def refresh(a: int) -> None:
        own = np.flatnonzero(labels == a)
        edge[a] = np.inf
        if own.size:
            rise = cost[own] - cost[own, a][:, None]
            best = rise.argmin(0)
            edge[a], mover[a] = rise[best, columns], own[best]
            edge[a, a] = np.inf

    for a in range(k):
        refresh(a)
    while (full := count > size).any():
        # Bellman-Ford from all columns with too many at once.
        far, before, changed = np.where(full, 0.0, np.inf), np.full(k, -1), full
        while changed.any():
            sources = np.flatnonzero(changed)
            through = far[sources][:, None] + edge[sources]
            best = through.argmin(0)
            changed = through[best, columns] < far - slack
            far = np.where(changed, through[best, columns], far)
            before = np.where(changed, sources[best], before)
        b = int(np.where(count < size, far, np.inf).argmin())
        path = [b]
        while before[path[-1]] >= 0:
            path.append(int(before[path[-1]]))
        moves = [(mover[a, b], b) for b, a in itertools.pairwise(path)]
        for row, b in moves:
            labels[row] = b
        count[path[-1]] -= 1
        count[path[0]] += 1
        for a in path:
            refresh(a)
    return labels


def clustered(x: Rows, size: int, rng: np.random.Generator) -> Labels:
    """Groups of exactly `size` rows: k-means centres, then each row to a centre at least total squared distance."""
    centres = kmeans(x, len(x) // size, rng)
    return balanced(distances(x, centres), size)


def active(activations: Float[np.ndarray, "tokens ff"]) -> Bool[np.ndarray, "tokens ff"]:
    """Which neurons count as active at a token: those whose magnitude is above the token's mean magnitude."""
    magnitude = np.abs(np.asarray(activations, np.float32))
    return magnitude > magnitude.mean(1, keepdims=True)


def ordered(labels: Labels) -> Int[np.ndarray, " n"]:
    """The permutation that makes groups contiguous, in the order of their first members; within one, order stays."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(first[inverse], kind="stable")
