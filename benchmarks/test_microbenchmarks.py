"""The quick cases under pytest-benchmark: `pytest benchmarks/ -k "degrade and fwdbwd" --benchmark-compare`.

The same registry as `python -m benchmarks.run`, one provider a test; the gate comes first here, too. Timings
of providers are not taken in turn here: use this to watch one of them, and the runner to compare.
"""

import functools

import pytest

from benchmarks.registry import OPERATIONS, Case, Operation, Provider, Setting, load
from benchmarks.timing import measured_step
from benchmarks.verify import Gate

pytest.importorskip("pytest_benchmark")


def _parameters():
    for operation in map(load, OPERATIONS):
        for case in operation.cases:
            for mode in case.modes:
                for provider in operation.providers:
                    if (
                        case.quick
                        and not provider.warm_up
                        and provider.skip(case, Setting(mode=mode)) is None
                    ):
                        name = f"{operation.name}-{case.name}-{mode}-{provider.name}"
                        yield pytest.param(operation, case, mode, provider, id=name)


@functools.lru_cache(maxsize=1)
def _gate(operation_name: str, case_name: str, mode: str) -> Gate:
    """The reference of a case serves the tests of all its providers, which follow each other."""
    operation = load(operation_name)
    case = next(case for case in operation.cases if case.name == case_name)
    return Gate(operation, case, Setting(mode=mode))


@pytest.mark.parametrize(("operation", "case", "mode", "provider"), list(_parameters()))
def test_provider(benchmark, operation: Operation, case: Case, mode: str, provider: Provider) -> None:
    setting = Setting(mode=mode)
    run = provider.build(case, setting)
    verdict = _gate(operation.name, case.name, mode).judge(provider, run)
    assert verdict.status == "ok", verdict.detail
    computed = provider.of or operation
    inputs = computed.draw(case, setting, provider, seed=2)
    step = measured_step(computed, run, [inputs], setting)
    benchmark.pedantic(step, args=(0,), rounds=9, warmup_rounds=1)
