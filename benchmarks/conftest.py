"""pytest benchmarks/: how the table of pytest-benchmark is grouped."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups the table of pytest-benchmark by case, so that a case's providers stand together."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "case" in parameters:
            group = f"{parameters['operation'].name}: {parameters['case'].name} {parameters['mode']}"
            item.add_marker(pytest.mark.benchmark(group=group))
