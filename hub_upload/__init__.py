"""From a LLaVA checkpoint and its CLIP to a published Hub repository: build, verify, illustrate, publish, push."""
