"""Figures, coloured tokens and the self-contained HTML page that joins them."""

from micro.report.page import Page, figure_html, table_html
from micro.report.tokens import TokenView, token_views_html

__all__ = ["Page", "TokenView", "figure_html", "table_html", "token_views_html"]
