"""Is a built folder or a published repository what it says it is? Files, loading, an answer, and the stock base's
logits; what `inspection` finds wrong is never loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hub_upload.build import EXTRA_SHARD, GENERATION_CONFIG, RECOVERY_SETTINGS
from hub_upload.checkpoint import INDEX, read_json, write_json
from hub_upload.hub import fetch_repository, redact
from hub_upload.inspection import CONFIG, Check, changed_code, inspect_files, read_listed_hashes


DEFAULT_QUESTION = "What is shown in the picture?"


def verify(
    target: str | Path,
    *,
    revision: str | None = None,
    question: str = DEFAULT_QUESTION,
    image: str | Path | None = None,
    device: str | None = None,
    max_new_tokens: int = 16,
    trust_remote_code: bool = False,
    token: str | None = None,
) -> list[Check]:
    """Checks `target`, a built folder or a repo id; the model itself is loaded in a fresh process, as a user would.

    Args:
        question, image: asked of the model; a gradient stands in for a missing image.
        device: where to run, such as "cuda:0"; default a GPU if there is one.
        trust_remote_code: run the repository's code even if it is not that of the installed package.
    """
    folder, commit = Path(target).expanduser(), None
    is_folder = folder.is_dir()
    if is_folder and revision is not None:
        raise ValueError(
            f"revision={revision!r} belongs to a repo id, but target={str(target)!r} is a folder: leave it out"
        )
    if image is not None and not Path(image).is_file():
        raise ValueError(f"image={str(image)!r} does not exist: pass a picture file")
    if not is_folder:
        folder, commit = fetch_repository(str(target), revision, token)
    listed = read_listed_hashes(folder)
    try:
        checks = inspect_files(folder, is_published=not is_folder)
    except ValueError as error:
        return [Check("files can be read", False, str(error))]
    if not all(check.passed for check in checks):
        return [*checks, Check("loads", False, "not tried: damaged, changed or foreign files are not executed")]
    unknown = changed_code(folder)
    if unknown and not trust_remote_code:
        asked = f"not tried: {', '.join(unknown)} differ from the installed package. Read them, then pass "
        return [*checks, Check("loads", False, asked + "trust_remote_code=True (--trust-remote-code) to run them")]
    report = run_fresh_process(
        {
            "target": str(folder.resolve()) if is_folder else str(target),
            "revision": commit,
            "question": question,
            "image": str(Path(image).resolve()) if image else None,
            "device": device,
            "max_new_tokens": max_new_tokens,
        },
        folder,
        token,
    )
    return checks + check_report(report, listed)


def check_report(report: dict[str, Any], listed: dict[str, str]) -> list[Check]:
    if "error" in report:
        return [Check("loads in a fresh process", False, report["error"].strip())]
    problems = loading_problems(report["loading_problems"], report["stock_loading_problems"])
    summary = "; ".join(f"{name}: {len(keys)}, first {keys[0]}" for name, keys in problems.items())
    remote = all(report[name].startswith("transformers_modules.") for name in ("module", "processor_module"))
    executed = report["executed_files"]
    unlisted = sorted(name for name, digest in executed.items() if listed.get(name) != digest)
    difference = report["largest_difference"]
    return [
        Check("loads with its own code", remote, report["module"].rsplit(".", 1)[-1]),
        Check("executed code is listed", not unlisted, ", ".join(unlisted) or f"{len(executed)} files"),
        Check("loading info is empty", not problems, summary or "no missing, unexpected or mismatched keys"),
        Check("answers a question", report["new_tokens"] > 0, f"{report['new_tokens']} tokens on {report['device']}"),
        Check(
            "compresses", report["tokens"] < report["of_tokens"], f"{report['tokens']} of {report['of_tokens']} tokens"
        ),
        Check(
            "compression off = stock base",
            report["finite"] and difference == 0,
            f"largest difference of logits {difference:g}" + ("" if report["finite"] else ", not finite"),
        ),
    ]


def loading_problems(ours: dict[str, list[str]], stock: dict[str, list[str]]) -> dict[str, list[str]]:
    """What did not load, in ours or in the stock base. Buffers that old checkpoints carry and that the stock class has
    no use for either, such as `inv_freq`, are no problem."""
    leftovers = set(stock.get("unexpected_keys", []))
    names = sorted({*ours, *stock} - {"unexpected_keys"})
    problems = {name: sorted({*ours.get(name, []), *stock.get(name, [])}) for name in names}
    problems["unexpected_keys"] = sorted(set(ours.get("unexpected_keys", [])) - leftovers)
    return {name: keys for name, keys in problems.items() if keys}


def write_stock_base(folder: Path, stock: Path) -> None:
    """The base as it was before the build, by links to the same shards, for the stock class."""
    config = read_json(folder / CONFIG)
    for name in ("auto_map", "question_config", *RECOVERY_SETTINGS):
        config.pop(name, None)
    config["model_type"] = config["model_type"].removeprefix("recoverable_")
    config["architectures"] = [name.removeprefix("Recoverable") for name in config["architectures"]]
    write_json(stock / CONFIG, config)
    index = read_json(folder / INDEX)
    weight_map = {name: shard for name, shard in index["weight_map"].items() if shard != EXTRA_SHARD}
    write_json(stock / INDEX, {**index, "weight_map": weight_map})
    for name in {*weight_map.values(), GENERATION_CONFIG}:
        if (folder / name).exists():
            (stock / name).symlink_to((folder / name).resolve())


def run_fresh_process(request: dict[str, Any], folder: Path, token: str | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        stock, report = Path(temporary, "stock"), Path(temporary, "report.json")
        stock.mkdir()
        write_stock_base(folder, stock)
        argument = json.dumps({**request, "stock": str(stock), "report": str(report)})
        environment = {**os.environ, **({"HF_TOKEN": token} if token else {})}
        script = Path(__file__).with_name("fresh_process.py")
        run = subprocess.run(  # -I: neither this folder nor PYTHONPATH can stand in for the repository's code
            [sys.executable, "-I", str(script), argument], env=environment, capture_output=True, text=True, check=False
        )
        if not report.is_file():
            ending = redact(run.stderr, token).strip().splitlines()[-3:]
            return {"error": f"the process ended with status {run.returncode}: {' '.join(ending)}"}
        return dict(json.loads(redact(report.read_text(encoding="utf-8"), token)))
