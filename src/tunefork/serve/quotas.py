"""How much a tenant may use: requests and tokens a minute, tokens a month.

A minute's limit is a bucket that fills evenly and holds one minute's worth. A request is let in
while the buckets are not empty, and what its answer takes is taken as it comes, below zero too: the
debt is waited for by the next request. So the mean over time is exact, without guessing how long an
answer will be. A month's limit is never passed on one server: prompt and `max_tokens` are set aside
beforehand. Of several with one file each sets aside its own answers only: what the others have
running may go over it.
"""

import calendar
import math
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from tunefork.page.units import counted
from tunefork.serve.api.errors import ApiError
from tunefork.serve.ledger import Ledger
from tunefork.serve.tenants import Tenant

_MINUTE_S = 60.0


@dataclass
class Bucket:
    """Fills by `per_minute` a minute, up to that."""

    per_minute: int
    level: float
    at: float

    def wait_s(self, now: float, wanted: float = 1.0) -> float:
        """Seconds until there are `wanted` in it; 0: there are."""
        rate = self.per_minute / _MINUTE_S
        self.level = min(self.per_minute, self.level + rate * (now - self.at))
        self.at = now
        return max(0.0, (wanted - self.level) / rate)


@dataclass
class _Spent:
    buckets: dict[str, Bucket] = field(default_factory=dict)
    reserved: int = 0
    """Tokens set aside of the month for answers that run."""


class Quotas:
    """All tenants' buckets; used from one event loop."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._spent: dict[str, _Spent] = {}

    def admit_request(self, tenant: Tenant) -> None:
        """Count a request. Raises ApiError (429) where there are too many."""
        bucket = self._bucket(tenant.name, "requests", tenant.requests_per_minute)
        if bucket is None:
            return
        if (wait_s := bucket.wait_s(time.monotonic())) > 0:
            raise _too_many("requests", bucket.per_minute, wait_s)
        bucket.level -= 1

    def admit_tokens(self, tenant: Tenant) -> None:
        """Raises ApiError (429) while the minute's tokens are used up."""
        bucket = self._bucket(tenant.name, "tokens", tenant.tokens_per_minute)
        if bucket is not None and (wait_s := bucket.wait_s(time.monotonic())) > 0:
            raise _too_many("tokens", bucket.per_minute, wait_s)

    def spend(self, tenant: Tenant, tokens: int) -> None:
        """Tokens of a prompt or an answer."""
        bucket = self._bucket(tenant.name, "tokens", tenant.tokens_per_minute)
        if bucket is not None:
            bucket.level -= tokens

    def headers(self, tenant: Tenant) -> dict[str, str]:
        """How a minute's limits stand, as the OpenAI API tells it; none where there is no limit."""
        limits = {"requests": tenant.requests_per_minute, "tokens": tenant.tokens_per_minute}
        told: dict[str, str] = {}
        for kind, per_minute in limits.items():
            bucket = self._bucket(tenant.name, kind, per_minute)
            if bucket is not None:
                full_in_s = bucket.wait_s(time.monotonic(), bucket.per_minute)
                told[f"x-ratelimit-limit-{kind}"] = str(bucket.per_minute)
                told[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.level)))
                told[f"x-ratelimit-reset-{kind}"] = _duration(full_in_s)
        return told

    def left_this_month(self, tenant: Tenant) -> int | None:
        """Tokens that are neither used nor set aside; None: no limit."""
        if tenant.tokens_per_month is None:
            return None
        reserved = self._of(tenant.name).reserved
        return tenant.tokens_per_month - self._ledger.used_this_month(tenant.name) - reserved

    def reserve(self, tenant: Tenant, tokens: int) -> None:
        """Set the most that a request can use aside. Raises ApiError (429) where it is not left."""
        left = self.left_this_month(tenant)
        if left is not None and tokens > left:
            raise ApiError(
                429,
                f"The month's quota has {counted(max(0, left), 'token')} left, and this request "
                f"may use {tokens:,}; ask for fewer max_tokens, or wait for the next month",
                kind="insufficient_quota",
                code="insufficient_quota",
                retry_after=_until_next_month_s(),
            )
        self._of(tenant.name).reserved += tokens

    def release(self, tenant: Tenant, tokens: int) -> None:
        """The request is on record: what it used counts there."""
        self._of(tenant.name).reserved -= tokens

    def _of(self, name: str) -> _Spent:
        return self._spent.setdefault(name, _Spent())

    def _bucket(self, name: str, kind: str, per_minute: int | None) -> Bucket | None:
        if per_minute is None:
            return None
        buckets = self._of(name).buckets
        bucket = buckets.get(kind)
        if bucket is None or bucket.per_minute != per_minute:
            bucket = buckets[kind] = Bucket(per_minute, float(per_minute), time.monotonic())
        return bucket


def _too_many(what: str, per_minute: int, wait_s: float) -> ApiError:
    return ApiError(
        429,
        f"Rate limit reached: {counted(per_minute, what.removesuffix('s'))} a minute",
        kind=what,
        code="rate_limit_exceeded",
        retry_after=wait_s,
    )


def _until_next_month_s() -> float:
    now = datetime.now(UTC)
    days = calendar.monthrange(now.year, now.month)[1]
    begin = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (begin + timedelta(days=days) - now).total_seconds()


def _duration(seconds: float) -> str:
    """As the API writes it: `120ms`, `7s`, `6m0s`."""
    if seconds < 1:
        return f"{math.ceil(1000 * seconds)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
