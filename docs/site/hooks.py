"""Hooks for MkDocs: pages from notebooks and from files outside docs/, and links between them.

A document links to what lies beside it in the repository, so that its links also work where the repository is shown. In
the site, README.md and its siblings are pages of their own, and so is every file or folder outside docs/ to which a
document links.
"""

from __future__ import annotations

import contextlib
import json
import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks")

ROOT = Path(__file__).parents[2]
OF_THE_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Documents at the root of the repository, and the pages that they become."""
WITHOUT_MENU = "---\nhide: [navigation]\n---\n\n"
TREES = {"nla": "", "train": "train", "eval": "eval"}
"""Trees of the package: its folder, and where each is inside it."""
LINK = re.compile(r"(?<=\]\()(?P<place>[^()\s#:]+)(?=[)#])")
"""The place that a Markdown link or image names, without its fragment."""
FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)


@event_priority(100)  # before the reference looks for the package
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lay out the package as it is installed, for the reference; leave out of the menu what is not there yet."""
    installed = ROOT / "build" / "sources" / "nla"
    installed.mkdir(parents=True, exist_ok=True)
    for gone in (link for link in installed.iterdir() if not link.exists()):
        gone.unlink(missing_ok=True)
    for tree, place in TREES.items():
        folder = ROOT / tree
        for source in [folder] if place else folder.iterdir():
            with contextlib.suppress(FileExistsError):  # another build may do the same now
                (installed / source.name).symlink_to(source)
    config.nav = _present(config.nav, Path(config.docs_dir))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents of the root, the notebooks, and what documents link to outside docs/."""
    for document, page in OF_THE_ROOT.items():
        text = (ROOT / document).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=WITHOUT_MENU + text if page == "index.md" else text))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.append(File.generated(config, _as_page(notebook.src_uri), content=_notebook(notebook)))
    linked = {path for file in files.documentation_pages() for _, path in _links(file.content_string, file.src_uri)}
    for path in sorted(linked):
        page = _page_of(path)
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, content=_shown(ROOT / path, page)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages of the site."""
    here = posixpath.dirname(page.file.src_uri)
    pages = {place: posixpath.relpath(_page_of(path), here) for place, path in _links(markdown, page.file.src_uri)}
    return LINK.sub(lambda found: pages.get(found["place"], found["place"]), markdown)


def _links(markdown: str, src_uri: str) -> Iterator[tuple[str, str]]:
    """Links of a page as they are written, each with the path in the repository of the file or folder that it names."""
    document = {page: document for document, page in OF_THE_ROOT.items()}.get(src_uri, f"docs/{src_uri}")
    for found in LINK.finditer(FENCE.sub("", markdown)):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(document), found["place"]))
        if not path.startswith("..") and (ROOT / path).exists():
            yield found["place"], path


def _page_of(path: str) -> str:
    """The page or file of the site that a path of the repository has."""
    inside = path.startswith("docs/") and (ROOT / path).is_file()
    return OF_THE_ROOT.get(path) or (path.removeprefix("docs/") if inside else f"source/{path}.md")


def _shown(path: Path, page: str) -> str:
    """The page of a file or folder of the repository."""
    title = f"# `{path.relative_to(ROOT)}`\n\n"
    if path.is_dir():
        places = [
            posixpath.relpath(_page_of(str(file.relative_to(ROOT))), posixpath.dirname(page))
            for file in sorted(path.iterdir())
            if file.is_file()
        ]
        return title + "".join(f"- [{posixpath.basename(place)}]({place})\n" for place in places)
    text = path.read_text(encoding="utf-8")
    return f"{title}{_fenced(text, {'.py': 'python', '.yaml': 'yaml'}.get(path.suffix, 'text'))}\n"


def _as_page(src_uri: str) -> str:
    return str(PurePosixPath(src_uri).with_suffix(".md"))


def _notebook(file: File) -> str:
    """A notebook as Markdown: its text, its code, and what each cell gave when it last ran. Nothing is run here."""
    parts = []
    for cell in json.loads(file.content_string)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else _fenced(source, "python"))
        parts += [_output(output) for output in cell.get("outputs", ())]
    return "\n\n".join([*parts, f"[This page as a notebook]({posixpath.basename(file.src_uri)})", ""])


def _output(output: dict) -> str:
    """An output of a cell, in the best form that it has."""
    data = {kind: "".join(text) for kind, text in output.get("data", {}).items() if kind in ("text/html", "text/plain")}
    if picture := output.get("data", {}).get("image/png"):
        return f"![What the cell above draws](data:image/png;base64,{''.join(picture.split())})"
    if "text/html" in data:
        return f'<div class="output">\n{data["text/html"]}\n</div>'
    return _fenced("".join(output.get("text", data.get("text/plain", ""))), "text")


def _fenced(text: str, kind: str) -> str:
    """A block of code whose fence is longer than any inside it."""
    fence = max(("`" * (len(run) + 1) for run in re.findall(r"`{3,}", text)), key=len, default="```")
    return f"{fence}{kind}\n{text.rstrip()}\n{fence}"


def _present(entries: list, docs: Path) -> list:
    """The menu without pages that are not there yet; a pattern, such as ``tutorials/*.ipynb``, is all that match it."""
    kept = []
    for entry in entries:
        ((title, value),) = entry.items()
        if isinstance(value, list):
            value = _present(value, docs)
        elif "*" in value:
            value = sorted(_as_page(path.relative_to(docs).as_posix()) for path in docs.glob(value))
        elif not (docs / value).is_file() and value not in OF_THE_ROOT.values():
            log.info("The menu leaves out %s, which is not there", value)
            continue
        if value:
            kept.append({title: value})
    return kept
