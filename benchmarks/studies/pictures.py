"""The two pictures of planning in README and docs, from episodes that a trained policy really ran.

    python -m benchmarks.studies.pictures WORKSPACE          # the folder of `make repro`: models/joint, data/

``docs/images/imagined.gif``: an episode; at every policy call the future that is acted on and the worst candidate's,
both imagined, beside what the simulator then showed. ``docs/images/planning.png``: one call, step by step: what the
policy sees, the candidates with their scores, the elites, and what was done. The policy executes whole chunks here, as
long as what it imagines, so that imagined and real frames are of the same steps; the first initial state that is
solved so is shown.
"""

from __future__ import annotations

import argparse
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from wav import plots
from wav.config import Settings, load_settings
from wav.errors import SimulationError
from wav.evaluation.pictures import enlarge
from wav.io.files import write_bytes
from wav.local import PROJECT
from wav.planning.planner import Planner
from wav.planning.scores import phi
from wav.planning.types import RowKey, SeededNoise
from wav.policy.export import policy_from_stages
from wav.policy.policy import Policy
from wav.sim.env import Observation
from wav.sim.registry import select_tasks
from wav.sim.workers import SimPool

STATES = 10  #: initial states that are tried
SOON = 48  #: steps of an episode that is short enough to look at
SIDE, BAR, GAP = 192, 44, 8  #: pixels of the animation's panels
INK, GOOD, BAD = "#1b1b1b", "#1a7f37", "#b3261e"
Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Call:
    """One policy call: frames are of the first view, (F, H, W, 3), the same environment steps in all of them."""

    seen: Frames  #: (H, W, 3), what the policy saw last
    scores: NDArray[np.float64]  #: (M,) of the candidates of the last iteration
    elites: tuple[int, ...]
    futures: Frames  #: (M, F, H, W, 3), imagined
    acted: Frames
    real: Frames

    @property
    def worst(self) -> int:
        """The candidate with the lowest score."""
        return int(self.scores.argmin())


@dataclass(frozen=True)
class Episode:
    """An episode that was planned."""

    instruction: str
    index: int
    solved: bool
    steps: int
    calls: tuple[Call, ...]


def plan(policy: Policy, seen: list[Observation], key: RowKey) -> tuple[NDArray[np.float32], Call]:
    """The actions (A, Ca) of one planned call and what was imagined; ``real`` is still empty."""
    settings, noise = policy.planner, SeededNoise([key], policy.model.device)
    with torch.inference_mode():
        context = policy.context([seen])
        found = Planner(policy.model, settings, policy.returns, policy.levels).plan(context, noise)
        last = found.history[-1]
        noises = [*last.z_video.unbind(1), found.z_video]
        latents = [policy.model.denoise_video(context, z, settings.denoise_steps)[0] for z in noises]
        frames = np.stack([policy.decode_future(one.float().cpu().numpy())[0] for one in latents])
    scores = phi(last.scores, settings)[0].double().cpu().numpy()
    elites = tuple(int(m) for m in last.video_elites[0])
    now = seen[-1].images[policy.data.views[0]]
    call = Call(now, scores, elites, frames[:-1], acted=frames[-1], real=frames[:0])
    return policy.actions(found.actions.float().cpu().numpy())[0], call


def run(policy: Policy, settings: Settings, pool: SimPool, task: str, index: int, limit: int) -> Episode:
    """One planned episode of at most ``limit`` steps that executes whole chunks."""
    view, stride = settings.data.views[0], settings.data.frame_stride

    def answer() -> tuple[Observation, bool, list[Frames]]:
        ((_, reply),) = pool.wait()
        if reply.observation is None:
            raise SimulationError(f"{task}, initial state {index}: {reply.error}")
        return reply.observation, reply.success, [np.asarray(frame[view]) for frame in reply.frames]

    pool.submit_reset(0, task, index, record=True)
    now, solved, _ = answer()
    seen, calls, steps = [now], [], 0
    while steps < limit and not solved:
        actions, call = plan(policy, seen, RowKey(settings.eval_libero.seed, f"{task}/{index}", len(calls)))
        pool.submit_steps(0, actions)
        now, solved, frames = answer()
        steps += len(frames)
        at = np.minimum(stride * (1 + np.arange(settings.data.future_frames)), len(frames)) - 1
        calls.append(replace(call, real=np.stack([frames[t] for t in at])))
        seen.append(now)
    return Episode(seen[0].instruction, index, solved, steps, tuple(calls))


def animation(episode: Episode, milliseconds: int) -> bytes:
    """A GIF: imagined and acted on, imagined and rejected, real; each call's scores stand above."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    width = 3 * SIDE + 2 * GAP
    names = (("imagined, acted on", GOOD), ("imagined, rejected", BAD), ("what happened", INK))
    pages, times = [], []
    for number, call in enumerate(episode.calls):
        last = number == len(episode.calls) - 1
        for step, rows in enumerate(zip(call.acted, call.futures[call.worst], call.real, strict=True)):
            page = Image.new("RGB", (width, BAR + SIDE + 22), "white")
            draw = ImageDraw.Draw(page)
            for place, ((name, colour), frame) in enumerate(zip(names, rows, strict=True)):
                left = place * (SIDE + GAP)
                page.paste(Image.fromarray(enlarge(frame, SIDE)), (left, BAR))
                draw.text((left, 4), name, colour, font)
            low, high = call.scores.min(), call.scores.max()
            draw.text((0, 24), f"best score {high:.2f}", INK, small)
            draw.text((SIDE + GAP, 24), f"worst score {low:.2f}", INK, small)
            done = f", solved after {episode.steps} steps" if last and step == len(call.real) - 1 else ""
            draw.text((0, BAR + SIDE + 5), f'"{episode.instruction}": policy call {number + 1}{done}', INK, small)
            pages.append(page)
            times.append(milliseconds)
    times[-1] = 2500
    whole = Image.fromarray(np.concatenate([np.asarray(page) for page in pages[:: max(1, len(pages) // 8)]]))
    palette = whole.quantize(128, dither=Image.Dither.NONE)
    pages = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    buffer = io.BytesIO()
    pages[0].save(buffer, "GIF", save_all=True, append_images=pages[1:], duration=times, loop=0, optimize=True)
    return buffer.getvalue()


def steps_of(call: Call, title: str) -> bytes:
    """A PNG of one call: what is seen, every candidate's last imagined frame above its score, acted on, real."""
    order = [int(m) for m in np.argsort(-call.scores)]
    columns = len(order) + 3
    figure = Figure(figsize=(1.15 * columns, 3.0), dpi=110)
    figure.suptitle(title, fontsize=10, y=0.99)
    upper = figure.add_gridspec(1, columns, left=0.005, right=0.995, top=0.80, bottom=0.42, wspace=0.06)
    lower = figure.add_gridspec(1, columns, left=0.005, right=0.995, top=0.36, bottom=0.03, wspace=0.06)
    colours = [GOOD if m in call.elites else BAD for m in order]

    def show(column: int, image: Frames, name: str, colour: str = INK) -> None:
        axes = figure.add_subplot(upper[column])
        axes.imshow(image, interpolation="nearest", aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.set_title(name, fontsize=9, color=colour)
        axes.spines[:].set(color=colour, linewidth=2)

    show(0, call.seen, "1. seen")
    for place, m in enumerate(order):
        show(1 + place, call.futures[m, -1], "elite" if m in call.elites else "rejected", colours[place])
    show(columns - 2, call.acted[-1], "3. acted on")
    show(columns - 1, call.real[-1], "4. happened")
    bars, (low, high) = figure.add_subplot(lower[1 : 1 + len(order)]), (call.scores.min(), call.scores.max())
    bars.bar(range(len(order)), call.scores[order], color=colours, width=0.7)
    bars.set(xlim=(-0.5, len(order) - 0.5), ylim=(low - 0.4 * (high - low), high + 0.35 * (high - low)), yticks=[])
    bars.set(xticks=[])
    bars.spines[["left", "top", "right"]].set_visible(False)
    for place, m in enumerate(order):
        bars.text(place, call.scores[m], f"{call.scores[m]:.2f}", ha="center", va="bottom", fontsize=9)
    figure.text(0.01, 0.2, "2. imagined\nand scored", fontsize=9, va="center")
    return plots.png(figure)


def main() -> None:
    """Run episodes until one is solved soon; draw it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--out", type=Path, default=PROJECT / "docs" / "images")
    parser.add_argument("--call", type=int, default=2, help="policy call that is shown step by step, from 1")
    arguments = parser.parse_args()
    folder = arguments.workspace
    settings = load_settings(folder / "params.yaml")
    parts = folder / "models" / "joint", folder / "data" / "latents", settings.data, settings.planner
    policy, _ = policy_from_stages(*parts, batch_size=1)
    task = select_tasks(settings.data.suite, settings.data.tasks)[0]
    with SimPool(settings.data.suite, settings.data, workers=1, slots=1) as pool:
        for index in range(STATES):
            episode = run(policy, settings, pool, task.name, index, task.max_steps)
            print(f"initial state {index}: {'solved' if episode.solved else 'not solved'} after {episode.steps} steps")
            if episode.solved and episode.steps <= SOON:
                break
    milliseconds = 1000 * settings.data.frame_stride * 2 // settings.data.control_hz  # half the real speed
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_bytes(arguments.out / "imagined.gif", animation(episode, milliseconds))
    call = episode.calls[arguments.call - 1]
    title = f'"{episode.instruction}", policy call {arguments.call}: the last imagined frame of every candidate'
    write_bytes(arguments.out / "planning.png", steps_of(call, title))


if __name__ == "__main__":
    main()
