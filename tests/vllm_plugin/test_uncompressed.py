"""With compression off the plugin is stock LLaVA: what the serving benchmark compares with."""

from asked_server import AskedServer, for_transformers, url_part, user
from PIL import Image
from reference import Reference

from demo.scene import ANSWERS, PICTURE


def test_compression_switched_off(tmp_path):
    reference, image = Reference(), Image.open(PICTURE).convert("RGB")
    reference.model.config.compress = False
    server = AskedServer(tmp_path, "--hf-overrides", '{"compress": false}')
    try:
        for question in ANSWERS:
            expected = reference.chat(user(for_transformers(image), question), [image], None)
            assert server.ask(user(url_part(image), question)).difference(expected) < 1e-5
        # One image is one image, whatever is asked about it.
        assert server.tower_passes() == 1
        assert server.metric("vllm:prefix_cache_hits_total") > 4 * 500
    finally:
        server.stop()
