"""A stage whose blocks are compiled trains as it does eagerly, with and without recomputed activations."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.training.micro import inputs_of, objective_of, random_batch, small_model
from wav.code_cache import prepare_compiler
from wav.config import CouplingSettings

pytestmark = pytest.mark.integration

BOTH = CouplingSettings(mode="both")


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_have_the_gradients_of_eager_ones(recompute: bool) -> None:
    inputs = inputs_of(random_batch(), "train_joint", coupling=BOTH)
    gradients = []
    for compiled in (False, True):
        model = copy.deepcopy(small_model()).train()
        if recompute:
            model.enable_gradient_checkpointing()
        if compiled:
            prepare_compiler()
            model.compile_blocks(backend="aot_eager")
        loss, _ = objective_of("train_joint", model, BOTH)(inputs)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    eager, compiled_ones = gradients
    assert eager.keys() == compiled_ones.keys()
    assert len(eager) > 50
    for name, gradient in eager.items():
        torch.testing.assert_close(compiled_ones[name], gradient, msg=name)
