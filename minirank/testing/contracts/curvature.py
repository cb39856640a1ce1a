"""Contracts: curvature."""

from __future__ import annotations

from ..case import Contract

CONTRACTS: tuple[Contract, ...] = ()
