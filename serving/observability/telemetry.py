"""Trace one OpenTelemetry span a request, where asked for: route templates and statuses, nothing about a person.

The attributes are our own and few: the usual instrumentation of ASGI records paths and query strings, and ours name
subjects. Where spans go is said by OpenTelemetry's own variables, such as ``OTEL_EXPORTER_OTLP_ENDPOINT``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from pkd.toolkit.core.errors import MissingExtra

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

Scope = MutableMapping[str, Any]
"""A request, as ASGI describes it."""
EndSpan = Callable[[str, int, "str | None"], None]
_tracer: Any = None


def set_up(exporter: SpanExporter | None = None) -> Callable[[], None]:
    """Begin to trace; returns the call that sends the last spans. Raises MissingExtra without the extra ``otel``.

    ``exporter``: another one than OTLP over HTTP; it is then called span by span.
    """
    global _tracer
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
    except ModuleNotFoundError:
        raise MissingExtra("opentelemetry", "otel") from None
    provider = TracerProvider(resource=Resource.create({"service.name": "pkd-serve"}))
    provider.add_span_processor(SimpleSpanProcessor(exporter) if exporter else BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = provider.get_tracer("pkd.serving")

    def finish() -> None:
        global _tracer
        _tracer = None
        provider.shutdown()

    return finish


def _no_span(route: str, status: int, problem: str | None) -> None:
    """Trace nothing."""


_NO_SPAN = nullcontext(_no_span)


def span(scope: Scope) -> AbstractContextManager[EndSpan]:
    """Open a span around a request, child of the ``traceparent`` it came with; call what it gives at the end."""
    return _NO_SPAN if _tracer is None else _span(scope)


@contextmanager
def _span(scope: Scope) -> Iterator[EndSpan]:
    from opentelemetry.trace import SpanKind, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    sent = next((value for name, value in scope["headers"] if name == b"traceparent"), b"")
    parent = TraceContextTextMapPropagator().extract({"traceparent": sent.decode("latin-1")})
    with _tracer.start_as_current_span(
        scope["method"], parent, SpanKind.SERVER, record_exception=False, set_status_on_exception=False
    ) as made:

        def end(route: str, status: int, problem: str | None) -> None:
            made.update_name(f"{scope['method']} {route}")
            made.set_attributes({"http.request.method": scope["method"], "http.route": route})
            if status:
                made.set_attribute("http.response.status_code", status)
            if problem:
                made.set_attribute("error.type", problem)
            if status >= 500:
                made.set_status(StatusCode.ERROR)

        yield end
