"""Who waits for whom when visitors share the model, without a page."""

import asyncio
import threading
import time

import pytest
from batches import both_families


pytest.importorskip("gradio", reason="needs the extra demo")

from app import shared_model  # noqa: E402
from app.interface import Visit  # noqa: E402
from recoverable_llava.tools.asking import user_turn  # noqa: E402


@pytest.fixture
def shared(model_and_processor):
    return shared_model.SharedModel(*model_and_processor)


@pytest.fixture
def runs(model_and_processor, monkeypatch):
    """How often the vision tower ran, and for how many previews it did not have to."""
    model, counts = model_and_processor[0], {"tower": 0, "previews": 0}

    def counted(name, call):
        def count(*arguments, **options):
            counts[name] += 1
            return call(*arguments, **options)

        return count

    for name, method in (("tower", "get_vision_features"), ("previews", "recover_tokens")):
        monkeypatch.setattr(model, method, counted(name, getattr(model, method)))
    return counts


@pytest.fixture
def picture(tmp_path, pictures):
    pictures[0].save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


async def asked(shared, visit, picture, questions, settings=None):
    """One preview per question, each asked for before the one before is drawn."""
    previews = []
    for question in questions:
        ticket = visit.ticket()
        wanted = shared.preview(picture, question, settings or {}, lambda ticket=ticket: visit.newest is ticket)
        previews.append(asyncio.ensure_future(wanted))
        await asyncio.sleep(0.01)
    return await asyncio.gather(*previews)


def test_twenty_key_presses_are_one_preview(shared, picture, runs):
    drawn = asyncio.run(asked(shared, Visit(), picture, ["what is it?"[: end + 1] for end in range(11)] * 2))
    assert [shown is not None for shown in drawn] == [False] * 21 + [True]
    assert runs == {"tower": 1, "previews": 1}


@both_families
def test_another_question_needs_no_vision_tower_and_is_the_same(shared, picture, runs, model_and_processor):
    visit = Visit()
    for question in ("what is it?", "where is the cat?"):
        ((_, recovery),) = asyncio.run(asked(shared, visit, picture, [question]))
    assert runs == {"tower": 1, "previews": 2}
    fresh = shared_model.SharedModel(*model_and_processor)
    ((_, expected),) = asyncio.run(asked(fresh, Visit(), picture, ["where is the cat?"]))
    assert (recovery.selection.chosen_by_text == expected.selection.chosen_by_text).all()
    # What is read off the tower depends on how relevance is measured.
    asyncio.run(asked(shared, visit, picture, ["where is the cat?"], {"text_relevance": "projected"}))
    assert runs["tower"] == 3


def test_features_of_few_pictures_are_kept(shared, tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(shared_model, "KEPT_PICTURES", 2)
    for number in range(4):
        pictures[0].save(tmp_path / f"{number}.png")
        asyncio.run(asked(shared, Visit(), str(tmp_path / f"{number}.png"), ["what?"]))
    assert [key[0][-5:] for key in shared._seen] == ["2.png", "3.png"]


def test_previews_wait_for_an_answer_and_an_answer_for_no_preview(shared, picture, monkeypatch):
    """An answer that takes a while, two visitors who type meanwhile, and a second answer behind the first."""
    order, lock = [], threading.Lock()

    def used(kind, seconds, result):
        assert lock.acquire(blocking=False), "two calls of the model at once"
        order.append(kind)
        time.sleep(seconds)
        lock.release()
        return result

    monkeypatch.setattr(shared_model, "ask", lambda *_, **__: used("answer", 1.0, None))
    monkeypatch.setattr(shared_model, "recover", lambda *_, **__: used("preview", 0.05, (None, None)))
    answers = [threading.Thread(target=shared.answers, args=(([user_turn("?")], {}),)) for _ in range(2)]
    for answer in answers:
        answer.start()

    async def visitors():
        return await asyncio.gather(*(asked(shared, Visit(), picture, ["a", "ab", "abc"]) for _ in range(2)))

    drawn = asyncio.run(visitors())
    for answer in answers:
        answer.join()
    assert sorted(order) == ["answer", "answer", "preview", "preview"]
    assert order[0] == "answer" and "answer" in order[1:3]  # at most one preview may slip in between
    assert [[shown is not None for shown in each] for each in drawn] == [[False, False, True]] * 2


def test_a_preview_that_fails_leaves_the_model_free(shared, tmp_path, picture):
    (tmp_path / "broken.png").write_text("no picture")
    with pytest.raises(ValueError, match="no picture"):
        asyncio.run(asked(shared, Visit(), str(tmp_path / "broken.png"), ["what?"]))
    ((picture, _),) = asyncio.run(asked(shared, Visit(), picture, ["what?"]))
    assert picture.size == (120, 100)
