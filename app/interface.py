"""The page and what its controls do.

The sliders change the config of the one model for the length of a call. A broken file or a setting that the model does
not allow becomes a message on the page. Handlers take files unopened, as the component would open them itself.
"""

import math
from dataclasses import dataclass, field
from functools import partial, wraps
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

import gradio as gr

from app.shared_model import SharedModel
from recoverable_llava.recovery_settings import PRESETS
from recoverable_llava.tools.asking import (
    DRAWN_SCENES,
    Answer,
    assistant_turn,
    is_unfamiliar,
    recovery_settings,
    sees_tiles,
    user_turn,
    uses_threshold,
)
from recoverable_llava.tools.pictures import open_picture
from recoverable_llava.tools.visualize import MERGED_COLOR, TEXT_COLOR, VISION_COLOR, draw_recovery


SCENES = Path(__file__).parent / "scenes"
LARGEST_UPLOAD = "10mb"
LONGEST_QUESTION = 1000
MOST_TURNS = 20
NO_PICTURE = "Upload or pick a picture."
EXAMPLES = [  # in the size that LLaVA-1.5 sees
    ("scene_0.png", "What word is under the lemon?"),
    ("scene_0.png", "What color is the plate of the penguin?"),
    ("scene_3.png", "How many pictures of a cookie are there?"),
    ("scene_5.png", "Is the fish below the snake?"),
]
LARGE_EXAMPLES = [  # for LLaVA-NeXT
    ("large_scene.png", "What word is under the banana?"),
    ("large_scene.png", "What color is the plate of the fish?"),
    ("large_scene.png", "How many pictures of an airplane are there?"),
    ("large_scene.png", "Is the banana below the shoe?"),
]
SEEN = "The model sees its centre square only."
SEEN_IN_TILES = "The model sees all of it: in tiles, and once more as a whole."
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none is fetched
CSS = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")

ABOUT = """# Recoverable LLaVA
A LLaVA that reads only the visual tokens that matter for your question. Ask something else and watch other patches come
back. Model: `{name}`."""
KNOWS_SCENES = "This checkpoint knows drawn scenes like these, and nothing else."
PHOTO = (
    "This picture is no drawn scene, and this checkpoint knows nothing else: **its answers mean nothing here.** For "
    "photos, start the app with a compressed LLaVA: `python -m app --model FOLDER`."
)
PRESETS_SAY = (
    "default, this project's own: important patches that are unlike each other, nine in ten of them chosen by the "
    "question. paper, as published: patches whose class attention or relevance to the question is an outlier; the "
    "others are merged around centres."
)
THRESHOLDS = {
    "default": "How new a patch must be to count; higher keeps fewer tokens",
    "paper": "How far out an outlier must lie (LOF); higher keeps fewer tokens",
}
WITHOUT_EFFECT = "No effect: the budget says how many tokens stay"


@dataclass
class Visit:
    """What the server knows of a visitor's page."""

    picture: str = ""
    turns: list[dict] = field(default_factory=list)  # a new list for every conversation
    newest: object = None  # of the previews and answers that were asked for

    def show(self, picture: str) -> None:
        if picture != self.picture:
            self.picture, self.turns = picture, []

    def ticket(self) -> object:
        """Marks what is asked for now; whatever was asked for earlier is not the newest any more."""
        self.newest = object()
        return self.newest


def build_interface(model: Any, processor: Any, name: str) -> gr.Blocks:
    """The app around a model and its processor, as `recoverable_llava.tools.asking.load` returns them."""
    shared, config, num_patches = SharedModel(model, processor), model.config, model.config.num_patches
    seen, examples = (SEEN_IN_TILES, LARGE_EXAMPLES) if sees_tiles(config) else (SEEN, EXAMPLES)
    own_preset = "default" if config.selection == "novelty" else "paper"

    def settings(preset: str, novelty: float, outlier: float, budget: float) -> dict[str, Any]:
        values = (novelty, outlier, budget)
        if preset not in PRESETS or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
            raise gr.Error("A setting is not what the page offers.")
        tokens = int(budget) or None
        threshold = float(novelty if preset == "default" else outlier)
        if not uses_threshold(config, preset, tokens):
            threshold = None
        with_budget = {"visual_token_budget": tokens}
        return {**recovery_settings(config, preset, threshold, tokens), **with_budget}

    def answer_turn(path: str, turns: list[dict], question: str, chosen: dict[str, Any]) -> tuple[dict, Any]:
        """A turn with both answers, and the overlay of the compressed one."""
        picture = open_picture(path)
        short, full = shared.answers(
            (_conversation(picture, turns, question, "compressed"), chosen),
            (_conversation(picture, turns, question, "full"), {"compress": False}),
        )
        turn = {"question": question, "compressed": short.text, "full": full.text}
        turn |= {"notes": {"compressed": _note(short), "full": _note(full)}}
        return turn, (draw_recovery(picture, short.recovery, size=576, legend=False), _counts(short.recovery))

    @_errors_on_the_page
    async def preview(upload: dict | None, question: str, visit: Visit, *controls: Any) -> tuple:
        visit.show(upload["path"] if upload else "")
        ticket = visit.ticket()
        if upload is None:
            return gr.Image(None, visible=False), NO_PICTURE, gr.Markdown(visible=False), *_chats(visit.turns)
        _check_question(question)
        chosen = settings(*controls)
        shown = await shared.preview(upload["path"], question, chosen, lambda: visit.newest is ticket)
        if shown is None:
            return (gr.skip(),) * 5
        picture, recovery = shown
        overlay = gr.Image(draw_recovery(picture, recovery, size=576, legend=False), visible=True)
        notice = gr.Markdown(visible=is_unfamiliar(config, picture))
        return overlay, _counts(recovery), notice, *_chats(visit.turns)

    @_errors_on_the_page
    def answer(upload: dict | None, question: str, visit: Visit, *controls: Any) -> tuple:
        if upload is None:
            raise gr.Error(NO_PICTURE)
        if not question.strip():
            raise gr.Error("Type a question.")
        _check_question(question)
        visit.show(upload["path"])
        visit.ticket()
        turns = visit.turns
        if len(turns) >= MOST_TURNS:
            raise gr.Error("This conversation is as long as it can get here: start a new one.")
        turn, (overlay, counts) = answer_turn(upload["path"], turns, question, settings(*controls))
        if visit.turns is not turns:  # another picture or a new conversation, meanwhile
            return (gr.skip(),) * 4
        turns.append(turn)
        return *_chats(turns), gr.Image(overlay, visible=True), counts

    def forget(visit: Visit) -> tuple:
        visit.turns = []
        return _chats(visit.turns)

    def show_controls(preset: str, budget: float) -> list:
        return [_threshold(config, each, preset, budget) for each in THRESHOLDS]

    # The page opens with an example answered. The first call is slower than all others, and would be held against the
    # compressed answer.
    first_picture, first_question = str(SCENES / examples[0][0]), examples[0][1]
    own_budget = config.visual_token_budget or 0
    own_settings = settings(own_preset, config.novelty_threshold, config.lof_threshold, own_budget)
    answer_turn(first_picture, [], first_question, own_settings)
    first_turn, (first_overlay, first_counts) = answer_turn(first_picture, [], first_question, own_settings)

    with gr.Blocks(title="Recoverable LLaVA") as interface:
        knows_scenes = getattr(config, "picture_domain", None) == DRAWN_SCENES
        gr.Markdown(ABOUT.format(name=name))
        with gr.Row():
            with gr.Column(min_width=320):
                gr.HTML(f"<b>Picture</b> {seen}", elem_classes="caption", padding=False)
                picture = gr.Image(
                    first_picture,
                    label="Picture",
                    show_label=False,
                    sources=["upload", "clipboard"],
                    height=260,
                    elem_id="picture",
                )
                question = gr.Textbox(
                    first_question,
                    label="Question",
                    elem_id="question",
                    max_length=LONGEST_QUESTION,
                    submit_btn=True,
                )
                gr.HTML(f"<b>Pictures to try</b> {KNOWS_SCENES * knows_scenes}", elem_classes="caption", padding=False)
                with gr.Row(elem_id="examples"):
                    buttons = [
                        gr.Button(text, icon=str(SCENES / file), size="sm", min_width=200) for file, text in examples
                    ]
            with gr.Column(min_width=320):
                counts = gr.HTML(first_counts, elem_id="counts", padding=False)
                overlay = gr.Image(
                    first_overlay,
                    label="What stays",
                    show_label=False,
                    interactive=False,
                    elem_id="overlay",
                    elem_classes="tiled" if sees_tiles(config) else None,
                    buttons=["download", "fullscreen"],
                )
        notice = gr.Markdown(PHOTO, visible=False, elem_id="notice")
        with gr.Row():
            waiting = "Send the question to see the answer."
            compressed, full = (
                gr.Chatbot(
                    chat,
                    label=label,
                    elem_id=key,
                    height=230,
                    min_width=320,
                    buttons=[],
                    placeholder=waiting,
                )
                for (key, label), chat in zip(
                    {"compressed": "With compression", "full": "All visual tokens"}.items(), _chats([first_turn])
                )
            )
        again = gr.Button("New conversation", elem_id="again", size="sm")
        with gr.Group():
            preset = gr.Radio(
                list(PRESETS), value=own_preset, label="How tokens are chosen", info=PRESETS_SAY, elem_id="preset"
            )
            budget = gr.Slider(
                0,
                num_patches,
                own_budget,
                step=1,
                label="Budget",
                info="Exactly so many tokens; 0: as many as picture and question need",
                elem_id="budget",
            )
            thresholds = [
                _threshold(config, each, own_preset, own_budget, elem_id=f"threshold_{each}") for each in THRESHOLDS
            ]

        visit = gr.State(Visit(picture.value["path"], [first_turn]))
        inputs = [picture, question, visit, preset, *thresholds, budget]
        previewed = [overlay, counts, notice, compressed, full]
        answered = [compressed, full, overlay, counts]
        private: dict[str, Any] = {"api_visibility": "private"}
        for control in (
            question.input,
            picture.change,
            preset.input,
            budget.input,
            *(each.input for each in thresholds),
        ):
            control(
                preview,
                inputs,
                previewed,
                preprocess=False,
                trigger_mode="multiple",
                concurrency_limit=None,
                show_progress="hidden",
                **private,
            )
        one_at_a_time: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "answers", "preprocess": False}
        question.submit(answer, inputs, answered, **one_at_a_time)
        for button, (file, text) in zip(buttons, examples):
            picked = button.click(partial(_picked, file, text), None, [picture, question], queue=False, **private)
            picked.then(answer, inputs, answered, **one_at_a_time, **private)
        gr.on([preset.input, budget.input], show_controls, [preset, budget], thresholds, queue=False, **private)
        gr.on([again.click, compressed.clear, full.clear], forget, visit, [compressed, full], queue=False, **private)
    return interface


def _picked(file: str, question: str) -> tuple[str, str]:
    return str(SCENES / file), question


def _threshold(config: Any, preset: str, chosen_preset: str, budget: float, **options: Any) -> gr.Slider:
    """The slider of a preset's threshold: there for the preset that is chosen, alive where it decides something."""
    steps = {"default": (0.0, 1.0, 0.025, config.novelty_threshold), "paper": (1.0, 4.0, 0.1, config.lof_threshold)}
    lowest, highest, step, value = steps[preset]
    is_alive = uses_threshold(config, preset, int(budget) or None)
    return gr.Slider(
        lowest,
        highest,
        **({"value": value} if options else {}),
        step=step,
        label="Threshold",
        info=THRESHOLDS[preset] if is_alive else WITHOUT_EFFECT,
        interactive=is_alive,
        visible=preset == chosen_preset,
        **options,
    )


def _check_question(question: str) -> None:
    if len(question) > LONGEST_QUESTION:  # the page's own limit does not bind who calls without it
        raise gr.Error(f"A question may have {LONGEST_QUESTION} characters.")


def _errors_on_the_page(handler: Any) -> Any:
    """Turns what a visitor can put right into a message that names the file as the visitor does."""

    def on_the_page(error: ValueError, upload: dict | None) -> gr.Error:
        path = upload["path"] if upload else ""
        return gr.Error(str(error).replace(path, Path(path).name), print_exception=False)

    @wraps(handler)
    def handle(upload: dict | None, *arguments: Any) -> Any:
        try:
            return handler(upload, *arguments)
        except ValueError as error:
            raise on_the_page(error, upload) from None

    @wraps(handler)
    async def handle_later(upload: dict | None, *arguments: Any) -> Any:
        try:
            return await handler(upload, *arguments)
        except ValueError as error:
            raise on_the_page(error, upload) from None

    return handle_later if iscoroutinefunction(handler) else handle


def _conversation(picture: Any, turns: list[dict], question: str, answer_key: str) -> list[dict]:
    messages = []
    for turn in turns:
        messages += [user_turn(turn["question"]), assistant_turn(turn[answer_key])]
    messages.append(user_turn(question))
    messages[0] = user_turn(turns[0]["question"] if turns else question, picture)
    return messages


def _counts(recovery: Any) -> str:
    """How many of the picture's tokens stay, and of which kind, each with the mark that the overlay gives it."""
    selection = recovery.selection
    kept, (total,) = int(selection.num_tokens), recovery.num_uncompressed
    kinds = [
        ("vision", VISION_COLOR, int(selection.num_visual), "kept by vision"),
        ("text", TEXT_COLOR, int(selection.num_text), "recovered for the question"),
        ("merged", MERGED_COLOR, int(selection.num_merged), "merged from the rest"),
    ]
    rows = "".join(
        f'<span><i class="{kind}" style="--mark: rgb{color}"></i>{number} {text}</span>'
        for kind, color, number, text in kinds
    )
    return f"<b>{kept} of {total}</b> visual tokens ({100 * kept / total:.0f} %)<p>{rows}</p>"


def _note(answer: Answer) -> str:
    return f"{answer.num_tokens} of {answer.num_uncompressed} visual tokens, {answer.seconds:.2f} s"


def _chats(turns: list[dict]) -> tuple[list[dict], list[dict]]:
    """The messages of both chats."""
    chats: tuple[list[dict], list[dict]] = ([], [])
    for turn in turns:
        for key, messages in zip(("compressed", "full"), chats):
            messages.append({"role": "user", "content": turn["question"]})
            messages.append({"role": "assistant", "content": f"{turn[key]}\n\n*{turn['notes'][key]}*"})
    return chats
