"""One model for all visitors: one call at a time, answers first, and of each visitor's previews only the newest."""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from PIL import Image

from recoverable_llava.recoverable_vision import Recovery
from recoverable_llava.tools.asking import Answer, ask, recover, user_turn
from recoverable_llava.tools.pictures import open_picture


# Seconds without another key press until a preview is worth drawing, and between two looks whether the model is free.
TYPING_PAUSE = 0.25
POLLING_PAUSE = 0.05
# Pictures whose features are kept, so that another question about one costs next to nothing.
KEPT_PICTURES = 16


class SharedModel:
    """The model and its processor, as `recoverable_llava.tools.asking.load` returns them."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor
        self._lock = threading.Lock()
        self._seen: OrderedDict[tuple[str, str], Any] = OrderedDict()  # features by picture file and text_relevance

    def answers(self, *calls: tuple[list[dict], dict[str, Any]]) -> list[Answer]:
        """An answer for each conversation and its settings, one after the other, with nothing in between."""
        with self._lock:
            return [ask(self.model, self.processor, messages, **settings) for messages, settings in calls]

    async def preview(
        self, path: str, question: str, settings: dict[str, Any], is_newest: Callable[[], bool]
    ) -> tuple[Image.Image, Recovery] | None:
        """The picture of the file and what compression would keep of it; None once `is_newest` says no.

        It waits until nobody types and nobody is answered: who waits for an answer is behind no queue of previews.
        """
        await asyncio.sleep(TYPING_PAUSE)
        while is_newest():
            if not self._lock.locked():
                result = await asyncio.to_thread(self._recover_if_free, path, question, settings)
                if result is not None:
                    return result
            await asyncio.sleep(POLLING_PAUSE)
        return None

    def _recover_if_free(
        self, path: str, question: str, settings: dict[str, Any]
    ) -> tuple[Image.Image, Recovery] | None:
        if not self._lock.acquire(blocking=False):
            return None
        try:
            picture = open_picture(path)
            key = (path, settings.get("text_relevance", self.model.config.text_relevance))
            messages = [user_turn(question, picture)]
            recovery, self._seen[key] = recover(
                self.model, self.processor, messages, vision_features=self._seen.get(key), **settings
            )
            self._seen.move_to_end(key)
            if len(self._seen) > KEPT_PICTURES:
                self._seen.popitem(last=False)
            return picture, recovery
        finally:
            self._lock.release()
