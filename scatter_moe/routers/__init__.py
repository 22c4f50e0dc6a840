"""Routers: modules that score experts for each token and return a `Routing`; capacity; losses; statistics."""

from scatter_moe.routers.capacity import CapacityRouter, expert_capacity, limit_capacity, pass_overflow
from scatter_moe.routers.gshard import GShardRouter
from scatter_moe.routers.history import History
from scatter_moe.routers.jitter import jitter
from scatter_moe.routers.losses import (
    cv_squared,
    importance_loss,
    load_balancing_loss,
    router_z_loss,
    tokens_per_expert,
)
from scatter_moe.routers.noisy import NoisyTopKRouter
from scatter_moe.routers.router import Router, Routing
from scatter_moe.routers.sigmoid import SigmoidRouter
from scatter_moe.routers.statistics import RouterStatistics, Snapshot, track
from scatter_moe.routers.topk import SwitchRouter, TopKRouter

__all__ = [
    "CapacityRouter",
    "GShardRouter",
    "History",
    "NoisyTopKRouter",
    "Router",
    "RouterStatistics",
    "Routing",
    "SigmoidRouter",
    "Snapshot",
    "SwitchRouter",
    "TopKRouter",
    "cv_squared",
    "expert_capacity",
    "importance_loss",
    "jitter",
    "limit_capacity",
    "load_balancing_loss",
    "pass_overflow",
    "router_z_loss",
    "tokens_per_expert",
    "track",
]
