"""`python -m demo`: a LLaVA answers questions about a picture, with all of its visual tokens and with few of them.

Loads the checkpoint as any user would, with `pipeline(..., trust_remote_code=True)`, prints what each answer took, and
draws which patches each question kept.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import pipeline
from transformers.utils import logging

from demo.scene import ANSWERS, LARGE_ANSWERS, LARGE_PICTURE, PICTURE
from recoverable_llava.tools.asking import read_config, sees_tiles
from recoverable_llava.tools.pictures import open_picture
from recoverable_llava.tools.visualize import draw_questions


CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "tiny"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--model", default=str(CHECKPOINT), help="folder or Hub repo (default: %(default)s)")
    parser.add_argument("--image", help="picture to ask about (default: one in demo/, of a size for the model)")
    parser.add_argument("--question", action="append", help="question to ask; may be given several times")
    parser.add_argument("--output", default="output/demo.png", help="picture to draw (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        is_large = sees_tiles(read_config(arguments.model))
        path, visible = (LARGE_PICTURE, LARGE_ANSWERS) if is_large else (PICTURE, ANSWERS)
        path = arguments.image or path
        picture = open_picture(path)
    except ValueError as error:
        print(f"python -m demo: {error}", file=sys.stderr)
        return 2
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    dtype = "auto" if torch.cuda.is_available() else "float32"  # the fastest on either
    answerer = pipeline("image-text-to-text", model=arguments.model, trust_remote_code=True, dtype=dtype)
    print(f"Model: {arguments.model}\nPicture: {path}, {picture.width} x {picture.height} pixels\n")

    def answer(messages: list[dict], compress: bool) -> tuple[str, float]:
        """The answer, and the seconds that it took."""
        answerer.model.config.compress = compress
        started = time.perf_counter()
        reply = answerer(text=messages, max_new_tokens=16, do_sample=False, return_full_text=False)
        return reply[0]["generated_text"].strip(), time.perf_counter() - started

    recoveries, answers = {}, {}
    for number, question in enumerate(arguments.question or visible):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        if number == 0:  # the first call of a kind takes longer, and is not what is compared
            answer(messages, compress=True), answer(messages, compress=False)
        said = {compress: answer(messages, compress) for compress in (True, False)}
        answerer.model.config.compress = True
        inputs = answerer.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        recovery = answerer.model.recover_tokens(**inputs.to(answerer.model.device, dtype=answerer.model.dtype))
        recoveries[question], answers[question] = recovery, said[True][0]

        selection = recovery.selection
        (total,), kept = recovery.num_uncompressed, int(selection.num_tokens)
        print(question)
        if not arguments.question and not arguments.image:
            print(f"  to be seen      {visible[question]}")
        print(f"  {total:4} tokens     {said[False][0]}  ({said[False][1]:.2f} s)")
        print(
            f"  {kept:4} tokens     {said[True][0]}  ({said[True][1]:.2f} s; {int(selection.num_visual)} kept by "
            f"vision, {int(selection.num_text)} recovered for the question, {int(selection.num_merged)} merged)"
        )
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_questions(picture, dict(list(recoveries.items())[:3]), answers=answers).save(output)
    print(f"\nWhich patches stayed: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
