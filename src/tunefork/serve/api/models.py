"""GET /v1/models and /v1/models/{name}: what this key may ask for."""

from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from tunefork.serve.adapters import Listed
from tunefork.serve.api.admission import admit
from tunefork.serve.gateway import Gateway

OWNER = "tunefork"


async def list_models(request: Request) -> Response:
    """The base, and every adapter of this tenant's over it."""
    gateway: Gateway = request.app.state.gateway
    tenant = admit(request).tenant
    data = [_base(gateway)] if tenant.has_base else []
    data += [_adapter(gateway, listed) for listed in await gateway.adapters.all_of(tenant)]
    return JSONResponse({"object": "list", "data": data})


async def get_model(request: Request) -> Response:
    """One of them. The same 404 for what does not exist and what is another tenant's."""
    model: str = request.path_params["model"]
    gateway: Gateway = request.app.state.gateway
    tenant = admit(request).tenant
    if model == gateway.base.name and tenant.has_base:
        return JSONResponse(_base(gateway))
    return JSONResponse(_adapter(gateway, await gateway.adapters.find(model, tenant)))


def _base(gateway: Gateway) -> dict[str, Any]:
    return {
        "id": gateway.base.name,
        "object": "model",
        "created": gateway.began,
        "owned_by": OWNER,
        "parent": None,
        "root": gateway.base.name,
    }


def _adapter(gateway: Gateway, listed: Listed) -> dict[str, Any]:
    return {
        "id": listed.id,
        "object": "model",
        "created": listed.created,
        "owned_by": OWNER,
        "parent": gateway.base.name,
        "root": listed.root,
    }
