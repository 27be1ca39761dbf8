"""Give mkdocs the pages that lie outside docs/, and one page of reference for each folder of the code."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "RELEASE.md": "release.md",
    "SECURITY.md": "reporting.md",
    "LICENSE": "LICENSE",
}
"""File beside docs/ → its address on the site."""
CODE = re.compile(r"\[([^\]]+)\]\(\.\./(?:toolkit|export|serving|examples|tests|deploy|benchmarks)/[^)]*\)")
LINK = re.compile(r"(?<=\]\()(?!https?:)[^)#\s]+")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the reference to the navigation."""
    assert config.nav is not None
    if _packages():
        config.nav.append({"Reference": [{package: f"reference/{package}.md"} for package in _packages()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, and the reference: one page a package, with its public modules."""
    for name, address in OUTSIDE.items():
        files.append(File.generated(config, address, abs_src_path=str(ROOT / name)))
    for package, modules in _packages().items():
        text = "\n\n".join([f"# {package}", *(f"::: {name}" for name in (package, *modules))])
        files.append(File.generated(config, f"reference/{package}.md", content=text + "\n"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that work in the repository at the addresses of the site; those to code become plain names."""
    markdown = CODE.sub(r"\1", markdown)
    outside = page.file.src_uri in OUTSIDE.values()

    def address(link: re.Match[str]) -> str:
        target = link[0] if outside else link[0].removeprefix("../")
        return OUTSIDE.get(target) or (target.removeprefix("docs/") if outside else link[0])

    return LINK.sub(address, markdown)


def _packages() -> dict[str, list[str]]:
    """Package → its public modules, by full names; none where the environment says REFERENCE=false."""
    if os.environ.get("REFERENCE") == "false":
        return {}
    found = {}
    for part in ("toolkit", "export", "serving"):
        for init in sorted((ROOT / part).rglob("__init__.py")):
            package = ".".join(("pkd", *init.parent.relative_to(ROOT).parts))
            found[package] = [f"{package}.{path.stem}" for path in sorted(init.parent.glob("[!_]*.py"))]
    return found
