"""Fixtures that every test file may use."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data kept beside the checkout; tests that want it are skipped by name where it is absent."""
    root = Path(os.environ.get("TRUECOURSE_SHARED", Path(__file__).parents[2] / "shared"))
    if not (root / "data").is_dir():
        pytest.skip("no shared data beside the checkout (set TRUECOURSE_SHARED)")
    return root / "data"
