"""Every page of docs/extending/ works: its change is made on a copy of the project, and its commands pass there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.walks import PAGES, Step, Walk, copy_project

pytestmark = pytest.mark.integration

WALKS = sorted(page.stem for page in PAGES.glob("*.md") if page.stem != "README")


@pytest.mark.parametrize("name", WALKS)
def test_a_walk_works_on_a_copy(name: str, tmp_path: Path) -> None:
    walk = Walk.read((PAGES / f"{name}.md").read_text())
    assert 2 <= len(walk.files) <= 4, f"{name}.md changes {walk.files}; a walk has two to four files"
    assert walk.commands, f"{name}.md runs nothing that shows its effect"
    copy_project(tmp_path)
    walk.run(tmp_path)


def test_there_is_a_walk_for_each_thing_and_the_index_names_it() -> None:
    assert {"reward-term", "dataset-reader", "planner-score", "expert", "stage"} <= set(WALKS)
    index = (PAGES / "README.md").read_text()
    for name in WALKS:
        assert f"]({name}.md)" in index


PAGE = """
`a.txt`, change:

```diff
 one
-two
+2
```

and `b/c.txt`, new file: is no step in the middle of a line.

`b/c.txt`, new file:

```python
x = 1
```

`a.txt`, append:

```
four
```

```sh
cat b/c.txt
```
"""


def test_a_page_is_read_and_applied(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    walk = Walk.read(PAGE)
    assert walk.files == ["a.txt", "b/c.txt"]
    assert walk.commands == ("cat b/c.txt\n",)
    for step in walk.steps:
        step.apply(tmp_path)
    assert (tmp_path / "a.txt").read_text() == "one\n2\nthree\nfour\n"
    assert (tmp_path / "b/c.txt").read_text() == "x = 1\n"


def test_lines_that_are_not_there_once_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\none\nbone\n")
    with pytest.raises(ValueError, match="not once"):
        Step("a.txt", "change", "-one\n+two\n").apply(tmp_path)
    with pytest.raises(ValueError, match="not once"):
        Step("a.txt", "change", "-two\n+one\n").apply(tmp_path)
    Step("a.txt", "change", "-bone\n+two\n").apply(tmp_path)
    with pytest.raises(ValueError, match="exists already"):
        Step("a.txt", "new file", "one\n").apply(tmp_path)
