"""The page of `finray data show`: rows as the model sees them, in a single file.

Its template escapes all text, which is the user's data.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..common.formatting import count
from ..data.shown_rows import ShownRows
from .report import asset


def render_page(shown: ShownRows) -> str:
    """The page as HTML."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("rows.html")
    return template.render(
        css=asset("report.css"), own_css=asset("rows.css"), shown=shown, count=count
    )
