"""The pictures of the model and of the pipeline, drawn from the modules and from the table of stages.

    python -m infra.docs.diagrams          # writes docs/images/architecture.svg and docs/images/pipeline.svg

``tests/test_docs_made.py`` compares: after a change of the model's parts or sizes, or of the stages, draw them again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from infra.docs.svg import INK, SOFT, Drawing
from wav.config import Settings, load_settings
from wav.local import PROJECT
from wav.model import WAVTransformer
from wav.model.build import build_from_settings
from wav.model.video import JOINT_EVERY
from wav.stages import STAGES

#: what a block's parts do; a part that is new stands in the picture under its own name
PARTS = {
    "video": {"attn1": f"self-attention, joint in 1 of {JOINT_EVERY}", "attn2": "reads the instruction"},
    "value": {"attn2": "reads video block i"},
    "action": {"attn2": "reads video block i", "attn3": "reads value block i"},
}
COMMON = {"attn1": "self-attention", "ff": "feed-forward"}
LANES = ("#0969da", "#9a6700", "#1a7f37", "#8250df", "#bf3989", "#cf222e", "#57606a")
FILLS = {"video": "#ddf4ff", "value": "#fff8c5", "action": "#dafbe1"}


def blocks_of(expert: nn.Module) -> nn.ModuleList:
    """The list of an expert's blocks."""
    return next(part for part in expert.children() if isinstance(part, nn.ModuleList))


def millions(expert: nn.Module) -> str:
    """Parameters in millions."""
    return f"{sum(p.numel() for p in expert.parameters()) / 1e6:.2f} M parameters"


def _ends(settings: Settings, model: WAVTransformer) -> dict[str, tuple[list[str], list[str]]]:
    """What goes into each expert and what comes out, in words."""
    data, config = settings.data, model.config
    latents = 1 + (data.future_frames - 1) // settings.encode.temporal
    views, chunk = f"{len(data.views)} views", f"{data.action_chunk} steps"
    reads = [
        "noise of a future",
        f"{latents} latent frames, {config.in_channels} channels,",
        f"behind {data.memory_frames} seen ones, {views}",
    ]
    return {
        "video": (reads, ["future", f"{data.future_frames} frames of {views}, decoded"]),
        "value": (
            ["noise of a value trajectory", f"{chunk} x {config.value_in_channels}"],
            ["value", f"{chunk} x ({config.value_in_channels - 1} reward terms, return)"],
        ),
        "action": (
            ["noise of an action chunk", f"{chunk} x {config.action_in_channels},", "and the robot's state"],
            ["action", f"{chunk} x {data.action_dim}"],
        ),
    }


def architecture(settings: Settings) -> str:
    """The three experts of a parameter file as SVG: what each reads, its blocks' parts in order, what it predicts."""
    with torch.device("meta"):
        model = build_from_settings(settings)
    experts = dict(model.named_children())
    drawing = Drawing(980, 470, "The model: a video, a value and an action expert")
    wide, top, tall = 270, 110, 230
    for place, (name, expert) in enumerate(experts.items()):
        x = 20 + place * 335
        blocks, (reads, made) = blocks_of(expert), _ends(settings, model)[name]
        drawing.label(x + 20, 18, wide - 40, made, height=52)
        drawing.arrow(f"M{x + wide // 2} {top} V74")
        drawing.box(x, top, wide, tall, FILLS[name])
        drawing.text(x + 14, top + 24, f"{name} expert", 15, style="bold")
        width = expert.proj_in.out_features
        drawing.text(x + 14, top + 42, f"{len(blocks)} blocks of width {width}, {millions(expert)}", 12, SOFT)
        for line, (part, _) in enumerate(blocks[0].named_children()):
            words = PARTS[name].get(part, COMMON.get(part, part))
            drawing.label(x + 14, top + 56 + 41 * line, wide - 28, [words], height=34)
        drawing.label(x + 20, 372, wide - 40, reads, height=76)
        drawing.arrow(f"M{x + wide // 2} 372 V{top + tall + 2}")
    _features(drawing, list(experts), wide)
    return drawing.svg()


def _features(drawing: Drawing, names: list[str], wide: int) -> None:
    """Arrows of what one expert's blocks hand to another's, above and below the boxes' middle."""
    left = {name: 20 + 335 * place for place, name in enumerate(names)}
    if "value" in left:
        drawing.arrow(f"M{left['video'] + wide} 200 H{left['value'] - 2}", INK)
        drawing.text(left["video"] + wide + 8, 192, "features", 12, SOFT)
    if "value" in left and "action" in left:
        drawing.arrow(f"M{left['value'] + wide} 250 H{left['action'] - 2}", INK)
        drawing.text(left["value"] + wide + 8, 242, "features", 12, SOFT)
    if "action" in left:
        end = left["action"] - 2
        drawing.arrow(f"M{left['video'] + wide} 318 h20 V354 H{end - 24} V318 H{end}", INK)


def pipeline() -> str:
    """The stages as SVG: what each makes, its folders, and a line from each stage to those that read what it made."""
    row, top, lane, left = 54, 16, 22, 190
    drawing = Drawing(980, top + row * len(STAGES), "The pipeline: stages and what they make")
    names = list(STAGES)
    makers = {path: names.index(name) for name, stage in STAGES.items() for path in stage.made}
    for place, (name, stage) in enumerate(STAGES.items()):
        y = top + row * place
        drawing.box(left, y, 780, row - 10, FILLS["value" if stage.training else "video"])
        drawing.text(left + 12, y + 18, name, 14, style="bold")
        drawing.text(left + 12, y + 35, stage.makes, 12, SOFT)
        folders = list(dict.fromkeys(_folder(path) for path in (*stage.outputs, *stage.kept)))
        drawing.text(left + 768, y + 18, "  ".join(folders), 12, anchor="end", style="mono")
        for order, source in enumerate(sorted({makers[path] for path in stage.inputs})):
            begin, end = top + row * source + 37, y + 7 + 6 * order
            x = left - 16 - lane * (len(names) - 1 - source)
            bends = f"Q{x} {begin} {x} {begin + 5} V{end - 5} Q{x} {end} {x + 5} {end}"
            drawing.arrow(f"M{left} {begin} H{x + 5} {bends} H{left - 2}", LANES[source % len(LANES)])
    return drawing.svg()


def _folder(path: str) -> str:
    """The folder that a path of a stage lies in, as people name it: data/episodes/, models/video/, export/."""
    parts = Path(path).parts
    if parts[0] == "reports" and parts[-1] == "pictures":
        return f"{parts[0]}/{parts[1]}/"
    return path if "." in parts[-1] and len(parts) == 2 else "/".join(parts[:2]) + "/"


#: file below docs/images -> its text
def drawings() -> dict[str, str]:
    """Names of the files below ``docs/images/`` and what is to stand in them."""
    return {"architecture.svg": architecture(load_settings(PROJECT / "params.yaml")), "pipeline.svg": pipeline()}


def main() -> None:
    """Write them."""
    for name, text in drawings().items():
        (PROJECT / "docs" / "images" / name).write_text(text)


if __name__ == "__main__":
    main()
