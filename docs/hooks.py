"""Hooks of mkdocs: pages from files outside docs/, and links to other files of the repository.

In the repository every link is relative to the file it stands in. On the site a link to a file that
is no page leads to a copy of that file, and a link to a folder is plain text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {  # page of the site -> file of the repository
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "peers.md": "results/peers/README.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of PAGES, and whatever file a page links to."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for page in files.documentation_pages():
        for _, _, target, _ in LINK.findall(page.content_string):
            path = _of_repository(page.src_uri, target)
            copy = _on_site(path)
            if (ROOT / path).is_file() and files.get_file_from_path(copy) is None:
                files.append(File.generated(config, copy, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links of the repository into those of the site."""
    here = page.file.src_uri

    def linked(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups("")
        path = _of_repository(here, target)
        if (ROOT / path).is_dir():
            return text
        return f"{image}[{text}]({_on_site(path)}{anchor})"

    return LINK.sub(linked, markdown)


def _of_repository(page: str, target: str) -> str:
    """The path in the repository that a link of the page means."""
    folder = posixpath.dirname(PAGES.get(page, f"docs/{page}"))
    return posixpath.normpath(posixpath.join(folder, target))


def _on_site(path: str) -> str:
    """Where the site, whose pages all lie in one folder, has a file of the repository."""
    names = {source: page for page, source in PAGES.items()}
    if path in names:
        return names[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"
