"""Rows of the features that both experts read: the same rows, and gradients that meet."""

from __future__ import annotations

import torch

from wav.model.reads import divide


def test_rows_that_two_read_and_their_gradients() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    for action, sources in ((slice(0, 2), 4), (slice(0, 3), 3), (slice(0, 0), 5), (torch.tensor([4, 1]), 2)):
        (mine,), (other,) = divide([x], None, sources, action)
        torch.testing.assert_close((mine, other), (x[:sources], x[action]))
        for used in ((mine, other), (mine,), (other,)):
            weights = [torch.randn(part.shape) for part in used]
            found = torch.autograd.grad(used, x, weights, retain_graph=True)
            parts = {id(mine): x[:sources], id(other): x[action]}
            wanted = torch.autograd.grad([parts[id(part)] for part in used], x, weights)
            torch.testing.assert_close(found, wanted)
    assert [part[0] is x for part in divide([x], None, None, None)] == [True, True]
