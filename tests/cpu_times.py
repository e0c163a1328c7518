"""A plugin of pytest: CPU time and compiled programs of each test, where other programs share the machine's cores.

    python -m pytest -p tests.cpu_times PATHS

It counts this process and the programs that tests start, so it wants no `-n`. It imports JAX when the session starts,
which is after conftest.py has set what JAX reads at import.
"""

from __future__ import annotations

import resource

import pytest

_SHOWN = 40
_compilations: list[float] = []
_rows: dict[str, tuple[float, int]] = {}


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _count(event: str, seconds: float, **_) -> None:
    if "backend_compile" in event:
        _compilations.append(seconds)


def pytest_sessionstart():
    import jax.monitoring

    jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    seconds, programs = _cpu_seconds(), len(_compilations)
    result = yield
    _rows[item.nodeid] = (_cpu_seconds() - seconds, len(_compilations) - programs)
    return result


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section(f"{sum(seconds for seconds, _ in _rows.values()):.0f} s of CPU")
    for name, (seconds, programs) in sorted(_rows.items(), key=lambda row: -row[1][0])[:_SHOWN]:
        terminalreporter.write_line(f"{seconds:7.1f} s, {programs:4} programs: {name}")
