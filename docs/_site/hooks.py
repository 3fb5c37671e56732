"""What the site's pages need beside their Markdown, which is also read as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

#: One of Sphinx's roles before code, as in :class:`Name`.
_ROLE = re.compile(r":(?:class|meth|func|data|mod|attr):(?=<code>)")
_LINK = re.compile(r'(<a href="[^"]+">)(\w+\.md)(</a>)')
_ROOT = Path(__file__).resolve().parents[2]
_VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)


def on_config(config: Any, **_: Any) -> Any:
    """Say at the foot of every page of which version it is."""
    version = _VERSION.search((_ROOT / "airflow_provider_matviews" / "__init__.py").read_text())
    assert version is not None
    config.copyright = f"{config.site_name} {version[1]}"
    return config


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the changelog, which stands where everybody looks for it."""
    files.append(File.generated(config, "changelog.md", content=(_ROOT / "CHANGELOG.md").read_text()))
    return files


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
