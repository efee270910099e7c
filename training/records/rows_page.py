"""The page of `finray data show`: rows as the model sees them, in a single file.

Its template escapes all text, which is the user's data.
"""

from ..common.formatting import count
from ..data.shown_rows import ShownRows
from .report import asset, page_environment


def render_page(shown: ShownRows) -> str:
    """The page as HTML."""
    template = page_environment().get_template("rows.html")
    return template.render(
        css=asset("report.css"), own_css=asset("rows.css"), shown=shown, count=count
    )
