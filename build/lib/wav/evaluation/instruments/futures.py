"""Futures: how far apart the futures of like states are in latent space, so whether there is anything to choose.

Two equally likely futures at distance D can be told apart at noise levels below about D / (D + 2): above, the noise
drowns the difference. Demonstrations seldom begin from the same state twice, so the futures compared are those of a
window and of the most similar state of another demonstration of the same instruction; what two such states differ in
anyway is the distance of pairs of the same style, and is taken off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wav.seeding import numpy_generator

if TYPE_CHECKING:
    from wav.data.latents import LatentStore
    from wav.data.store import EpisodeStore

#: Windows whose partners are looked for, and windows among which.
WINDOWS, POOL = 200, 4000


def futures_apart(store: EpisodeStore, latents: LatentStore) -> dict[str, float]:
    """Distance of futures in latents (root of the summed squares).

    Returns:
        ``same``: to the most similar state's future of the same style, ``other``: of any other style, both root mean
        squares; ``distance``: D = sqrt(other^2 - same^2); ``level``: D / (D + 2). Where all demonstrations have one
        style, or none is known, there is no ``other``, and ``distance`` is ``same``: an upper bound. Empty where no
        instruction was demonstrated twice.
    """
    rng, styles = numpy_generator(0, "futures"), np.array([info.style for info in store.episodes])
    texts = np.array([info.instruction for info in store.episodes])
    pool = np.sort(rng.permutation(store.frames)[:POOL])
    episode = np.searchsorted(store.offsets, pool, side="right") - 1
    asked = np.sort(rng.permutation(len(pool))[:WINDOWS])
    possible = texts[episode[asked]][:, None] == texts[episode][None]
    possible &= episode[asked][:, None] != episode[None]
    like = styles[episode[asked]][:, None] == styles[episode][None]
    apart = _distances(latents.image[pool].reshape(len(pool), -1), asked)
    found = {}
    for name, pairs in (("same", possible & like), ("other", possible & ~like)):
        rows = pairs.any(1)
        if rows.any():
            near = np.where(pairs, apart, np.inf)[rows].argmin(1)
            difference = latents.clip[pool[asked[rows]]] - latents.clip[pool[near]]
            found[name] = float(np.sqrt(np.square(difference, dtype=np.float64).sum() / rows.sum()))
    if not found:
        return {}
    same, other = found.get("same", 0.0), found.get("other")
    distance = same if other is None else max(0.0, other**2 - same**2) ** 0.5
    return {**found, "distance": distance, "level": distance / (distance + 2)}


def _distances(states: NDArray[np.float32], asked: NDArray[np.int64]) -> NDArray[np.float32]:
    """Squared distances (len(asked), n) of some of n states (n, d) to all."""
    sizes = np.square(states).sum(1)
    return np.asarray(sizes[asked][:, None] + sizes[None] - 2 * states[asked] @ states.T)
