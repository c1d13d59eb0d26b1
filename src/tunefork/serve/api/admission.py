"""Who asks, and what every answer to them tells of their limits."""

from functools import partial

from fastapi import Request

from tunefork.serve.door import Caller
from tunefork.serve.gateway import Gateway


def admit(request: Request) -> Caller:
    """Who asks, counted. Raises ApiError: 503 while not ready, 401, 429."""
    gateway: Gateway = request.app.state.gateway
    caller = gateway.identify(request.headers)
    request.scope["tenant"] = caller.tenant.name
    # Looked up when the answer begins: what it has taken until then counts.
    request.scope["limits"] = partial(gateway.parts.quotas.headers, caller.tenant)
    gateway.admit(caller.tenant)
    request.scope["cleanup"].append(partial(gateway.leave, caller.tenant))
    return caller
