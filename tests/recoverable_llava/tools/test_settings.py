"""Settings for the length of a block."""

import pytest

from recoverable_llava import RecoverableLlavaConfig
from recoverable_llava.tools.settings import configured


def test_put_back_however_the_block_ends():
    config = RecoverableLlavaConfig()
    with configured(config, compress=False, lof_threshold=3.0):
        assert (config.compress, config.lof_threshold) == (False, 3.0)
    assert (config.compress, config.lof_threshold) == (True, 1.5)
    with pytest.raises(KeyError), configured(config, compress=False):
        raise KeyError
    with pytest.raises(ValueError, match="lof_threshold"), configured(config, compress=False, lof_threshold=-1):
        pytest.fail("the block ran with a setting that is not allowed")
    assert (config.compress, config.lof_threshold) == (True, 1.5)


def test_unknown_fields():
    with pytest.raises(ValueError, match="no fields .'budget'"), configured(RecoverableLlavaConfig(), budget=3):
        pytest.fail("the block ran")
