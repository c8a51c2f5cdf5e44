"""Futures: how far apart the futures of like states are in latent space, so whether there is anything to choose.

Two equally likely futures at distance D can be told apart at noise levels below about D / (D + 2): above, the noise
drowns the difference. Demonstrations seldom begin from the same state twice, so the futures compared are those of a
window and of the most similar state of another demonstration of the same instruction; what two such states differ in
anyway is the distance of pairs of the same style, and is taken off.

Futures that differ help no planner whose return prefers the worse one. Where demonstrations have styles, the returns of
direct windows are therefore compared with those of like states in the styles that take longer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wav.seeding import numpy_generator

if TYPE_CHECKING:
    from wav.data.latents import LatentStore
    from wav.data.store import EpisodeStore
    from wav.io.arrays import ShardedArray

#: Windows whose partners are looked for, and windows among which.
WINDOWS, POOL = 200, 4000
#: Styles that do the same and take longer (:mod:`wav.sim.styles`); after its first steps ``recover`` is direct.
LONGER = ("slow", "hesitant", "detour", "fumble")


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


def direct_ahead(
    store: EpisodeStore, latents: LatentStore, values: ShardedArray | NDArray[np.floating], windows: int = WINDOWS
) -> dict[str, float]:
    """How often the return is higher for the direct style than for another one of the same instruction, by that style.

    Below one half a search for higher returns finds the slower ways.

    Args:
        store: demonstrations; those of the style ``direct`` are compared with those of :data:`LONGER`.
        latents: of them; each direct window's partner is the most similar state.
        values: (N, channels) of every window in the store's order of frames; the last one is the return.
        windows: direct ones that are looked at.
    """
    rng, styles = numpy_generator(0, "direct_ahead"), np.array([info.style for info in store.episodes])
    texts = np.array([info.instruction for info in store.episodes])
    pool = np.sort(rng.permutation(store.frames)[:POOL])
    episode = np.searchsorted(store.offsets, pool, side="right") - 1
    asked = np.sort(rng.permutation(np.flatnonzero(styles[episode] == "direct"))[:windows])
    apart = _distances(latents.image[pool].reshape(len(pool), -1), asked)
    alike, returns = texts[episode[asked]][:, None] == texts[episode][None], np.asarray(values[pool])[:, -1]
    found: dict[str, float] = {}
    for style in LONGER:
        pairs = alike & (styles[episode] == style)
        rows = pairs.any(1)
        if rows.any():
            near = np.where(pairs, apart, np.inf)[rows].argmin(1)
            found[style] = float(np.mean(returns[asked[rows]] > returns[near]))
    return found
