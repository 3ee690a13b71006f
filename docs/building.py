"""What the site needs on top of mkdocs.yml: pages of the repository's root, links out of docs/, and mathematics.

A hook of MkDocs (``on_...``) and an extension of Griffe, which reads the docstrings (:class:`Roles`).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import dho2_optax

_ROOT = Path(__file__).parents[1]
_PAGES = {  # files of the root that are pages of the site
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_NAMES = {uri: name for name, uri in _PAGES.items()}
# A block of code, which is left as it is, or a link: its text, target and anchor.
_LINK = re.compile(r"^```.*?^```|(?<!`)(\[[^]]*\])\(([^)\s#:]+)(#[^)\s]*)?\)", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> None:
    """Has Markdown's ``math`` blocks and spans written as MathML, which browsers show without a script."""
    fence = {"name": "math", "class": "math", "format": _block}
    span = {"name": "math", "class": "math", "format": _span}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    config.mdx_configs.setdefault("pymdownx.inlinehilite", {})["custom_inline"] = [span]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the root, and the files of the repository that pages link to."""
    for name, uri in _PAGES.items():
        files.append(File.generated(config, uri, content=(_ROOT / name).read_text()))
    for file in list(files.documentation_pages()):
        for path in _linked(file):
            uri = _uri(path)
            if path.is_file() and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Rewrites links that are right in the repository to what they are on the site; a folder is no page of it."""
    del kwargs

    def rewritten(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        if target is None:
            return match[0]
        path = _resolved(page.file, target)
        return text[1:-1] if path.is_dir() else f"{text}({_uri(path)}{anchor or ''})"

    return _LINK.sub(rewritten, markdown)


def _linked(file: File) -> Iterator[Path]:
    for match in _LINK.finditer(file.content_string):
        if match[2] is not None:
            yield _resolved(file, match[2])


def _resolved(file: File, target: str) -> Path:
    """The file of the repository that a link means; of a broken one, where it should be."""
    folder = _ROOT if file.src_uri in _NAMES else _ROOT / "docs"
    return (folder / target).resolve()


def _uri(path: Path) -> str:
    """Where a file of the repository is on the site."""
    name = path.relative_to(_ROOT).as_posix()
    return _PAGES.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else f"repository/{name}")


def _block(source: str, *args: Any, **kwargs: Any) -> str:
    del args, kwargs
    return convert(source, display="block")


def _span(source: str, *args: Any, **kwargs: Any) -> str:
    del args, kwargs
    return convert(source)


class Roles(griffe.Extension):
    """Docstrings are in reStructuredText's roles, as those of jax and optax; this says the same in Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the docstring of an object."""
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = _markdown(obj.docstring.value)


def _markdown(text: str) -> str:
    # Two names of the Google style that Griffe knows in the plural only.
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"^( *)\.\. math::\n+((?:\1 +\S.*\n?)+)", _as_block, text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]*)`", lambda match: f"`#!math {' '.join(match[1].split())}`", text)
    return re.sub(r":(?:class|func|meth|mod):`([^`]*)`", _as_reference, text)


def _as_block(match: re.Match[str]) -> str:
    indent, body = match.groups()
    lines = [indent + line.strip() for line in body.splitlines()]
    return "\n".join([f"{indent}```math", *lines, f"{indent}```", ""])


def _as_reference(match: re.Match[str]) -> str:
    name = match[1].removeprefix("dho2_optax.")
    return f"[`{name}`][dho2_optax.{name}]" if name in dho2_optax.__all__ else f"`{name}`"
