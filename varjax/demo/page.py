"""Puts the tabs of the page together."""

import pathlib
from collections.abc import Sequence
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]

from varjax.demo.compare_tab import add_compare_tab
from varjax.demo.draw_tab import OPEN_LINK, add_draw_tab
from varjax.demo.drawing import DemoModel
from varjax.demo.edit_tab import add_edit_tab
from varjax.demo.inside_tab import add_inside_tab

KEPT_SECONDS = 3600  # of files that a browser may still show


def make_page(models: Sequence[DemoModel], folder: pathlib.Path) -> Any:
    """Makes the page, a `gradio.Blocks`, which `varjax.demo.server` serves.

    Args:
        models: models to draw with; the first one is chosen at the start.
        folder: folder for the files of downloads.
    """
    compiled: set[Any] = set()
    names = " and ".join(f"`{model.location}`" for model in models)
    with gr.Blocks(
        title="varjax", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)
    ) as page:
        gr.Markdown(f"# varjax\nImages from {names}")
        with gr.Tabs():
            with gr.Tab("Draw"):
                draw = add_draw_tab(models, folder, compiled)
            with gr.Tab("Compare"):
                add_compare_tab(models, compiled)
            with gr.Tab("Edit"):
                add_edit_tab(models, draw.film, compiled)
            with gr.Tab("Look inside"):
                add_inside_tab(models, draw.film)
        opened = page.load(draw.read_link, None, draw.link_outputs, show_progress="hidden")
        opened.then(None, draw.link_outputs[-1], None, js=OPEN_LINK)
    return page
