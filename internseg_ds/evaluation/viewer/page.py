"""The page itself, made of gradio's parts: a place to drop an image on, and what is seen of its segmentation.

In: a `Segmenter`. Out: an application that a web server runs. Neither it nor its page asks any other host for
anything: gradio's notices of use are off, its fonts are the system's, and a policy in each answer forbids the browser
to load what is not from here.
"""

import importlib.util
import json
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch

from internseg_ds.errors import ConfigError, UserError
from internseg_ds.evaluation.segmenter import Segmenter
from internseg_ds.evaluation.viewer.contents import contents

FOLDER = Path(__file__).parent
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
"""Content-Security-Policy (W3C, level 3); gradio's own script is made by 'unsafe-eval'."""


def check_gradio() -> None:
    """Raises ConfigError where gradio is missing, before any weights are read."""
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("a look in the browser needs gradio: pip install 'internseg-ds[show]'")


def application(segmenter: Segmenter, title: str) -> Any:
    """An ASGI application (fastapi.FastAPI) whose root is the page. It keeps images that are dropped on it in a folder
    that is removed when the server stops. Raises ConfigError where gradio is missing."""
    check_gradio()
    uploads = tempfile.TemporaryDirectory(prefix="internseg_show_")
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=uploads.name)
    import gradio
    from fastapi import FastAPI

    @asynccontextmanager
    async def running(_: Any) -> AsyncIterator[None]:
        yield
        uploads.cleanup()

    app = FastAPI(lifespan=running, docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def forbid_other_hosts(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return gradio.mount_gradio_app(
        app,
        _blocks(segmenter, title),
        path="/",
        theme=theme,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
    )


def _blocks(segmenter: Segmenter, title: str) -> Any:
    import gradio

    html, style, script = (
        (FOLDER / f"viewer.{ending}").read_text(encoding="utf-8") for ending in ("html", "css", "js")
    )
    with gradio.Blocks(title=title, analytics_enabled=False) as blocks:
        gradio.HTML(html_template="<h1>${title}</h1>", title=title, js_on_load=None)
        # a file and not gradio's Image, which would hand over what its own decoder makes of it
        file = gradio.File(label="Image", type="filepath", height=130)
        view = gradio.HTML(
            "", html_template=html, css_template=style, js_on_load=script, elem_id="view", min_height=120
        )
        # the place to drop one on is empty again when the answer is there
        file.upload(
            lambda path: (answer(segmenter, path), None), file, [view, file], api_visibility="private"
        )
    return blocks


def answer(segmenter: Segmenter, path: str) -> str:
    """What viewer.js gets for a file, in JSON: its name with its `contents`, or {"fault": a sentence} for what is no
    image."""
    name = Path(path).name
    try:
        return json.dumps({"name": name, **contents(segmenter(path))})
    except UserError as error:
        return json.dumps({"fault": str(error).replace(path, name)})
    except (MemoryError, torch.OutOfMemoryError):
        return json.dumps({"fault": f"{name} is too large for the memory of this machine"})
