"""Figures, coloured tokens, and the self-contained HTML page and the model card that join all saved results."""

from micro.report.card import update_card
from micro.report.collect import Collection, collect
from micro.report.join import build_report
from micro.report.page import Page, figure_html, table_html
from micro.report.registry import KINDS, Kind
from micro.report.tokens import TokenView, token_views_html

__all__ = [
    "KINDS",
    "Collection",
    "Kind",
    "Page",
    "TokenView",
    "build_report",
    "collect",
    "figure_html",
    "table_html",
    "token_views_html",
    "update_card",
]
