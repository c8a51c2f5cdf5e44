"""A drawing of boxes, texts and arrows as SVG; equal drawings are equal text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

INK, SOFT, LINE = "#1f2328", "#59636e", "#8c959f"


@dataclass
class Drawing:
    """SVG of a size in pixels, on white, so that it reads on dark pages as well."""

    width: int
    height: int
    title: str
    parts: list[str] = field(default_factory=list)

    def box(self, x: int, y: int, width: int, height: int, fill: str = "#ffffff", stroke: str = LINE) -> None:
        """A rectangle with round corners."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{stroke}"/>'
        )

    def text(
        self, x: int, y: int, words: str, size: int = 13, fill: str = INK, anchor: str = "start", style: str = ""
    ) -> None:
        """A line of text whose baseline is at y; ``style``: bold, mono, or nothing."""
        face = {"bold": ' font-weight="600"', "mono": ' font-family="ui-monospace, Menlo, Consolas, monospace"'}
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{face.get(style, "")}>'
            f"{escape(words)}</text>"
        )

    def label(self, x: int, y: int, width: int, lines: Sequence[str], fill: str = "#ffffff", height: int = 0) -> None:
        """A box with centred lines, the first one bold."""
        height = height or 14 + 17 * len(lines)
        self.box(x, y, width, height, fill)
        first = y + (height - 17 * len(lines)) // 2 + 13
        for number, line in enumerate(lines):
            bold = {"style": "bold"} if not number else {"size": 12, "fill": SOFT}
            self.text(x + width // 2, first + 17 * number, line, anchor="middle", **bold)  # type: ignore[arg-type]

    def arrow(self, path: str, colour: str = LINE, wide: float = 1.5) -> None:
        """A line along an SVG path with a head at its end."""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{wide}" marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        """The file's text."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img" font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif">\n'
            f"<title>{escape(self.title)}</title>\n"
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="{LINE}"/></marker></defs>\n'
            f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>\n'
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"
