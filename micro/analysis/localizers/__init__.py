"""Functional localizers: the units of a model that answer to language, to cognitive demand, to other minds.

    result = analysis.localize(model, tokenizer, "language")
    harm = analysis.lesion(model, tokenizer, texts, result, draws=99)

The statistics stand alone: :func:`localizer_test` and :func:`localizer_mask` take arrays of activations of any origin.
"""

from micro.analysis.localizers.lesions import TextSuite, lesion, random_masks, silence
from micro.analysis.localizers.nulls import NullTests, null_tests, shuffled
from micro.analysis.localizers.result import LesionResult, LocalizerResult
from micro.analysis.localizers.run import localize
from micro.analysis.localizers.statistics import LocalizerTest, localizer_mask, localizer_test
from micro.analysis.localizers.stimuli import (
    Stimuli,
    find_stimuli,
    language,
    load_stimuli,
    multiple_demand,
    theory_of_mind,
)

__all__ = [
    "LesionResult",
    "LocalizerResult",
    "LocalizerTest",
    "NullTests",
    "Stimuli",
    "TextSuite",
    "find_stimuli",
    "language",
    "lesion",
    "load_stimuli",
    "localize",
    "localizer_mask",
    "localizer_test",
    "multiple_demand",
    "null_tests",
    "random_masks",
    "shuffled",
    "silence",
    "theory_of_mind",
]
