"""Ask one question about every picture of a folder, several at a time, into a JSONL file; a stopped run goes on.

python examples/batch_folder.py FOLDER ANSWERS.jsonl "What word is under the lemon?"
"""

import json
import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor


folder, output, question, *repo = sys.argv[1:]
repo, batch_size = (repo or ["checkpoints/tiny"])[0], 8
model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, device_map="auto")
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
processor.tokenizer.padding_side = "left"

lines = Path(output).read_text().splitlines() if Path(output).exists() else []
done = {json.loads(line)["image"] for line in lines}
paths = [path for path in sorted(Path(folder).glob("*.[jp][pn]*g")) if path.name not in done]
with open(output, "a") as file, tqdm(total=len(paths), unit="picture") as progress:
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        images = [Image.open(path).convert("RGB") for path in batch]
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
            for image in images
        ]
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, padding=True, return_tensors="pt"
        ).to(model.device, dtype=model.dtype)
        answers = model.generate(**inputs, max_new_tokens=16)[:, inputs["input_ids"].shape[1] :]
        for path, answer in zip(batch, processor.batch_decode(answers, skip_special_tokens=True)):
            file.write(json.dumps({"image": path.name, "question": question, "answer": answer.strip()}) + "\n")
        file.flush()
        progress.update(len(batch))
