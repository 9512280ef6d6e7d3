"""Ask one question about every picture of a folder, several at a time, into a JSONL file; a stopped run goes on.

python examples/batch_folder.py FOLDER ANSWERS.jsonl "What word is under the lemon?"

`recoverable-llava batch` does it with subfolders, settings, and one picture at a time.
"""

import json
import sys
from pathlib import Path

from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from recoverable_llava.tools.pictures import open_picture, picture_suffixes


if len(sys.argv) < 4:
    sys.exit(f"Usage: python {sys.argv[0]} FOLDER ANSWERS.jsonl QUESTION [REPO]")
folder, output, question, *repo = sys.argv[1:]
if not Path(folder).is_dir():
    sys.exit(f"There is no folder {folder!r}: name one with pictures.")
repo, batch_size = (repo or ["checkpoints/tiny"])[0], 8
model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, device_map="auto")
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
processor.tokenizer.padding_side = "left"

lines = Path(output).read_text().splitlines() if Path(output).exists() else []
answered = map(json.loads, lines)
done = {line["image"] for line in answered if (line["question"], line["model"]) == (question, repo)}
pictures = [path for path in sorted(Path(folder).iterdir()) if path.suffix.lower() in picture_suffixes()]
paths = [path for path in pictures if path.name not in done]
with open(output, "a") as file, tqdm(total=len(paths), unit="picture") as progress:
    for start in range(0, len(paths), batch_size):
        batch, chats = [], []
        for path in paths[start : start + batch_size]:
            try:
                image = {"type": "image", "image": open_picture(path)}
            except ValueError as error:  # one broken file does not end the others
                tqdm.write(str(error))
                continue
            batch.append(path)
            chats.append([{"role": "user", "content": [image, {"type": "text", "text": question}]}])
        progress.update(len(paths[start : start + batch_size]))
        if not chats:
            continue
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, padding=True, return_tensors="pt"
        ).to(model.device, dtype=model.dtype)
        answers = model.generate(**inputs, max_new_tokens=16)[:, inputs["input_ids"].shape[1] :]
        for path, answer in zip(batch, processor.batch_decode(answers, skip_special_tokens=True)):
            line = {"image": path.name, "question": question, "model": repo, "answer": answer.strip()}
            file.write(json.dumps(line) + "\n")
        file.flush()
