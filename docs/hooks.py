"""Links of a page that lead out of docs/ become plain names of files: the site has none of the repository's code."""

import re
from pathlib import PurePosixPath
from typing import Any

LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)]+|docs/[^)]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """`[SECURITY.md](../SECURITY.md)` is the file's name; what kernels/README.md links to in docs/ is a page."""

    def plain(found: re.Match[str]) -> str:
        target = PurePosixPath(found["target"])
        if target.parts[:2] == ("..", "docs"):
            return f"[{found['text']}]({PurePosixPath(*target.parts[2:])})"
        return f"{found['text']} (`{'/'.join(part for part in target.parts if part != '..')}`)"

    return LINK.sub(plain, markdown)
