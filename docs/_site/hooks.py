"""What the site's pages need beside their Markdown, which is also read as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

#: One of Sphinx's roles before code, as in :class:`Name`.
_ROLE = re.compile(r":(?:class|meth|func|data|mod|attr):(?=<code>)")
_LINK = re.compile(r'(<a href="[^"]+">)(\w+\.md)(</a>)')


def on_page_content(html: str, config: Any, **_: Any) -> str:
    """Take the roles of docstrings off the names that they mark, and call pages by their titles."""
    titles = dict(_titles(config.nav))
    html = _LINK.sub(lambda link: f"{link[1]}{titles.get(link[2], link[2])}{link[3]}", html)
    return _ROLE.sub("", html).replace("::</p>", ":</p>")


def _titles(nav: Any) -> Iterator[tuple[str, str]]:
    for entry in nav:
        for title, below in entry.items():
            if isinstance(below, str):
                yield below, title
            else:
                yield from _titles(below)
