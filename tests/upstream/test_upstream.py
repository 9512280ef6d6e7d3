"""Upstream's own tests over our classes: what passes for stock passes for ours, but for what `DIFFERENCES` lists."""

import unittest
import warnings
from typing import NamedTuple

import pytest
import subjects
import transformers
from packaging.version import Version
from transformers import set_seed


class Difference(NamedTuple):
    subjects: str  # which of ours differ
    error: str  # what upstream's test says then
    reason: str
    since: str = "5.12"  # where upstream has no such test before
    families: str = "llava llava_next"


# Whatever differs without standing here is a fault, and so is what stands here and does not differ any more.
DIFFERENCES = {
    "test_retain_grad_hidden_states_attentions": Difference(
        "adaptive budget",
        "assertIsNotNone(hidden_states.grad)",
        "Hidden states come back in the original numbering: copies, through which the output did not go.",
    ),
    "test_can_init_all_missing_weights": Difference(
        "off adaptive budget",
        "not properly handled in `_init_weights()`",
        "In models of remote code transformers draws weights that a checkpoint lacks layer by layer, without the "
        "scales of CLIP. Our checkpoints lack none.",
    ),
    "test_create_and_test_config_from_and_save_pretrained_composite": Difference(
        "off adaptive budget",
        "self.parent.assertEqual(sub_config_loaded_dict, general_config_dict[sub_config_key])",
        "`CLIPTextConfig.from_pretrained` reads the key text_config, which is the language model's in a LLaVA. The "
        "question's is question_config.",
    ),
    "test_processor_from_and_save_pretrained": Difference(
        "off adaptive budget",
        "'auto_map': {'AutoProcessor'",
        "transformers writes auto_map for remote code when it saves a processor, and leaves it out when it loads one.",
    ),
    "test_processor_from_and_save_pretrained_as_nested_dict": Difference(
        "off adaptive budget",
        "'auto_map': {'AutoProcessor'",
        "As above.",
    ),
    "test_bc_cache_name_forward": Difference(
        "off adaptive budget",
        "`{old_name}` is deprecated",
        "Ours takes the cache by either name without a word: the same code runs where only the old one exists.",
        since="5.24",
    ),
    "test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions": Difference(
        "off adaptive budget",
        "",
        "Upstream reads off an annotation whether a model gives attentions: stock LLaVA-NeXT's does not say so.",
        families="llava_next",
    ),
    "test_no_redundant_default_kwargs": Difference(
        "off adaptive budget",
        "has default for `do_pad` that is identical",
        "Upstream leaves LlavaNextProcessor out by its name, whose defaults ours has.",
        since="5.23",
        families="llava_next",
    ),
}


class Outcome(NamedTuple):
    kind: str  # "passes", "fails" or "is skipped"
    details: str = ""


def outcome_of(case: type[unittest.TestCase], name: str) -> Outcome:
    set_seed(0)
    result = unittest.TestResult()
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # upstream uses old names on purpose, to see that they are told of
        unittest.TestSuite([case(name)]).run(result)  # a suite runs setUpClass, too
    problems = [details for _, details in (*result.errors, *result.failures)]
    if problems:
        return Outcome("fails", "\n".join(problems))
    if result.skipped:
        return Outcome("is skipped", result.skipped[0][1])
    assert result.testsRun == 1
    return Outcome("passes")


def names_of(family: str, kind: str) -> list[str]:
    """Those of the control, and any that ours alone has."""
    loader = unittest.TestLoader()
    cases = [subjects.CONTROLS[family][kind], *(cases[kind] for cases in subjects.SUBJECTS[family].values())]
    return sorted({name for case in cases for name in loader.getTestCaseNames(case)})


TESTS = [
    (family, kind, name)
    for family, control in subjects.CONTROLS.items()
    for kind in control
    for name in names_of(family, kind)
]


@pytest.mark.parametrize(("family", "kind", "name"), TESTS, ids=["-".join(each) for each in TESTS])
def test_ours_does_what_stock_does(family, kind, name):
    stock = outcome_of(subjects.CONTROLS[family][kind], name)
    assert stock.kind != "fails", f"The control fails, so this says nothing about ours:\n{stock.details}"
    listed = DIFFERENCES.get(name)
    problems = []
    for subject, cases in subjects.SUBJECTS[family].items():
        ours = outcome_of(cases[kind], name)
        if listed is None or subject not in listed.subjects.split() or family not in listed.families.split():
            if ours.kind != stock.kind:
                problems.append(f"stock {stock.kind}, ours ({subject}) {ours.kind}:\n{ours.details}")
        elif ours.kind == stock.kind:
            problems.append(f"ours ({subject}) {ours.kind} as stock does: take it off the list of differences")
        elif listed.error not in ours.details:
            problems.append(f"ours ({subject}) differs in another way than the list says:\n{ours.details}")
    assert not problems, "\n\n".join(problems)
    if stock.kind == "is skipped":
        pytest.skip(stock.details)


def test_listed_differences_are_of_tests_that_exist():
    known = {name for *_, name in TESTS}
    version = Version(transformers.__version__)
    assert {name for name, listed in DIFFERENCES.items() if version >= Version(listed.since)} <= known
