from __future__ import annotations

import pytest
from sample_report import make_report

from saetools.report import PersonaReport


@pytest.fixture(scope="session")
def report() -> PersonaReport:
    return make_report()
