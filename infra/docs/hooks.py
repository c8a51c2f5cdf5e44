"""What MkDocs does to the pages: generated tables are put in, and links to files beside ``docs/`` lead to copies.

A page holds ``<!-- generated: NAME -->`` where a table of :mod:`infra.docs.reference` stands in the site. Files of the
project that pages link to (a benchmark's JSON, a script) come along below ``source/``, so that the site is whole
without a network.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

from mkdocs.structure.files import File, Files

from infra.docs import commands, reference, results
from wav.local import PROJECT

_LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+|(?:\.\./)+)((?:#[^)\s]*)?\))")
_MARK = re.compile(r"<!-- generated: (\w+) -->")
_TABLES = {
    "parameters": reference.parameters,
    "errors": reference.error_page,
    "commands": commands.command_page,
    "results": lambda: results.table().replace("](", "](../"),
}
#: what a browser shows as it is; everything else becomes a text
_SHOWN = (".json", ".png", ".svg", ".gif", ".txt")


def outside(page: str, target: str) -> str | None:
    """Path in the project of a link that leaves ``docs/``; None of one that does not."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") or path.startswith("..") else path


def copied(path: str) -> str:
    """Where a file or folder of the project stands in the site."""
    if (PROJECT / path).is_dir():
        return f"source/{path}/index.txt"
    return f"source/{path}" if path.endswith(_SHOWN) else f"source/{path}.txt"


def content(path: str) -> bytes:
    """A file's bytes; of a folder the names in it."""
    place = PROJECT / path
    if place.is_dir():
        names = sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())
        return "".join(f"{name}\n" for name in names if "__pycache__" not in name).encode()
    return place.read_bytes()


def on_files(files: Files, config: Any) -> Files:
    """Copies of the project's files that pages link to."""
    wanted = set()
    for file in files.documentation_pages():
        for _, target, _ in _LINK.findall(file.content_string):
            if path := outside(file.src_uri, target):
                wanted.add(path)
    for path in sorted(wanted):
        if (PROJECT / path).exists():  # else the link stays, and the strict build complains of it
            files.append(File.generated(config, copied(path), content=content(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to those copies, and the generated tables in their places."""
    here = posixpath.dirname(page.file.src_uri)

    def lead(match: re.Match[str]) -> str:
        path = outside(page.file.src_uri, match[2])
        if path is None or not (PROJECT / path).exists():
            return match[0]
        anchor = "" if path.endswith(".md") else match[3][:-1]
        return f"{match[1]}{posixpath.relpath(copied(path), here or '.')}{anchor})"

    return _LINK.sub(lead, _MARK.sub(lambda match: _TABLES[match[1]](), markdown))


def on_page_content(html: str, **_: Any) -> str:
    """Names in docstrings (Sphinx writes :meth:`name`) as code alone."""
    return re.sub(r":(?:mod|meth|func|class|data|attr):<code>[~!]?", "<code>", html)
