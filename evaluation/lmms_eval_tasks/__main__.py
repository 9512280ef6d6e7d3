"""Writes the tasks and their data into a folder; see the package's own text."""

import argparse
import shutil
from pathlib import Path

import datasets

from evaluation.examples import SECOND_TURN, load_examples


def write_tasks(folder: Path, split: str, num_images: int) -> None:
    """scenes.parquet, scenes_choice.parquet, and the two tasks that read them, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    images, examples = load_examples("scenes", split, num_images)
    rows = [
        {"image": images[e.image], "question": e.question, "answer": e.answer, "kind": e.kind}
        for e in examples
        if e.kind != SECOND_TURN
    ]
    features = datasets.Features(
        {"image": datasets.Image(), **{name: datasets.Value("string") for name in ("question", "answer", "kind")}}
    )
    for name, kept in {"scenes": rows, "scenes_choice": [row for row in rows if row["kind"] == "choice"]}.items():
        datasets.Dataset.from_list(kept, features=features).to_parquet(folder / f"{name}.parquet")
        template = (Path(__file__).parent / f"{name}.yaml").read_text()
        (folder / f"{name}.yaml").write_text(template.replace("FOLDER", str(folder.resolve())))
    shutil.copy(Path(__file__).parent / "scenes_functions.py", folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.lmms_eval_tasks", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="test", choices=("validation", "test", "combination"))
    parser.add_argument("--images", type=int, default=50)
    options = parser.parse_args(arguments)
    write_tasks(options.folder, options.split, options.images)
    print(f"Tasks scenes and scenes_choice written: lmms_eval --include_path {options.folder} --tasks scenes ...")


if __name__ == "__main__":
    main()
