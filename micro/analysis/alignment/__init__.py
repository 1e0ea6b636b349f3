"""Alignment with brains and readers: how well do features of a model account for measured responses?

    pooled = alignment.pooled_activations(model, tokenizer, sentences, point="block_output")
    result = alignment.align(pooled.sets(), alignment.load_responses("language_network.npz"))
    print(result)  # scores with intervals and nulls, contrasts of experts, and whether the metric can be trusted here

Ridge regression, RSA, CKA (:func:`align`), reading times (:func:`reading_times`). Data of brains are yours to bring.
"""

from micro.analysis.alignment.ceiling import Ceiling, spearman_brown, split_half
from micro.analysis.alignment.cka import cka
from micro.analysis.alignment.features import FeatureSet, Pooled, matched_masks, pooled_activations
from micro.analysis.alignment.reading_times import reading_times, word_surprisal
from micro.analysis.alignment.responses import Responses, load_responses
from micro.analysis.alignment.result import AlignmentResult, ReadingTimesResult
from micro.analysis.alignment.ridge import Encoder, RidgeScore, contiguous_folds, ridge
from micro.analysis.alignment.rsa import rdm, rsa
from micro.analysis.alignment.run import align

__all__ = [
    "AlignmentResult",
    "Ceiling",
    "Encoder",
    "FeatureSet",
    "Pooled",
    "ReadingTimesResult",
    "Responses",
    "RidgeScore",
    "align",
    "cka",
    "contiguous_folds",
    "load_responses",
    "matched_masks",
    "pooled_activations",
    "rdm",
    "reading_times",
    "ridge",
    "rsa",
    "spearman_brown",
    "split_half",
    "word_surprisal",
]
