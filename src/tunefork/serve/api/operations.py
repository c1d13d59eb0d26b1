"""GET /health, /ready and /metrics: for those who run the server."""

from fastapi import Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from tunefork.serve.api.errors import ApiError
from tunefork.serve.gateway import Gateway


async def health(request: Request) -> Response:
    """Whether the process is well. It says so while it loads, drains or starts its engine again;
    503 means that it will not come back by itself."""
    gateway: Gateway = request.app.state.gateway
    is_well = gateway.failure is None
    engine = None
    if is_well and gateway.door.is_operator(request.headers):
        engine = {str(name): str(value) for name, value in gateway.engine.info().items()}
    body = {"status": "ok" if is_well else "failed", "state": gateway.state, "engine": engine}
    headers = {} if is_well else {"Retry-After": "5"}
    return JSONResponse(body, 200 if is_well else 503, headers)


async def ready(request: Request) -> Response:
    """Whether a request would be taken now."""
    gateway: Gateway = request.app.state.gateway
    if gateway.state != "ready":
        raise gateway.not_ready()
    return JSONResponse({"status": "ok", "state": gateway.state, "engine": None})


async def metrics(request: Request) -> Response:
    """Prometheus metrics. They tell of all tenants: where keys are demanded, an operator's is."""
    gateway: Gateway = request.app.state.gateway
    if not gateway.has_begun:
        raise gateway.not_ready()
    if not gateway.door.identify(request.headers).tenant.is_operator:
        raise ApiError(403, "Metrics are for operators", code="operators_only")
    return Response(gateway.parts.metrics.text(), media_type=CONTENT_TYPE_LATEST)
