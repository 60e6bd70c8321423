"""One results value as a page: `report.html` (self-contained), `report.md` and `figures/*.png`.

The first screen answers the question; all else is folded under it.

Only formatting happens here: every number was computed by the study that wrote `results.json`. All strings of
the results are untrusted (subject names, texts): control characters are stripped, the rest is escaped by the
templates. Equal results give equal bytes.
"""

from __future__ import annotations

import base64
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from crosscoder.foundation.artifact import read_json, replace_file, unsealed
from crosscoder.foundation.console import HIDDEN
from crosscoder.report import dictionaries, effects
from crosscoder.report.figures import PICTURES
from crosscoder.report.panels import to_png
from crosscoder.report.screen import Parts, first_screen
from crosscoder.report.table import WORDS, Table
from crosscoder.report.tables import TABLES
from crosscoder.report.verdict_tables import VERDICT_TABLES
from crosscoder.results.file import RESULTS, Results, document, from_document, save_results
from crosscoder.results.quantities import NOTES, QUANTITIES, definition

SECTIONS: dict[str, tuple[str, ...]] = {
    "rule": ("gates", "labels", "statistics", "others"),
    "loads": ("loads",),
    "layers": ("layers",),
    "found": ("found",),
    "rooms": ("rooms", "law"),
    "same": ("same",),
    "shares": ("shares",),
    "models": ("models",),
    "calibration": ("calibration",),
    "run": ("run", "provenance"),
}
"""The folded sections and their tables; one without any is not there."""
FIRST = ("ratios", "spread")
"""Pictures of the first screen; a study has one of them."""
SHOWN_IN = {"loads": "loads", "profiles": "layers"}
"""The section of each other picture."""
ALL_TABLES = {**VERDICT_TABLES, **TABLES}
PARTS: dict[str, Callable[[Results], Parts]] = {"dictionaries": dictionaries.parts, "effects": effects.parts}
"""Of the kinds that are no studies."""
EMBED_LIMIT = 1_200_000  # characters of JSON that the page may carry
_TEMPLATES = Path(__file__).parent / "templates"
_CODE_SPAN = re.compile(r"(?<![`\\])(`[\w .=/-]+`)(?!`)")


def render_report(results: Results, folder: str | Path) -> Path:
    """The path of `report.html`, after writing it, `results.json`, `report.md` and `figures/*.png`.

    Raises:
        ValueError: `results` holds what a file may not; `results.json` is still written if JSON can hold the value, so
            that a long study is not lost.
    """
    if results.provenance.kind not in WORDS["titles"]:
        raise ValueError(f"a study of kind {results.provenance.kind!r} has a report of its own; see report/planted.py")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_results(results, folder)
    except (TypeError, ValueError):
        from_document(document(results))  # names the path that JSON could not hold
        raise
    # What is shown comes from the file, so that writing the report again from it gives the same bytes.
    written = read_json(folder / RESULTS)
    content = unsealed(written, folder / RESULTS)
    from_document(content)  # refused by its own strings
    shown = from_document(clean_strings(content))
    parts = _parts(shown)
    view = _view(shown, parts, _draw_figures(shown, parts.pictures, folder / "figures"))
    embedded = _embedded_json(written)
    html = _environment().get_template("report.html.j2").render(view, embedded=embedded)
    replace_file(folder / "report.md", render_markdown("report.md.j2", view).encode("utf-8"))
    replace_file(folder / "report.html", html.encode("utf-8"))
    return folder / "report.html"


def render_markdown(template: str, view: dict[str, Any]) -> str:
    """A template's Markdown, in which no value can become markup; one empty line at most between others."""
    markdown = _environment(markdown=True).get_template(template).render(view)
    return re.sub(r"\n{3,}", "\n\n", markdown.strip() + "\n")


def clean_strings(value: Any) -> Any:
    """`value` with every string on one line, without control characters and direction overrides."""
    if isinstance(value, str):
        return "".join(_clean_character(c) for c in value)
    if isinstance(value, dict):
        return {clean_strings(key): clean_strings(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean_strings(item) for item in value]
    return value


def _clean_character(c: str) -> str:
    if c in "\n\r\t\u2028\u2029":
        return " "
    return "" if unicodedata.category(c) in HIDDEN else c


def escape_markdown(value: Any) -> Markup:
    """`value` as one line of Markdown text that cannot become markup, HTML, a link or a table cell border.

    Code spans of plain characters stay; of the rest, only what Markdown would read as markup is escaped.
    """
    if isinstance(value, Markup):
        return value
    parts = _CODE_SPAN.split(" ".join(str(value).split("\n")))  # texts at even places, code spans between them
    text = "".join(part if i % 2 else _escape_text(part) for i, part in enumerate(parts))
    # A heading, a list, a line, a quotation or the definition of a link, where the value begins a line of the page.
    text = re.sub(r"^(\s*)(>|\*|#|\+(?=\s)|-(?=[\s-])|=(?==)|\[(?=.*\]:))", r"\1\\\2", text)
    return Markup(re.sub(r"^(\s*\d{1,9})([.)])(?=\s|$)", r"\1\\\2", text))


def _escape_text(text: str) -> str:
    """What opens an entity, a tag, a code span, a table border, an emphasis, a formula or a link."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    text = re.sub(r"([\\`|]|(?<!\s)\*|\*(?!\s))", r"\\\1", text)
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    text = re.sub(r"([~$])(?=\S)", r"\\\1", text)
    text = re.sub(r"(?i)\b(https?|ftp|mailto|xmpp):(?=\S)", r"\1\\:", text)  # readers make links of these, bare
    text = re.sub(r"(?i)\b(www)\.(?=\S)", r"\1\\.", text)
    return re.sub(r"\](?=\()", r"\\]", text)


def _environment(*, markdown: bool = False) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=escape_markdown if markdown else None,
    )
    environment.filters["sentence"] = lambda text: text[:1].upper() + text[1:]
    return environment


def _embedded_json(results: Any) -> str:
    """Compact ASCII JSON without '<', '>' and '&', so that no string ends the element; empty if too long."""
    body = json.dumps(results, sort_keys=True, allow_nan=False, separators=(",", ":"))
    body = body.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return body if len(body) <= EMBED_LIMIT else ""


def _parts(results: Results) -> Parts:
    """The page of one kind of results."""
    if results.provenance.kind in PARTS:
        return PARTS[results.provenance.kind](results)
    return Parts(
        screen=first_screen(results),
        tables={name: table(results) for name, table in ALL_TABLES.items()},
        titles={name: WORDS["tables"][name] for name in ALL_TABLES},
        sections=SECTIONS,
        pictures=PICTURES,
        first=FIRST,
        shown_in=SHOWN_IN,
        names=[results.of(name, "name") for name in results.subjects],
        source=True,
    )


def _draw_figures(
    results: Results, pictures: Mapping[str, Callable[[Results], Any]], folder: Path
) -> dict[str, tuple[str, int]]:
    """Each drawn figure as base64 PNG with its width in CSS pixels; files of the others are removed."""
    folder.mkdir(exist_ok=True)
    drawn = {}
    for slug, draw in pictures.items():
        path, figure = folder / f"{slug}.png", draw(results)
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        png = to_png(figure)
        replace_file(path, png)
        drawn[slug] = (base64.b64encode(png).decode("ascii"), round(figure.get_figwidth() * 100))
    return drawn


def _view(results: Results, parts: Parts, drawn: dict[str, tuple[str, int]]) -> dict[str, Any]:
    tables = {name: table for name, table in parts.tables.items() if table.rows}
    pictures = {slug: {"slug": slug, "png": png, "width": width} for slug, (png, width) in drawn.items()}
    sections = []
    for slug, names in parts.sections.items():
        title, intro = WORDS["sections"][slug]
        own = [picture for picture in pictures.values() if parts.shown_in.get(picture["slug"]) == slug]
        found = [{"title": parts.titles[name], "table": tables[name]} for name in names if name in tables]
        if found:
            one = {"slug": slug, "title": title, "intro": intro, "tables": found, "pictures": own}
            sections.append(one)
    return {
        "words": WORDS,
        "title": parts.title or WORDS["titles"][results.provenance.kind],
        "provenance": results.provenance,
        "names": parts.names,
        "source": parts.source,
        "screen": parts.screen,
        "picture": next((pictures[slug] for slug in parts.first if slug in pictures), None),
        "notes": results.verdict.notes if results.verdict else (),
        "sections": sections,
        "definitions": cited_definitions(tables.values(), parts.screen.cited()),
        "details": provenance_details(results),
    }


def provenance_details(results: Results) -> list[tuple[str, str]]:
    """The long fields of the provenance, each as indented JSON."""
    return [
        (key, json.dumps(getattr(results.provenance, key), indent=2, sort_keys=True, ensure_ascii=False))
        for key in ("config", "device", "versions")
    ]


def cited_definitions(shown: Iterable[Table], also: Iterable[str] = ()) -> dict[str, str]:
    """The definitions that tables link to, and others, in the order of the registry."""
    cited = set(also).union(*(table.cited() for table in shown))
    return {key: definition(key) for key in (*NOTES, *QUANTITIES) if key in cited}
