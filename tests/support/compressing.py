"""A middleware of an operator's, which compresses every answer."""

from typing import Any

from starlette.middleware.gzip import GZipMiddleware


class Compressing:
    def __init__(self, app: Any) -> None:
        self._app = GZipMiddleware(app, minimum_size=0)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)
