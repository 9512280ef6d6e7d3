"""A family that the plugin does not run is refused in one sentence, before an engine starts."""

import pytest
from vllm import LLM

from vllm_plugin.image_embeds import ImageEmbedder


@pytest.mark.parametrize("family", ["llava_next"], indirect=True)
def test_llava_next_is_refused(repo_folder):
    sentence = "serves LLaVA-1.5, and the repo is a 'recoverable_llava_next'"
    with pytest.raises(ValueError, match=sentence):
        ImageEmbedder(repo_folder)
    for trust_remote_code in (False, True):
        with pytest.raises(ValueError, match=sentence):
            LLM(repo_folder, max_model_len=1024, trust_remote_code=trust_remote_code)
