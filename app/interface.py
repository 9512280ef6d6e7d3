"""The page and what its controls do.

One model, one call at a time: the sliders change its config for the length of a call. A broken file or a setting that
the model does not allow becomes a message on the page.
"""

from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from recoverable_llava.recovery_settings import PRESETS
from recoverable_llava.tools.asking import (
    Answer,
    ask,
    assistant_turn,
    open_picture,
    recover,
    recovery_settings,
    user_turn,
)
from recoverable_llava.tools.visualize import draw_recovery


SCENES = Path(__file__).parent / "scenes"
LARGEST_UPLOAD = "10mb"
NO_PICTURE = "Upload or pick a picture."
EXAMPLES = [
    ("scene_0.png", "What word is under the lemon?"),
    ("scene_0.png", "What color is the plate of the penguin?"),
    ("scene_3.png", "How many pictures of a cookie are there?"),
    ("scene_5.png", "Is the fish below the snake?"),
]


def build_interface(model: Any, processor: Any, name: str) -> gr.Blocks:
    """The app around a model and its processor, as `recoverable_llava.tools.asking.load` returns them."""
    num_patches, config = model.config.num_patches, model.config
    own_preset = "default" if config.selection == "novelty" else "paper"
    # The first call is slower than all others, and would be held against the compressed answer.
    ask(model, processor, [user_turn(EXAMPLES[0][1], open_picture(SCENES / EXAMPLES[0][0]))], max_new_tokens=2)

    def settings(preset: str, threshold: float, budget: float) -> dict[str, Any]:
        fields = recovery_settings(config, preset, float(threshold))
        return {**fields, "visual_token_budget": int(budget) or None}

    def threshold_of(preset: str) -> dict[str, Any]:
        """Range and value of the slider: novelty, or the paper's Local Outlier Factor."""
        if PRESETS[preset]["selection"] == "novelty":
            return {"minimum": 0.0, "maximum": 1.0, "step": 0.05, "value": config.novelty_threshold}
        return {"minimum": 1.0, "maximum": 4.0, "step": 0.1, "value": config.lof_threshold}

    def conversation(picture: Any, turns: list[dict], question: str, answer_key: str) -> list[dict]:
        messages = []
        for turn in turns:
            messages += [user_turn(turn["question"]), assistant_turn(turn[answer_key])]
        messages.append(user_turn(question))
        messages[0] = user_turn(turns[0]["question"] if turns else question, picture)
        return messages

    @_errors_on_the_page
    def show_recovery(upload: dict | None, question: str, preset: str, threshold: float, budget: float) -> tuple:
        if upload is None:
            return None, NO_PICTURE
        picture = open_picture(upload["path"])
        recovery = recover(model, processor, [user_turn(question, picture)], **settings(preset, threshold, budget))
        return draw_recovery(picture, recovery, size=576, legend=True), _counts(recovery, num_patches)

    @_errors_on_the_page
    def answer(
        upload: dict | None, question: str, turns: list[dict], preset: str, threshold: float, budget: float
    ) -> tuple:
        if upload is None:
            raise gr.Error(NO_PICTURE)
        if not question.strip():
            raise gr.Error("Type a question.")
        picture, turns = open_picture(upload["path"]), list(turns)
        short = ask(
            model,
            processor,
            conversation(picture, turns, question, "compressed"),
            **settings(preset, threshold, budget),
        )
        full = ask(model, processor, conversation(picture, turns, question, "full"), compress=False)
        turns.append(
            {"question": question, "compressed": short.text, "full": full.text, "notes": (_note(short), _note(full))}
        )
        overlay = draw_recovery(picture, short.recovery, size=576)
        counts = _counts(short.recovery, num_patches)
        return turns, _chat(turns, "compressed", 0), _chat(turns, "full", 1), overlay, counts

    def forget() -> tuple:
        return [], [], []

    with gr.Blocks(title="Recoverable LLaVA") as interface:
        turns = gr.State([])
        gr.Markdown(
            f"# Recoverable LLaVA\nA LLaVA that reads only the visual tokens that matter for your question. Change the "
            f"question and watch other patches come back. Model: `{name}`."
        )
        with gr.Row():
            with gr.Column():
                picture = gr.Image(label="Picture", sources=["upload", "clipboard"], height=340, elem_id="picture")
                question = gr.Textbox(label="Question", elem_id="question", max_length=1000, submit_btn=True)
                preset = gr.Radio(list(PRESETS), value=own_preset, label="How tokens are chosen", elem_id="preset")
                threshold = gr.Slider(**threshold_of(own_preset), label="Threshold: higher keeps fewer tokens")
                budget = gr.Slider(
                    0,
                    num_patches,
                    config.visual_token_budget or 0,
                    step=1,
                    label="Budget: exactly so many tokens; 0: as needed",
                    elem_id="budget",
                )
                again = gr.Button("New conversation", elem_id="again")
            with gr.Column():
                counts = gr.Markdown(NO_PICTURE, elem_id="counts")
                overlay = gr.Image(
                    label="What stays",
                    show_label=False,
                    interactive=False,
                    height=560,
                    elem_id="overlay",
                    buttons=["download", "fullscreen"],
                )
        with gr.Row():
            compressed = gr.Chatbot(label="With compression", elem_id="compressed", height=340, buttons=[])
            full = gr.Chatbot(label="All visual tokens", elem_id="full", height=340, buttons=[])
        gr.Examples(
            [[str(SCENES / file), text] for file, text in EXAMPLES],
            [picture, question],
            label="Pictures to try",
        )

        controls = [picture, question, preset, threshold, budget]
        # Without preprocessing, as the component would open the file itself and say less about a broken one.
        one_at_a_time: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "preprocess": False}
        previews = [
            control.change(
                show_recovery,
                controls,
                [overlay, counts],
                trigger_mode="always_last",
                show_progress="hidden",
                **one_at_a_time,
            )
            for control in controls
        ]
        answering = question.submit(
            answer,
            [picture, question, turns, preset, threshold, budget],
            [turns, compressed, full, overlay, counts],
            cancels=previews,
            **one_at_a_time,
        )
        preset.change(lambda name: gr.Slider(**threshold_of(name)), preset, threshold)
        for trigger in (picture.change, again.click, compressed.clear, full.clear):
            trigger(forget, None, [turns, compressed, full], cancels=answering)
    return interface


def _errors_on_the_page(handler: Any) -> Any:
    """Turns what a visitor can put right into a message that names the file as the visitor does."""

    @wraps(handler)
    def handle(upload: dict | None, *arguments: Any) -> Any:
        try:
            return handler(upload, *arguments)
        except ValueError as error:
            path = upload["path"] if upload else ""
            raise gr.Error(str(error).replace(path, Path(path).name), print_exception=False) from None

    return handle


def _counts(recovery: Any, num_patches: int) -> str:
    selection = recovery.selection
    return (
        f"**{int(selection.num_tokens)} of {num_patches}** visual tokens: {int(selection.num_visual)} kept by vision, "
        f"{int(selection.num_text)} recovered for the question, {int(selection.num_merged)} merged."
    )


def _note(answer: Answer) -> str:
    return f"{answer.num_tokens} of {answer.num_uncompressed} visual tokens, {answer.seconds:.2f} s"


def _chat(turns: list[dict], answer_key: str, note: int) -> list[dict]:
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn["question"]})
        messages.append({"role": "assistant", "content": f"{turn[answer_key]}\n\n*{turn['notes'][note]}*"})
    return messages
