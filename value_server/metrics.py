"""What the server counts, in a Prometheus registry of its own."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from value_server.engine import Engine

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
COUNTS = tuple(float(2**n) for n in range(13))


class Metrics:
    """Counters of one server. Figures of the engine are read when somebody asks."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.step_seconds = Histogram(
            "lenvm_step_seconds",
            "Time of a step request in the server, its wait included.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self._pass_seconds = Histogram(
            "lenvm_pass_seconds",
            "Time of a forward pass.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self._pass_queries = Histogram(
            "lenvm_pass_tokens",
            "Tokens and candidates in a forward pass.",
            buckets=COUNTS,
            registry=self.registry,
        )
        self._pass_jobs = Histogram(
            "lenvm_pass_requests",
            "Requests in a forward pass.",
            buckets=COUNTS,
            registry=self.registry,
        )
        self.errors = Counter(
            "lenvm_errors", "Requests refused or failed.", ["type"], registry=self.registry
        )
        cache = engine.cache
        self._gauge("lenvm_sessions", "Sessions held.", lambda: len(cache.sessions))
        self._gauge("lenvm_slots_used", "KV slots in use.", lambda: cache.used)
        self._gauge("lenvm_slots", "KV slots in all.", lambda: cache.size)
        self._gauge("lenvm_evictions", "Sessions that lost their slots.", lambda: cache.evictions)
        self._gauge(
            "lenvm_tokens_forwarded",
            "Tokens and candidates that went through the model.",
            lambda: engine.forwarded,
        )
        self._gauge(
            "lenvm_tokens_saved",
            "Tokens and candidates answered from the cache.",
            lambda: max(0, engine.requested - engine.forwarded),
        )

    def on_pass(self, queries: int, jobs: int, seconds: float) -> None:
        """See Batcher."""
        self._pass_seconds.observe(seconds)
        self._pass_queries.observe(queries)
        self._pass_jobs.observe(jobs)

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(name, text, registry=self.registry).set_function(value)
