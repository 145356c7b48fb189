"""What is made when the site is built: tables of the registry, pages of files outside docs/.

A page asks for a table with a comment, `<!-- table: losses -->` (the tables are at the end of this
file), and for the reference of a package with `<!-- package: NAME -->`. CONTRIBUTING.md,
CHANGELOG.md and benchmarks/results/ become pages.
"""

from __future__ import annotations

import inspect
import posixpath
import re
from functools import partial
from pathlib import Path
from types import ModuleType

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import kdtoolkit
from kdtoolkit.core.registries import METHODS
from kdtoolkit.core.strategy import MethodSpec, StrategySpec
from kdtoolkit.methods.factory import list_methods
from kdtoolkit.pipeline.method_table import default_sum, method_options

ROOT = Path(__file__).parents[1]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
RESULTS = "benchmarks/results"
PACKAGE = re.compile(r"<!-- package: ([\w.]+) -->")
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    results = sorted((ROOT / RESULTS).iterdir())
    for path in results:
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    pages = [path for path in results if path.suffix == ".md"]
    index = "\n".join(["# Results", "", *(f"- [{title_of(p)}]({p.name})" for p in pages)])
    files.append(File.generated(config, "results/index.md", content=index))
    return files


def title_of(page: Path) -> str:
    """The first heading of a page."""
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the tables, and turn links between files into links between pages."""
    for name, table in TABLES.items():
        marker = f"<!-- table: {name} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, table())
    markdown = PACKAGE.sub(lambda match: package_reference(match[1]), markdown)
    target = page.file.src_uri
    source = repository_path(target)

    def relink(match: re.Match[str]) -> str:
        opening, link, anchor, closing = match.groups(default="")
        return opening + site_link(link, source, target) + anchor + closing

    return LINK.sub(relink, markdown)


def repository_path(page: str) -> str:
    """Where the file of a page lies in the repository."""
    for source, target in PAGES.items():
        if page == target:
            return source
    if page.startswith("results/"):
        return f"{RESULTS}/{posixpath.basename(page)}"
    return f"docs/{page}"


def site_link(link: str, source: str, target: str) -> str:
    """A link of the file `source` as the page `target` needs it; others stay as they are."""
    if "://" in link or link.startswith(("mailto:", "/")):
        return link
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if path.startswith(f"{RESULTS}/"):
        path = f"results/{posixpath.basename(path)}"
    elif path == RESULTS:
        path = "results/index.md"
    elif path in PAGES:
        path = PAGES[path]
    elif path.startswith("docs/"):
        path = path.removeprefix("docs/")
    else:
        return link
    return posixpath.relpath(path, posixpath.dirname(target))


def package_reference(package: str) -> str:
    """The reference of a package: its docstring, then each of its modules.

    What its `__init__` exports is not repeated there.
    """
    folder = ROOT.joinpath(*package.split("."))
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    head = f"::: {package}\n    options:\n      members: false\n      show_source: false\n"
    return "\n".join([head, *(f"::: {package}.{name}\n" for name in names)])


# ------------------------------------------------------------------------------ tables
def losses_table() -> str:
    """One row a method that is a sum of losses: name, paper, default sum."""
    rows = [[code(n), spec.title, default_sum(spec)] for n, spec in methods(strategies=False)]
    return markdown_table(["method", "what it is", "default sum"], rows)


def strategies_table() -> str:
    """One row a strategy: name, paper, whether it takes a teacher, default sum."""
    rows = []
    for name, spec in methods(strategies=True):
        teacher = "yes" if spec.needs_teacher else "no"
        rows.append([code(name), spec.title, teacher, default_sum(spec)])
    return markdown_table(["method", "what it is", "teacher", "default sum"], rows)


def options_table(strategies: bool) -> str:
    """One row an option: method, option, default, meaning."""
    rows = []
    for name, _ in methods(strategies):
        for option in method_options(name):
            default = code(repr(option.default))
            rows.append([code(name), code(option.name), default, cell(option.meaning)])
    return markdown_table(["method", "option", "default", "meaning"], rows)


def methods(strategies: bool) -> list[tuple[str, MethodSpec]]:
    """The registered strategies, or all other methods, by name."""
    found = [(name, METHODS[name]) for name in list_methods()]
    return [(n, spec) for n, spec in found if isinstance(spec, StrategySpec) == strategies]


def public_names_table() -> str:
    """One row a name of `kdtoolkit`: the first line of its docstring, a link to its page."""
    rows = []
    for name in kdtoolkit.__all__:
        value = getattr(kdtoolkit, name)
        if isinstance(value, ModuleType):
            rows.append([code(f"kdtoolkit.{name}"), first_line(value), f"[module](./{name}.md)"])
        elif hasattr(value, "__qualname__"):
            path = f"{value.__module__}.{value.__qualname__}"
            rows.append([f"[`{name}`][{path}]", first_line(value), code(value.__module__)])
    return markdown_table(["name", "what it is", "defined in"], rows)


def first_line(value: object) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(value) or "").partition("\n")[0]


def code(text: str) -> str:
    """Text as code in a cell of a table."""
    return f"`{cell(text)}`"


def cell(text: str) -> str:
    """Text that may stand in a cell of a table."""
    return text.replace("|", "\\|")


def markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TABLES = {
    "losses": losses_table,
    "options of losses": partial(options_table, strategies=False),
    "strategies": strategies_table,
    "options of strategies": partial(options_table, strategies=True),
    "public names": public_names_table,
}
