"""Serves the page with Gradio, which calls nothing outside of this machine."""

import logging
import pathlib
import socket
import time
from collections.abc import Sequence

from starlette.requests import ClientDisconnect

from varjax.demo.drawing import DemoModel
from varjax.demo.page import make_page
from varjax.demo.picture_grid import PAGE_CSS
from varjax.errors import InputError

MOST_UPLOAD = "64mb"
MOST_WAITING = 32  # requests in the queue


def check_address(host: str, port: int) -> None:
    """Raises InputError if no program can listen on an address now.

    Args:
        host: address to listen on.
        port: port to listen on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host.strip("[]"), port), family=family).close()
    except OSError as error:
        raise _cannot_listen(host, port, error) from error


def serve_page(
    models: Sequence[DemoModel], host: str, port: int, share: bool, folder: pathlib.Path
) -> None:
    """Serves the page until Ctrl-C.

    Args:
        models: models to draw with.
        host: address to listen on.
        port: port to listen on.
        share: whether Gradio also makes a public link.
        folder: folder for the files of the page.

    Raises:
        InputError: the address or the port cannot be used, or the page does not answer there.
    """
    page = make_page(models, folder)
    logging.getLogger("uvicorn.error").addFilter(_page_is_open)
    page.queue(default_concurrency_limit=1, max_size=MOST_WAITING, api_open=False)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=share,
            quiet=True,
            show_error=True,
            prevent_thread_lock=True,
            max_file_size=MOST_UPLOAD,
            footer_links=[],
            ssr_mode=False,
            css=PAGE_CSS,
        )
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    except ValueError as error:  # from Gradio, which asks for the page once
        raise InputError(
            f"the page does not answer at {page.local_url}; start it again when this machine is "
            "less busy, and check that no proxy is between this machine and itself"
        ) from error
    print(f"open {page.local_url} in a browser; Ctrl-C stops", flush=True)
    if page.share_url:
        print(f"public link: {page.share_url}", flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        page.close()


def _cannot_listen(host: str, port: int, error: OSError) -> InputError:
    return InputError(
        f"host={host}, port={port}: cannot listen there ({error.strerror or error}); if another "
        "program does, give another --port"
    )


def _page_is_open(record: logging.LogRecord) -> bool:
    """Keeps the traceback of an upload whose page was closed out of the terminal."""
    return not (record.exc_info and isinstance(record.exc_info[1], ClientDisconnect))
