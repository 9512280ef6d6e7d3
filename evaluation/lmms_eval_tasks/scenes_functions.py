"""What scenes.yaml and scenes_choice.yaml refer to; copied next to them, so it imports nothing of this repository."""

from typing import Any


def pictures(document: dict[str, Any]) -> list[Any]:
    return [document["image"].convert("RGB")]


def prompt(document: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    return document["question"]


def choices(document: dict[str, Any]) -> list[str]:
    return ["A", "B", "C", "D"]


def score(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """One metric for each kind of question: lmms-eval averages a metric over the documents that report it."""
    return {document["kind"]: float(results[0].strip().lower().rstrip(".") == document["answer"].lower())}
