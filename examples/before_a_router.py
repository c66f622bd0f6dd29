"""A small gateway in front of a router, which tells it of each request the length to expect.

    python examples/before_a_router.py --router http://127.0.0.1:8080 --values http://127.0.0.1:8100

Clients ask port 8090. The router gets the header `lenvm-predicted-tokens` and, for NVIDIA Dynamo,
`nvext.agent_hints.osl` in the body. Any ASGI gateway can wrap itself in `RouterHints` instead.
"""

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lenvm_vllm.api.router_hints import RouterHints
from lenvm_vllm.settings import Settings

# Of one connection alone, or told anew by either side.
HOP = {"host", "connection", "keep-alive", "te", "trailer", "upgrade"}
HOP |= {"transfer-encoding", "content-length"}


def gateway(router: str) -> Any:
    """An ASGI application that hands each request on to the router, streams included."""
    # Shorter than vLLM keeps an idle connection, 5 s: a request on one that it ends is lost.
    limits = httpx.Limits(max_connections=None, keepalive_expiry=2)
    client = httpx.AsyncClient(base_url=router, timeout=None, limits=limits)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    async def forward(request: Request) -> Response:
        headers = [(name, value) for name, value in request.headers.items() if name not in HOP]
        target = httpx.URL(path=request.url.path, query=request.url.query.encode())
        body = await request.body()
        asked = client.build_request(request.method, target, headers=headers, content=body)
        try:
            reply = await client.send(asked, stream=True)
        except httpx.TransportError as error:
            return JSONResponse({"error": f"router: {error!r}"}, 502)
        kept = {name: value for name, value in reply.headers.items() if name not in HOP}

        async def parts() -> AsyncIterator[bytes]:
            try:
                async for part in reply.aiter_raw():
                    yield part
            finally:
                await reply.aclose()

        return StreamingResponse(parts(), reply.status_code, kept)

    methods = ["GET", "POST", "DELETE"]
    return Starlette(routes=[Route("/{path:path}", forward, methods=methods)], lifespan=lifespan)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--router", default="http://127.0.0.1:8080")
    parser.add_argument("--values", default="http://127.0.0.1:8100")
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument("--no-dynamo", action="store_true", help="the header alone")
    args = parser.parse_args()
    settings = Settings(url=args.values)
    app = RouterHints(gateway(args.router), settings, dynamo=not args.no_dynamo)
    uvicorn.run(app, port=args.port)


if __name__ == "__main__":
    main()
