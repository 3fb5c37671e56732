"""The page's server: a FastAPI application that Airflow's API server mounts under ``/matviews``."""

from __future__ import annotations

from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from airflow.api_fastapi.core_api.security import get_user
from fastapi import Depends, FastAPI, HTTPException, Request, Response, status
from fastapi.exception_handlers import http_exception_handler
from fastapi.responses import RedirectResponse
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from airflow_provider_matviews import __version__
from airflow_provider_matviews.web.api import router
from airflow_provider_matviews.web.settings import URL_PREFIX, root_path

_HEADERS = {
    # Nothing from elsewhere, nothing written into the page itself, and in a frame of Airflow's own only.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_MEDIA_TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}


class _SecurityHeaders:
    """Puts the same headers on every answer, whatever made it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        await self.app(scope, receive, send_with_headers)


def create_app() -> FastAPI:
    """Make the application. No route of it answers anybody who is not logged in."""
    app = FastAPI(
        title="Materialized views",
        description="What the record says of PostgreSQL materialized views and their runs.",
        version=__version__,
        # The one of FastAPI fetches its scripts from elsewhere; the schema itself is below.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.add_middleware(_SecurityHeaders)
    app.include_router(router)

    @app.get("/api/v1/openapi.json", include_in_schema=False, dependencies=[Depends(get_user)])
    def describe() -> dict[str, object]:
        return {**app.openapi(), "servers": [{"url": f"{root_path()}{URL_PREFIX}"}]}

    @app.get("/", include_in_schema=False, dependencies=[Depends(get_user)])
    def page() -> Response:
        content = (files("airflow_provider_matviews.web") / "static" / "index.html").read_text()
        # Where Airflow's own addresses begin: its configuration says so, and the page's address does not.
        return Response(content.replace("%ROOT%", escape(root_path())), media_type="text/html; charset=utf-8")

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        if error.status_code == status.HTTP_401_UNAUTHORIZED and request.url.path.endswith(f"{URL_PREFIX}/"):
            # A person with a browser: as Airflow's own page does.
            back = quote(f"{root_path()}{URL_PREFIX}/", safe="")
            return RedirectResponse(f"{root_path()}/api/v2/auth/login?next={back}")
        return await http_exception_handler(request, error)

    @app.get("/static/{path:path}", include_in_schema=False, dependencies=[Depends(get_user)])
    def static(path: str) -> Response:
        # By the names of what there is: whatever else the path says leads nowhere.
        if path not in _static_files():
            raise HTTPException(status.HTTP_404_NOT_FOUND, "There is no such file.")
        return _file(path, _MEDIA_TYPES[Path(path).suffix])

    return app


@cache
def _static_files() -> frozenset[str]:
    folder = files("airflow_provider_matviews.web") / "static"
    found = {each.name for each in folder.iterdir()} | {f"vendor/{each.name}" for each in (folder / "vendor").iterdir()}
    return frozenset(name for name in found if Path(name).suffix in _MEDIA_TYPES)


def _file(name: str, media_type: str) -> Response:
    content = (files("airflow_provider_matviews.web") / "static" / name).read_bytes()
    return Response(content, media_type=media_type)
