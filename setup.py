"""The package's long description: README.md with links that lead somewhere on a package index."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


def description(readme: str, repository: str | None) -> str:
    """The README with absolute links into the repository.

    Without an address of the repository, a link is only its text, and pictures are left out.
    """

    def absolute(link: re.Match[str]) -> str:
        image, text, path = link.groups()
        if repository is None:
            return "" if image else text
        return f"{image}[{text}]({repository.rstrip('/')}/{'raw' if image else 'blob'}/main/{path})"

    return LINK.sub(absolute, readme)


if __name__ == "__main__":
    here = Path(__file__).parent
    address = re.search(r'^Repository = "(.*)"', (here / "pyproject.toml").read_text("utf-8"), re.M)
    setup(
        long_description=description(
            (here / "README.md").read_text("utf-8"), address and address[1]
        ),
        long_description_content_type="text/markdown",
    )
