"""Is a built folder or a published repository what it says it is? Files, loading, an answer, and the stock base's
logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub_upload.build import CONFIG, EXTRA_SHARD, GENERATION_CONFIG, RECOVERY_SETTINGS
from hub_upload.checkpoint import INDEX, PICKLED_WEIGHTS, files_sha256, read_checkpoint, read_json, write_json
from hub_upload.publish import PROVENANCE, fetch_repository, redact
from hub_upload.remote_code import PAGE, executed_files, listed_hashes


DEFAULT_QUESTION = "What is shown in the picture?"


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str


def verify(
    target: str | Path,
    *,
    revision: str | None = None,
    question: str = DEFAULT_QUESTION,
    image: str | Path | None = None,
    device: str | None = None,
    max_new_tokens: int = 16,
    token: str | None = None,
) -> list[Check]:
    """Checks `target`, a built folder or a repo id; the model itself is loaded in a fresh process, as a user would.

    Args:
        question, image: asked of the model; a gradient stands in for a missing image.
        device: where to run, such as "cuda:0"; default a GPU if there is one.
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
    for name in (PROVENANCE, PAGE):
        if not (folder / name).is_file():
            raise ValueError(f"target={str(target)!r} has no {name}: it was not built by `python -m hub_upload build`")
    try:
        checks = check_files(folder)
    except ValueError as error:
        return [Check("files can be read", False, str(error))]
    if not all(check.passed for check in checks):
        return [*checks, Check("loads", False, "not tried: damaged or changed files are not executed")]
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
    return checks + check_report(report, listed_hashes((folder / PAGE).read_text(encoding="utf-8")))


def check_files(folder: Path) -> list[Check]:
    from recoverable_llava.configuration_recoverable_llava import AUTO_MAP

    provenance = read_json(folder / PROVENANCE)
    listed = listed_hashes((folder / PAGE).read_text(encoding="utf-8"))
    on_disk = files_sha256(folder, [name for name in listed if (folder / name).is_file()], "Hashing code")
    executed = executed_files(folder)
    wrong = sorted(
        name for name in {*listed, *executed} if listed.get(name) is None or listed[name] != on_disk.get(name)
    )
    wrong += sorted(path.name for path in folder.glob("*.py") if path.name not in listed)
    weights = [name for name in provenance["files"] if name not in listed]
    absent = [name for name in weights if not (folder / name).is_file()]
    actual = files_sha256(folder, [name for name in weights if name not in absent], "Hashing weights")
    changed = sorted(name for name in weights if actual.get(name) != provenance["files"][name])
    pickled = sorted(path.name for pattern in PICKLED_WEIGHTS for path in folder.rglob(pattern))
    checkpoint = read_checkpoint(folder)
    auto_map = read_json(folder / CONFIG).get("auto_map", {})
    processor_map = read_json(folder / "processor_config.json").get("auto_map", {})
    unmapped = sorted(name for name, where in AUTO_MAP.items() if {**processor_map, **auto_map}.get(name) != where)
    unmapped += [] if "AutoProcessor" in processor_map else ["AutoProcessor in processor_config.json"]
    return [
        Check("code equals trust_remote_code.md", not wrong, ", ".join(wrong) or f"{len(listed)} files"),
        Check("weights equal provenance.json", not changed, ", ".join(changed) or f"{len(weights)} files"),
        Check("index and shards agree", True, f"{len(checkpoint.tensors)} tensors"),
        Check("no pickles", not pickled, ", ".join(pickled) or "safetensors only"),
        Check("auto_map is complete", not unmapped, ", ".join(unmapped) or f"{len(AUTO_MAP)} classes"),
    ]


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
    write_json(stock / CONFIG, {**config, "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]})
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


def table(checks: list[Check]) -> str:
    width = max(len(check.name) for check in checks)
    rows = [f"{check.name:<{width}}  {'ok    ' if check.passed else 'FAILED'}  {check.detail}" for check in checks]
    failed = sum(not check.passed for check in checks)
    return "\n".join([*rows, f"{failed} of {len(checks)} checks failed" if failed else "all checks passed"])
