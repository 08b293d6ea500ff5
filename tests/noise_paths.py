"""Brownian paths of the tests."""

from __future__ import annotations

import itertools

import torch


def same(a, b, rtol=1e-13, atol=1e-14):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def equal(a, b):
    return torch.equal(a.W, b.W) and (a.H is None or torch.equal(a.H, b.H))


def steps(path, points):
    return [path.increment(a, b) for a, b in itertools.pairwise(points)]
