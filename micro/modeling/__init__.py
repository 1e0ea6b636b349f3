"""MiCRo models, native to transformers. Importing this package registers the Auto classes and the names on disk."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from micro.modeling.cache import MiCRoCache, MiCRoCacheLayer
from micro.modeling.causal_lm import MiCRoForCausalLM
from micro.modeling.config import MiCRoConfig
from micro.modeling.keys import disk_mapping
from micro.modeling.model import MiCRoModel, MiCRoPreTrainedModel
from micro.modeling.outputs import MiCRoCausalLMOutputWithPast, MiCRoModelOutputWithPast
from micro.modeling.router import MiCRoRouter
from micro.modeling.steer import Steering
from micro.modeling.trace import RoutingTrace

__all__ = [
    "MiCRoCache",
    "MiCRoCacheLayer",
    "MiCRoCausalLMOutputWithPast",
    "MiCRoConfig",
    "MiCRoForCausalLM",
    "MiCRoModel",
    "MiCRoModelOutputWithPast",
    "MiCRoPreTrainedModel",
    "MiCRoRouter",
    "RoutingTrace",
    "Steering",
]

# A second import (a reloaded module, a notebook) must not fail on what is registered already.
register_checkpoint_conversion_mapping("micro", disk_mapping(), overwrite=True)
AutoConfig.register("micro", MiCRoConfig, exist_ok=True)
AutoModel.register(MiCRoConfig, MiCRoModel, exist_ok=True)
AutoModelForCausalLM.register(MiCRoConfig, MiCRoForCausalLM, exist_ok=True)
