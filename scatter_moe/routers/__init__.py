"""Routers: modules that score experts for each token and return a `Routing`."""

from scatter_moe.routers.jitter import jitter
from scatter_moe.routers.router import Router, Routing
from scatter_moe.routers.topk import SwitchRouter, TopKRouter

__all__ = ["Router", "Routing", "SwitchRouter", "TopKRouter", "jitter"]
