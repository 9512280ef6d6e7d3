"""Every method that can stand in the table, by name.

A method is either a selection rule of `peers`, or our own model under some settings of its configuration. The paper's
text, its released code and our defaults are three different methods here, so that each departure is measured.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from evaluation import peers, tiled_peers
from evaluation.ablations import ABLATIONS
from evaluation.evidence import Evidence
from evaluation.report import ALL_TOKENS
from evaluation.tiled_peers import EachTile
from recoverable_llava.recovery_settings import PRESETS
from recoverable_llava.token_assembly import Assembly


# The paper's hyperparameters and its text relevance, on our implementation (docs/deviations.md).
PAPER_SETTINGS: dict[str, Any] = {
    **PRESETS["paper"],
    "attention_layer": -1,
    "visual_lof_neighbors": 20,
    "text_lof_neighbors": 20,
    "merge_lof_neighbors": 10,
    "lof_threshold": 1.5,
    "merge_neighbors": 32,
    "text_merge_weight": 50.0,
    "merge_remaining": True,
}
QUESTIONS = ("own", "wrong", "none")


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    rule: a selection rule; None for our own model.
    settings: fields of the model's configuration, for our own model.
    question: which question guides the selection: its "own", a "wrong" one (the control), or "none".
    is_adaptive, is_fixed: whether it can run without a budget, and with one.
    """

    rule: Callable[..., Assembly] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    question: str = "own"
    is_adaptive: bool = True
    is_fixed: bool = True


def keep_everything(evidence: Evidence, budget: int | None) -> Assembly:
    """All patches, in place: what the others are measured against."""
    return peers.assembly_of(torch.ones_like(evidence.class_attention, dtype=torch.bool))


def _fixed(rule: Callable[..., Assembly], **options: Any) -> Method:
    return Method(partial(rule, **options) if options else rule, is_adaptive=False)


# Of LLaVA-1.5.
METHODS: dict[str, Method] = {
    ALL_TOKENS: Method(keep_everything, is_fixed=False),
    "ours": Method(),
    "ours, wrong question": Method(question="wrong"),
    "ours, no question": Method(question="none"),
    "ours, threshold 0.3": Method(settings={"novelty_threshold": 0.3}, is_fixed=False),
    "ours, threshold 0.4": Method(settings={"novelty_threshold": 0.4}, is_fixed=False),
    "paper": Method(settings=PAPER_SETTINGS),
    "paper, wrong question": Method(settings=PAPER_SETTINGS, question="wrong"),
    "paper, as released": Method(peers.released_recoverable_compression),
    "random": _fixed(peers.random_patches),
    "uniform grid": _fixed(peers.uniform_grid),
    "average pooling": _fixed(peers.average_pooling),
    "class attention": _fixed(peers.class_attention),
    "VisionZip": _fixed(peers.visionzip),
    "PruMerge": Method(peers.prumerge),
    "PruMerge+": Method(peers.prumerge_plus),
    "DivPrune": _fixed(peers.divprune),
    "CDPruner": _fixed(peers.cdpruner),
    "Cen-Prune": _fixed(peers.centred_cdpruner),
    "facility location": _fixed(peers.facility_location),
    "SCOPE": _fixed(peers.scope),
    "MMTok": _fixed(peers.mmtok),
    # The published rules assume an inverted CLIP; given the relevance that our model reads, they are the harder rivals.
    "CDPruner, our relevance": _fixed(peers.cdpruner, relevance="value"),
    "Cen-Prune, our relevance": _fixed(peers.centred_cdpruner, relevance="value"),
    "facility location, our relevance": _fixed(peers.facility_location, relevance="value"),
}


# Of LLaVA-NeXT; each published rule spreads its tokens as its release does (tiled_peers.py).
TILED_METHODS: dict[str, Method] = {
    ALL_TOKENS: Method(tiled_peers.keep_everything, is_fixed=False),
    **{name: METHODS[name] for name in ("ours", "ours, wrong question", "ours, no question", "paper", "random")},
    "uniform grid": _fixed(tiled_peers.uniform_grid),
    "average pooling": _fixed(tiled_peers.average_pooling),
    "VisionZip": _fixed(EachTile(peers.visionzip)),
    "HiRED": _fixed(tiled_peers.hired),
    "HiRED, with new lines": _fixed(tiled_peers.hired_with_new_lines),
    "DivPrune": _fixed(peers.divprune),
    "SCOPE": _fixed(EachTile(peers.scope)),
    "CDPruner": _fixed(EachTile(peers.cdpruner)),
    "MMTok": _fixed(peers.mmtok),
    # Harder rivals: one choice over all tiles, and the relevance that our model reads.
    "SCOPE, all tiles": _fixed(peers.scope),
    "CDPruner, our relevance": _fixed(EachTile(peers.cdpruner, (("relevance", "value"),))),
    "CDPruner, all tiles, our relevance": _fixed(peers.cdpruner, relevance="value"),
}


def methods_of(model_type: str) -> dict[str, Method]:
    """The methods of a family, by the `model_type` of its configuration."""
    return TILED_METHODS if model_type == "recoverable_llava_next" else METHODS


def find_methods(names: list[str], methods: dict[str, Method] = METHODS) -> dict[str, Method]:
    """The methods with these names, the one with all tokens first; "ablations" stands for all of LLaVA-1.5's.

    Raises:
        ValueError: naming what is unknown and what there is.
    """
    ablations = ABLATIONS if methods is METHODS else {}
    known = methods | {name: Method(rule) for name, rule in ablations.items()}
    groups = {"ablations": list(ablations)} if ablations else {}
    wanted = [name for group in names for name in groups.get(group, [group])]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"Unknown methods {unknown}: choose among {sorted([*known, *groups])}.")
    return {name: known[name] for name in dict.fromkeys([ALL_TOKENS, *wanted])}
