"""What the peers share: the helpers of tests/, and pairs of a transformers model and ours."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import peer_models


@pytest.fixture
def pair(tmp_path):
    """pair(family, head=…, num_labels=…, dtype=…) -> (transformers' model, ours)."""
    return lambda *args, **kwargs: peer_models.build_pair(tmp_path, *args, **kwargs)
